"""The model repository on disk: which versions are there, and what is wrong with the rest.

<name>/<version>/model.onnx      as Triton and TF Serving lay it out
<name>/<version>/manifest.json   optional: SHA-256 and size of each file; without a match the version waits
<name>/traffic.json              optional: who gets the requests (`serving.fleet.traffic`)
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.errors import InvalidRequest
from serving.fleet.traffic import Traffic, parse

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
VERSION = re.compile(r"[1-9][0-9]{0,8}")
MODEL_FILE = "model.onnx"


@dataclass(frozen=True, slots=True)
class Found:
    """A version that can be loaded. `content` changes with its files; `path` is the model file."""

    name: str
    version: str
    path: Path
    content: str

    def dump(self) -> list[str]:
        """Return it as JSON values."""
        return [self.name, self.version, str(self.path), self.content]

    @classmethod
    def read(cls, given: list[str]) -> Found:
        """Return what `dump` wrote."""
        name, version, path, content = given
        return cls(name, version, Path(path), content)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in the folder that can't be served, and why; `version` is empty where it never came to one."""

    name: str
    version: str
    reason: str


@dataclass(frozen=True, slots=True)
class Contents:
    """What one look at the folder found. `traffic[name]` is there where the model has a readable traffic.json."""

    found: tuple[Found, ...]
    problems: tuple[Problem, ...]
    traffic: dict[str, Traffic]
    unreadable: bool = False
    """Whether the folder itself could not be read: nothing is known of what is in it."""


class Repository:
    """A models folder. Looking again costs little: files that have not changed are not read again."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._unfit: dict[tuple[Path, str], str | None] = {}

    def look(self) -> Contents:
        """Look at the folder once; never raises for what lies in it. A missing folder is unreadable, and a problem."""
        found: list[Found] = []
        problems: list[Problem] = []
        traffic: dict[str, Traffic] = {}
        try:
            entries = sorted(self.root.iterdir())
        except OSError as error:
            reason = f"the models folder can't be read: {error.strerror}"
            return Contents((), (Problem("", "", reason),), {}, unreadable=True)
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.is_dir():
                if entry.suffix == ".onnx":
                    better = f"{entry.stem}/1/{MODEL_FILE}"
                    problems.append(Problem(shown(entry.name), "", f"not served here: move it to {better}"))
                continue
            if not NAME.fullmatch(entry.name):
                reason = "not a model name: letters, digits, dot, dash, underscore; 128 at most"
                problems.append(Problem(shown(entry.name), "", reason))
                continue
            try:
                self._look_at(entry, found, problems, traffic)
            except OSError as error:  # it goes while we look
                problems.append(Problem(entry.name, "", f"can't be read: {error.strerror}"))
        return Contents(tuple(found), tuple(problems), traffic)

    def _look_at(self, folder: Path, found: list[Found], problems: list[Problem], traffic: dict[str, Traffic]) -> None:
        name = folder.name
        versions = [p for p in folder.iterdir() if p.is_dir() and VERSION.fullmatch(p.name)]
        if not versions:
            problems.append(Problem(name, "", f"no version in it: expected {name}/1/{MODEL_FILE}"))
        for version in sorted(versions, key=lambda p: int(p.name)):
            content = _content(version)
            if (version, content) not in self._unfit:
                self._unfit = {k: v for k, v in self._unfit.items() if k[0] != version}
                self._unfit[version, content] = _unfit(version)
            reason = self._unfit[version, content]
            if reason is None:
                found.append(Found(name, version.name, version / MODEL_FILE, content))
            else:
                problems.append(Problem(name, version.name, reason))
        try:
            traffic[name] = parse((folder / "traffic.json").read_bytes())
        except FileNotFoundError:
            pass
        except InvalidRequest as error:
            problems.append(Problem(name, "", error.message))


def _content(version: Path) -> str:
    """Return what changes when a file of a version does: by the facts of each, without reading any."""
    facts = []
    for file in sorted(version.rglob("*")):
        stat = file.stat()
        facts.append(f"{file.relative_to(version)} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _unfit(version: Path) -> str | None:
    """Say why a version folder can't be loaded now, or None."""
    model = version / MODEL_FILE
    if not model.is_file():
        return f"no {MODEL_FILE} in it"
    manifest = version / "manifest.json"
    if not manifest.exists():
        return None
    declared = _json(manifest)
    files = declared.get("files") if isinstance(declared, dict) else None
    if not isinstance(files, dict) or MODEL_FILE not in files:
        return "manifest.json can't be read"
    for file_name, facts in files.items():
        file = version / file_name
        if "/" in file_name or not file.is_file() or not isinstance(facts, dict):
            return f"manifest.json names {shown(file_name)}, which is not there"
        if file.stat().st_size != facts.get("size"):
            return f"{shown(file_name)} has another size than manifest.json says: half copied?"
        with file.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != facts.get("sha256"):
                return f"{shown(file_name)} has another SHA-256 than manifest.json says"
    return None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def shown(name: str) -> str:
    """Make a name from outside fit for a log line or an answer."""
    return ascii(name[:64])[1:-1]
