"""The model repository on disk: which versions are there, and what is wrong with the rest.

<name>/<version>/model.onnx      as Triton and TF Serving lay it out
<name>/<version>/manifest.json   optional: SHA-256 and size of each file; without a match the version waits
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
VERSION = re.compile(r"[1-9][0-9]{0,8}")
MODEL_FILE = "model.onnx"


@dataclass(frozen=True, slots=True)
class Found:
    """A version that can be loaded."""

    name: str
    version: str
    path: Path


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in the folder that can't be served, and why; `version` is empty where it never came to one."""

    name: str
    version: str
    reason: str


@dataclass(frozen=True, slots=True)
class Contents:
    """What one look at the folder found."""

    found: tuple[Found, ...]
    problems: tuple[Problem, ...]


def scan(root: Path) -> Contents:
    """Look at the folder once; never raises for what lies in it. A missing folder is an empty one with a problem."""
    found: list[Found] = []
    problems: list[Problem] = []
    try:
        entries = sorted(root.iterdir())
    except OSError as error:
        return Contents((), (Problem("", "", f"the models folder can't be read: {error.strerror}"),))
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
        _scan_model(entry, found, problems)
    return Contents(tuple(found), tuple(problems))


def _scan_model(folder: Path, found: list[Found], problems: list[Problem]) -> None:
    name = folder.name
    versions = [p for p in folder.iterdir() if p.is_dir() and VERSION.fullmatch(p.name)]
    if not versions:
        problems.append(Problem(name, "", f"no version in it: expected {name}/1/{MODEL_FILE}"))
    for version in sorted(versions, key=lambda p: int(p.name)):
        reason = _unfit(version)
        if reason is None:
            found.append(Found(name, version.name, version / MODEL_FILE))
        else:
            problems.append(Problem(name, version.name, reason))


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
