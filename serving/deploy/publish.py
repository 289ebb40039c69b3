"""Publishes a version: staged outside of the models folder, examined, and renamed into place; whole or not at all.

A crash at any instant leaves the state before or the state after. What has passed is brought first to a hidden folder
within the model's own, which no server takes for a version: the state folder may be on another file system. What a
crash leaves behind is swept later.
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from serving.deploy.current_version import current_version, stay
from serving.deploy.delete import AWAY
from serving.deploy.mirror import Mirror
from serving.deploy.remote_versions import taken_by_others, upload
from serving.deploy.staging import ModelFile, Source, copied, embed, write
from serving.errors import InvalidRequest, ModelInvalid, NotReady, ServingError, shown
from serving.gate import gate, prepared
from serving.gate.findings import Limits
from serving.gate.gate import Gate
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
    examiner: Gate | None = None,
    state_dir: Path | None = None,
) -> Published:
    """Put a model into `root/name/<version>/` and return the version and the gate's report.

    It moves no traffic: the version that answers now stays stable, by name from now on. A model's first one answers.
    source: an ONNX file, whose external data must lie in its own folder, or what writes one. version: None takes the
    next number. signature: JSON that is embedded in place of the file's own. examiner: a gate that is open already.
    extension_ops: operators of onnxruntime-extensions are allowed. state_dir: see `state_folder`. Raises
    InvalidRequest, Conflict where the version is there with other bytes, GateRefused, and NotReady where the disk is
    full or can't be written to.
    """
    check_name(name)
    if version is not None and not VERSION.fullmatch(version):
        raise InvalidRequest(f"'{shown(version)}' is no version: a whole number from 1, or next")
    home, store = root / name, TrafficStore(root, state_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
        state = state_directory.state_folder(root, state_dir)
        with _folders(state, home) as (staged, near), contextlib.ExitStack() as opened:
            folder = staged
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
            asked = examiner or opened.enter_context(Gate(Limits(extension_ops=extension_ops)))
            while True:
                there = _same(home, found, version)
                if there is not None:
                    report = _judged(state, home / there, found, None, asked)
                    return Published(there, report, new=False, answers=current_version(store, name))
                against = serving_now(root, name, state_dir)
                report = _judged(state, folder, found, against, asked)
                if not report.ok:
                    raise GateRefused(report)
                (folder / REPORT_FILE).unlink(missing_ok=True)
                write(folder / REPORT_FILE, report.text())
                if mirror is None:
                    folder = _brought(folder, near)
                # Before the last look, so that of two who publish a model's first version only one gets this number.
                number = version or str(max(_versions(home), default=0) + 1)
                if _same(home, found, version) or serving_now(root, name, state_dir) != against:
                    continue  # overtaken: the callers of what answers by now must not break either
                if home.exists():
                    stay(store, name, who=found.who)
                if mirror is not None:
                    number = _through_store(mirror, folder, home, version)
                elif not _renamed(folder, home / number):
                    continue
                return Published(number, report, answers=store.read(name).stable or number)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise NotReady(f"the version could not be written, and nothing has changed: {reason.lower()}") from error


@contextmanager
def _folders(state: Path, home: Path) -> Iterator[tuple[Path, Path]]:
    """Give a folder to stage a version in, and the path of one beside the model's own; both are gone afterwards."""
    state_directory.sweep(state / "staging")
    for left in (_NEAR, AWAY):
        state_directory.sweep(home.parent, f"*/{left}*")
    staged, near = state_directory.staging_folder(state), home / f"{_NEAR}{secrets.token_hex(8)}"
    try:
        yield staged, near
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        shutil.rmtree(near, ignore_errors=True)
        with contextlib.suppress(OSError):
            home.rmdir()  # where it was made for this, and nothing came of it


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


def _judged(state: Path, folder: Path, found: Manifest, serving: Path | None, examiner: Gate) -> Report:
    """Examine a version, and keep the verdict and the prepared form where it passed."""
    if serving is None and (known := gate.verdict(state, found.content)) is not None:
        return known
    with prepared.written(state, found) as prepare_in:
        report = examiner.examine(folder, serving=serving, prepare_in=prepare_in)
    if report.ok:
        with contextlib.suppress(OSError):  # a verdict that is not kept is made once more
            gate.keep(state, report)
    return report


def _brought(folder: Path, near: Path) -> Path:
    """Bring what was staged onto the file system of the models, for a rename is to be the last step. Raises OSError."""
    if folder == near:
        return near
    near.parent.mkdir(exist_ok=True)
    try:
        folder.rename(near)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        for inner, _, files in os.walk(folder):
            to = near / Path(inner).relative_to(folder)
            to.mkdir()
            for name in files:
                copied(Path(inner, name), to / name)
    return near


def _renamed(folder: Path, to: Path) -> bool:
    """Put a version into its model's folder; False where one of this number is there already. Raises OSError."""
    for inner, _, _ in os.walk(folder, topdown=False):
        sync(Path(inner))  # the names in it before its own: it must not be seen with less after a loss of power
    try:
        rename_to_free(folder, to)
    except FileExistsError:
        return False
    for home in (to.parent, to.parent.parent):  # the model's own folder may be new too
        sync(home)
    return True


def _through_store(mirror: Mirror, folder: Path, home: Path, version: str | None) -> str:
    """Upload what was staged, and put it into the folder that mirrors the store. Raises Conflict, NotReady, OSError."""
    number = upload(mirror.bucket, folder, home.name, version)
    if home.exists():
        _renamed(folder, home / number)  # else a server of this machine was faster
    else:  # with the settings that the store has for it
        mirror.pull(home.name)
    return number


def user() -> str:
    """Name the user of the system who runs this process."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a number without a name, as in containers
        return str(os.getuid())
