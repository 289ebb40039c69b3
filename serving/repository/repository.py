"""The model repository on disk: which versions are there, and what is wrong with the rest.

<name>/<version>/model.onnx      as Triton and TF Serving lay it out
<name>/<version>/manifest.json   optional: SHA-256 and size of each file; while they do not match, the version waits
<name>/model.toml                optional: settings of this model, as in Triton's config.pbtxt, which is read too
<name>/traffic.json              optional: who gets the requests (`serving.repository.traffic`)
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from serving.errors import ModelInvalid, ServingError, shown
from serving.repository import copy_stability, manifest
from serving.repository.manifest import MANIFEST_FILE, MODEL_FILE, Hashes, Manifest
from serving.repository.model_settings import ModelSettings, SettingsFiles
from serving.repository.traffic import Traffic

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
VERSION = re.compile(r"[1-9][0-9]{0,17}")
"""As TF Serving and Triton take them, who read 64-bit numbers; often the time in seconds."""


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """A version that is whole. `content` is the hash of its files (`Manifest.content`); `path` is the model file."""

    name: str
    version: str
    path: Path
    content: str
    sha256: str = ""
    """Of the model file."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in the folder that can't be served, and why; `version` is empty where it never came to one."""

    name: str
    version: str
    reason: str


@dataclass(frozen=True, slots=True)
class Contents:
    """What one scan of the folder found. `traffic[name]` is there unless it can't be read."""

    found: tuple[ModelVersion, ...]
    problems: tuple[Problem, ...]
    traffic: dict[str, Traffic]
    settings: dict[str, ModelSettings]
    """By name; a model without any is not in it."""
    unreadable: bool = False
    """Whether the folder itself could not be read: nothing is known of what is in it."""
    device: int = 0
    """The number of the device on which the folder is."""


class Repository:
    """A models folder. Looking again costs little: files that have not changed are not read again.

    document: returns a model's traffic document; raises a ServingError where it can't be read. A folder without a
    manifest is found once nothing in it has changed for `settle_s` seconds; the first scan takes all that is whole, so
    that a server that starts does not wait. elsewhere: returns what is wrong where the folder comes from.
    """

    def __init__(
        self,
        root: Path,
        document: Callable[[str], Traffic],
        *,
        settle_s: float = copy_stability.SETTLE_S,
        elsewhere: Callable[[], Iterable[Problem]] = tuple,
    ) -> None:
        self.root = root
        self._elsewhere = elsewhere
        self._document = document
        self._hashes = Hashes()
        self._stability = copy_stability.CopyStability(settle_s)
        self._started = False
        self._settings = SettingsFiles(root)
        self._seen: dict[Path, tuple[copy_stability.Files, Manifest | str]] = {}

    def scan(self) -> Contents:
        """Scan the folder once; never raises for what lies in it. A missing folder is unreadable, and a problem."""
        found: list[ModelVersion] = []
        problems: list[Problem] = []
        traffic: dict[str, Traffic] = {}
        try:
            device = self.root.stat().st_dev
            entries = sorted(self.root.iterdir())
        except OSError as error:
            reason = f"the models folder can't be read: {error.strerror}"
            return Contents((), (Problem("", "", reason),), {}, {}, unreadable=True)
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "lost+found":  # the latter is each new volume's own
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
                self._scan_model(entry, found, problems, traffic)
            except OSError as error:  # it goes meanwhile
                problems.append(Problem(entry.name, "", f"can't be read: {error.strerror}"))
        self._forget({item.path.parent for item in found} | {self.root / p.name / p.version for p in problems})
        self._started = True
        settings, complaints = self._settings.look({item.name for item in found})
        problems += [Problem(name, "", text) for name, text in complaints]
        problems += self._elsewhere()
        for name, own in settings.items():
            if name in traffic:
                traffic[name] = own.traffic(traffic[name], [item.version for item in found if item.name == name])
        return Contents(tuple(found), tuple(problems), traffic, settings, device=device)

    def _scan_model(
        self, folder: Path, found: list[ModelVersion], problems: list[Problem], traffic: dict[str, Traffic]
    ) -> None:
        name = folder.name
        entries = list(folder.iterdir())
        if all(path.name.startswith(".") for path in entries):
            return  # nothing, or a first version is being copied into it (`publish`), or was when that was cut off
        folders = [path for path in entries if path.is_dir()]
        versions = [path for path in folders if VERSION.fullmatch(path.name)]
        misnamed = [path.name for path in folders if path not in versions and (path / MODEL_FILE).exists()]
        for other in sorted(other for other in misnamed if not copy_stability.TEMPORARY.fullmatch(other)):
            reason = "not a version: name its folder by a whole number, without zeros before it, such as 3"
            problems.append(Problem(name, shown(other), reason))
        if not versions and not misnamed:
            problems.append(Problem(name, "", f"no version in it: expected {name}/1/{MODEL_FILE}"))
        for version in sorted(versions, key=lambda p: int(p.name)):
            whole = self._whole(version)
            if isinstance(whole, Manifest):
                found.append(
                    ModelVersion(
                        name, version.name, version / MODEL_FILE, whole.content, whole.files[MODEL_FILE].sha256
                    )
                )
            else:
                problems.append(Problem(name, version.name, whole))
        try:
            traffic[name] = self._document(name)
        except ServingError as error:
            problems.append(Problem(name, "", error.message))

    def invalidate(self, found: ModelVersion) -> None:
        """Read a version's files again at the next scan: they may have changed since the last one."""
        self._seen.pop(found.path.parent, None)

    def manifest(self, found: ModelVersion) -> Manifest:
        """Return what a version that a scan has found consists of. Raises ModelInvalid where it has changed since."""
        seen = self._seen.get(found.path.parent)
        if seen is None or not isinstance(seen[1], Manifest) or seen[1].content != found.content:
            raise ModelInvalid("it has changed on disk")
        return seen[1]

    def contents(self) -> set[str]:
        """Return the content of each version that the last scan has found; for any thread."""
        seen = list(self._seen.values())  # at once: a scan adds to it meanwhile
        return {whole.content for _, whole in seen if isinstance(whole, Manifest)}

    def _whole(self, version: Path) -> Manifest | str:
        """Return what a version folder consists of, or say why it can't be loaded now."""
        files = copy_stability.snapshot(version)
        seen = self._seen.get(version)
        if seen is not None and seen[0] == files:
            return seen[1]
        settled = self._stability.settled(version, files, time.monotonic()) or not self._started
        try:
            declared = manifest.read(version)
            if declared is not None:
                manifest.check(version, declared, self._hashes)
            elif settled:
                declared = manifest.of(version, self._hashes)
            elif seen is not None and isinstance(seen[1], Manifest):
                return seen[1]  # what was loaded of it serves until the folder is whole again
            else:
                return f"it has no {MANIFEST_FILE}, so it waits until nothing in it changes any more"
            whole: Manifest | str = declared
        except ModelInvalid as error:
            whole = error.message
        self._seen[version] = (files, whole)
        return whole

    def _forget(self, but: set[Path]) -> None:
        self._hashes.keep(but)
        self._stability.keep(but)
        self._seen = {folder: seen for folder, seen in self._seen.items() if folder in but}
