"""The model repository on disk: which versions are there, and what is wrong with the rest.

<name>/<version>/model.onnx      as Triton and TF Serving lay it out
<name>/<version>/manifest.json   optional: SHA-256 and size of each file; while they do not match, the version waits
<name>/traffic.json              optional: {"labels": {"<label>": "<version>"}}
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.errors import ModelInvalid
from serving.fleet import manifest, settling
from serving.fleet.manifest import MANIFEST_FILE, MODEL_FILE, Hashes, Manifest

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
VERSION = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True)
class Found:
    """A version that is whole; its content (`manifest.content`) is the same as long as its files are."""

    name: str
    version: str
    path: Path
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in the folder that can't be served, and why; `version` is empty where it never came to one."""

    name: str
    version: str
    reason: str
    waits: bool = False
    """It may become whole by itself: it is still being copied, or looks so."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What one look at the folder found. `labels[name][label]` is a version."""

    found: tuple[Found, ...]
    problems: tuple[Problem, ...]
    labels: dict[str, dict[str, str]]


class Memory:
    """What earlier looks learnt: hashes of files that have not changed, and since when plain folders are as they are.

    With one, a folder without a manifest is found only when it has been the same for `settle_s` seconds, and no file is
    read twice.
    """

    def __init__(self, settle_s: float = settling.SETTLE_S) -> None:
        self.hashes = Hashes()
        self.settling = settling.Memory(settle_s)

    def keep(self, folders: set[Path]) -> None:
        """Forget all other version folders."""
        self.hashes.keep(folders)
        self.settling.keep(folders)


def scan(root: Path, memory: Memory | None = None) -> Contents:
    """Look at the folder once; never raises for what lies in it. A missing folder is an empty one with a problem.

    A watcher passes the same `memory` every time, and looks again after a problem that has `waits`.
    """
    found: list[Found] = []
    problems: list[Problem] = []
    labels: dict[str, dict[str, str]] = {}
    try:
        entries = sorted(root.iterdir())
    except OSError as error:
        return Contents((), (Problem("", "", f"the models folder can't be read: {error.strerror}"),), {})
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
        _scan_model(entry, found, problems, labels, memory)
    if memory is not None:
        memory.keep({item.path.parent for item in found} | {root / p.name / p.version for p in problems if p.version})
    return Contents(tuple(found), tuple(problems), labels)


def _scan_model(
    folder: Path,
    found: list[Found],
    problems: list[Problem],
    labels: dict[str, dict[str, str]],
    memory: Memory | None,
) -> None:
    name = folder.name
    try:
        versions = [p for p in folder.iterdir() if p.is_dir() and VERSION.fullmatch(p.name)]
    except OSError as error:
        problems.append(Problem(name, "", f"its folder can't be read: {error.strerror}"))
        return
    if not versions:
        problems.append(Problem(name, "", f"no version in it: expected {name}/1/{MODEL_FILE}"))
    for version in sorted(versions, key=lambda p: int(p.name)):
        whole = _whole(version, memory)
        if isinstance(whole, Manifest):
            found.append(Found(name, version.name, version / MODEL_FILE, whole))
        else:
            problems.append(Problem(name, version.name, whole, waits=True))
    traffic = folder / "traffic.json"
    if traffic.exists():
        given = _json(traffic)
        declared = given.get("labels", {}) if isinstance(given, dict) else None
        if isinstance(declared, dict) and all(isinstance(v, str) for v in declared.values()):
            labels[name] = {str(k): v for k, v in declared.items()}
        else:
            problems.append(Problem(name, "", 'traffic.json is not {"labels": {"<label>": "<version>"}}'))


def _whole(version: Path, memory: Memory | None) -> Manifest | str:
    """Return what a version folder consists of, or say why it can't be loaded now."""
    hashes = memory.hashes if memory is not None else Hashes()
    try:
        declared = manifest.read(version)
        if declared is not None:
            manifest.check(version, declared, hashes)
            return declared
        if memory is not None and not memory.settling.settled(version, time.monotonic()):
            return f"without a {MANIFEST_FILE}, it waits until no file in it changes any more"
        return manifest.of(version, hashes)
    except ModelInvalid as error:
        return error.message


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def shown(name: str) -> str:
    """Make a name from outside fit for a log line or an answer."""
    return ascii(name[:64])[1:-1]
