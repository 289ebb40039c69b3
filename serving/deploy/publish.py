"""Publishes a version: staged outside of the models folder, examined, and renamed into place; whole or not at all.

A crash at any instant leaves the state before or the state after. Where the state folder is on another file system, the
version is copied first to a hidden folder within the model's own, which no server takes for a version. What a crash
leaves behind is swept later.
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from serving.deploy.current_version import current_version, stay
from serving.deploy.delete import AWAY
from serving.deploy.mirror import Mirror
from serving.deploy.remote_versions import taken_by_others, upload
from serving.deploy.staging import ModelFile, Source, copied, embed, write
from serving.errors import InvalidRequest, ModelInvalid, NotReady, ServingError, shown
from serving.gate import gate, prepared
from serving.gate.gate import Gate, Limits
from serving.gate.report import REPORT_FILE, GateRefused, Report
from serving.linux.files import rename_to_free, sync
from serving.repository import manifest, state_directory
from serving.repository.manifest import MANIFEST_FILE, MODEL_FILE, Hashes, Manifest
from serving.repository.repository import NAME, VERSION
from serving.repository.traffic_store import TrafficStore

_NEAR = ".publishing-"
"""Begins the name of a copy that is about to be renamed. Triton and TF Serving take numbers for versions."""


@dataclass(frozen=True, slots=True)
class Published:
    """A version that is in the folder."""

    version: str
    report: Report
    new: bool = True
    """False where the same bytes were published before."""
    answers: str | None = None
    """The version that answers callers who name none; it is this one only where it is the model's first."""


class _Overtaken(Exception):
    """While it was examined, another version came to answer, whose callers must not break either, or the same came."""


def publish(
    root: Path,
    name: str,
    source: Path | Source,
    *,
    version: str | None = None,
    signature: bytes | None = None,
    note: str = "",
    who: str = "",
    allow_breaking: bool = False,
    extension_ops: bool = False,
    serving: Path | None = None,
    examiner: Gate | None = None,
    state_dir: Path | None = None,
) -> Published:
    """Put a model into `root/name/<version>/` and return the version and the gate's report.

    It moves no traffic: the version that answers now stays stable, by name from now on. A model's first one answers.
    source: an ONNX file, whose external data must lie in its own folder, or what writes one. version: None takes the
    next number. signature: JSON that is embedded in place of the file's own. serving: the folder of the version that
    callers use now, which the new one must be compatible with; None finds it. examiner: a gate that is open already.
    extension_ops: operators of onnxruntime-extensions are allowed. state_dir: see `state_folder`. Raises
    InvalidRequest, Conflict where the version is there with other bytes, GateRefused, and NotReady where the disk is
    full or can't be written to.
    """
    check_name(name)
    if version is not None and not VERSION.fullmatch(version):
        raise InvalidRequest(f"'{shown(version)}' is no version: a whole number from 1, or next")
    staged, limits, store = None, Limits(extension_ops=extension_ops), TrafficStore(root, state_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
        place = state_directory.state_folder(root, state_dir)
        state_directory.sweep(place / "staging")
        for left in (_NEAR, AWAY):
            state_directory.sweep(root, f"*/{left}*")
        staged = state_directory.staging_folder(place)
        folder = staged / name / "new"
        folder.mkdir(parents=True)
        files = (ModelFile(source) if isinstance(source, Path) else source).stage(folder)
        if signature is not None:
            files[MODEL_FILE] = embed(folder / MODEL_FILE, signature)
        found = Manifest(
            files=files,
            note=note,
            who=who or user(),
            time=round(time.time(), 3),
            allow_breaking=allow_breaking,
        )
        write(folder / MANIFEST_FILE, found.text())
        mirror = Mirror.of(root, state_dir)
        place_it = _into_place if mirror is None else partial(_through_store, mirror)
        while True:
            there = _same(root / name, found, version)
            if there is not None:
                report = _judged(place, root / name / there, found, None, examiner or limits)
                return Published(there, report, new=False, answers=current_version(store, name))
            against = serving or serving_now(root, name, state_dir)
            report = _judged(place, folder, found, against, examiner or limits)
            if not report.ok:
                raise GateRefused(report)
            write(folder / REPORT_FILE, report.text())
            for inner, _, _ in os.walk(folder, topdown=False):
                sync(Path(inner))
            sync(folder.parent)

            def beside(against: Path | None = against) -> None:
                if _same(root / name, found, version) or (serving or serving_now(root, name, state_dir)) != against:
                    raise _Overtaken
                stay(store, name, who=found.who)

            try:
                number = place_it(folder, root / name, version, beside=beside)
            except _Overtaken:
                (folder,) = (staged / name).iterdir()
                (folder / REPORT_FILE).unlink()
                continue
            return Published(number, report, answers=store.read(name).stable or number)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise NotReady(f"the version could not be written, and nothing has changed: {reason.lower()}") from error
    finally:
        if staged is not None:
            shutil.rmtree(staged, ignore_errors=True)


def check_name(name: str) -> None:
    """Refuse a name that is none, before it touches a path. Raises InvalidRequest."""
    if not NAME.fullmatch(name):
        raise InvalidRequest(
            f"'{shown(name)}' is no model name: letters, digits, dot, dash, underscore, not a sign first; 128 at most"
        )


def serving_now(root: Path, name: str, state_dir: Path | None = None) -> Path | None:
    """Return the folder of the version that callers of a model use now; None where it has none."""
    with contextlib.suppress(ServingError):  # there is no such model yet, or nobody can say
        version = current_version(TrafficStore(root, state_dir), name)
        if version is not None and (root / name / version).is_dir():
            return root / name / version
    return None


def _versions(home: Path) -> list[int]:
    try:
        return sorted(int(name) for name in os.listdir(home) if VERSION.fullmatch(name))
    except FileNotFoundError:
        return []


def _same(home: Path, found: Manifest, version: str | None) -> str | None:
    """Return the version with these very files. Raises Conflict where `version` is there with others."""
    for number in reversed(_versions(home)):
        if version is not None and str(number) != version:
            continue
        try:
            there = manifest.read(home / str(number)) or manifest.of(home / str(number), Hashes())
        except ModelInvalid:
            there = None
        if there is not None and there.content == found.content:
            return str(number)
        if version is not None:
            raise taken_by_others(version)
    return None


def _judged(place: Path, folder: Path, found: Manifest, serving: Path | None, examiner: Gate | Limits) -> Report:
    """Examine a version, and keep the verdict and the prepared form where it passed."""
    if serving is None and (known := gate.verdict(place, found.content)) is not None:
        return known
    with prepared.written(place, found) as prepare_in, contextlib.ExitStack() as stack:
        if isinstance(examiner, Limits):
            examiner = stack.enter_context(Gate(examiner))
        report = examiner.examine(folder, serving=serving, prepare_in=prepare_in)
    if report.ok:
        with contextlib.suppress(OSError):  # a verdict that is not kept is made once more
            gate.keep(place, report)
    return report


def _into_place(folder: Path, home: Path, version: str | None, *, beside: Callable[[], object]) -> str:
    """Rename what was staged to where it is served from, and return its version. Raises Conflict, OSError.

    beside: called before it comes beside other versions.
    """
    root, staged = home.parent, folder.parent
    try:
        if not home.exists():
            # A new model comes with its folder: an empty one would be there for a moment, or after a crash for ever.
            number = version or "1"
            folder = folder.rename(folder.with_name(number))
            sync(staged)
            with contextlib.suppress(FileExistsError):  # somebody else's first version was faster
                rename_to_free(staged, home)
                sync(root)
                return number
        beside()
        return _numbered(folder, home, version)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    (folder,) = staged.iterdir()
    with _near(folder, home) as near:
        beside()
        return _numbered(near, home, version)


def _numbered(folder: Path, home: Path, version: str | None) -> str:
    while True:
        number = version or str(max(_versions(home), default=0) + 1)
        try:
            rename_to_free(folder, home / number)
        except FileExistsError:
            if version is not None:
                raise taken_by_others(version) from None
            continue
        sync(home)
        return number


def _through_store(
    mirror: Mirror, folder: Path, home: Path, version: str | None, *, beside: Callable[[], object]
) -> str:
    """Upload what was staged, and put it into the folder that mirrors the store. Raises Conflict, NotReady, OSError."""
    if home.exists():
        beside()
    number = upload(mirror.bucket, folder, home.name, version)
    if home.exists():
        with contextlib.suppress(FileExistsError):  # a server of this machine was faster
            rename_to_free(folder, home / number)
            sync(home)
    else:  # with the settings that the store has for it
        mirror.pull(home.name)
    return number


@contextlib.contextmanager
def _near(folder: Path, home: Path) -> Iterator[Path]:
    """Copy what was staged to the file system of the models, and have it on disk. Raises OSError."""
    home.mkdir(exist_ok=True)
    near = home / f"{_NEAR}{secrets.token_hex(8)}"
    try:
        for inner, _, files in os.walk(folder):
            to = near / Path(inner).relative_to(folder)
            to.mkdir()
            for name in files:
                copied(Path(inner, name), to / name)
        for inner, _, _ in os.walk(near, topdown=False):
            sync(Path(inner))
        yield near
    finally:
        shutil.rmtree(near, ignore_errors=True)
        with contextlib.suppress(OSError):
            home.rmdir()  # where it was made for this, and nothing came of it


def user() -> str:
    """Name the user of the system who runs this process."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a number without a name, as in containers
        return str(os.getuid())
