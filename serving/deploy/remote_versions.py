"""Versions of a repository in an object store, there and back: put whole or not at all, and taken only when whole.

A version's manifest is written first, and only where there is none: whoever has written it has the number. Nobody takes
the version before all is there that its manifest names, with the sizes and hashes that it says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from serving.deploy.staging import Writing, write
from serving.errors import Conflict, ModelInvalid, NotReady, shown
from serving.repository import manifest
from serving.repository.copy_stability import TEMPORARY
from serving.repository.manifest import MANIFEST_FILE, MODEL_FILE, Hashes, Manifest
from serving.repository.object_store import Bucket, Object, Overtaken
from serving.repository.repository import VERSION

_TRIES = 50


def fetch(bucket: Bucket, place: str, files: Mapping[str, Object], folder: Path) -> None:
    """Download a version into an empty folder, and hash it. place: <name>/<version>. files: what was listed below it.

    One without a manifest gets one of what has come. Raises ModelInvalid where it is not whole, NotReady, OSError.
    """
    declared = None
    if MANIFEST_FILE in files:
        held = bucket.read(f"{place}/{MANIFEST_FILE}")
        write(folder / MANIFEST_FILE, held.content if held is not None else b"")
        declared = manifest.read(folder)
    entries = declared.files if declared is not None else {}
    for name, entry in entries.items():
        if name not in files:
            raise ModelInvalid(f"{MANIFEST_FILE} names {shown(name)}, which is not there")
        if files[name].size != entry.size:
            raise ModelInvalid(
                f"{shown(name)} has {files[name].size} bytes, and {MANIFEST_FILE} says {entry.size}: half copied?"
            )
    if MODEL_FILE not in files:
        raise ModelInvalid(f"no {MODEL_FILE} in it")
    # A listing has folders too, of which some tools make empty objects.
    for name in entries or [name for name, facts in files.items() if facts.size or name == MODEL_FILE]:
        if TEMPORARY.fullmatch(name.rsplit("/", 1)[-1]):
            continue
        manifest.check_name(name)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with Writing(folder / name) as writing:
            for part in bucket.parts(f"{place}/{name}"):
                writing.write(part)
            came = writing.close()
        if name in entries and came != entries[name]:
            raise ModelInvalid(
                f"{shown(name)} did not come as {MANIFEST_FILE} says: {came.size} bytes, or another SHA-256"
            )
    if declared is None:
        write(folder / MANIFEST_FILE, manifest.of(folder, Hashes()).text())


def upload(bucket: Bucket, folder: Path, name: str, version: str | None) -> str:
    """Put a staged version into the store and return its number; None takes the next one.

    Raises Conflict where the version is there with other files, and NotReady: what was written then is completed when
    the same is published again, or removed as any version, and nobody takes it meanwhile.
    """
    found = Manifest.model_validate_json((folder / MANIFEST_FILE).read_bytes())
    number = _claimed(bucket, name, version, found)
    for file in folder.rglob("*"):
        if file.is_file() and file.name != MANIFEST_FILE:
            bucket.upload(f"{name}/{number}/{file.relative_to(folder).as_posix()}", file)
    return number


def _claimed(bucket: Bucket, name: str, version: str | None, found: Manifest) -> str:
    """Return the number whose manifest is ours: written now, or when the same files were published and cut off."""
    for _ in range(_TRIES):
        taken = {path.split("/")[1] for path in bucket.list(name) if path.count("/") > 1}
        last = max((int(each) for each in taken if VERSION.fullmatch(each)), default=0)
        held = bucket.read(f"{name}/{version or last}/{MANIFEST_FILE}")
        with contextlib.suppress(ValueError):
            if held is not None and Manifest.model_validate_json(held.content).content == found.content:
                return version or str(last)
        if version is not None and (held is not None or version in taken):
            raise taken_by_others(version)
        number = version or str(last + 1)
        with contextlib.suppress(Overtaken):
            bucket.write(f"{name}/{number}/{MANIFEST_FILE}", found.text(), None)
            return number
    raise NotReady(f"others publish {name} all the time: try again")


def taken_by_others(version: str) -> Conflict:
    """Say that a version is there with other files."""
    return Conflict(f"version {version} is there with other content, and a version never changes: publish the next one")


def remove(bucket: Bucket, name: str, version: str) -> None:
    """Remove a version's objects, its model first: from then on nobody takes it. Raises NotReady."""
    found = bucket.list(f"{name}/{version}")
    bucket.delete(sorted(found, key=lambda path: (not path.endswith(f"/{MODEL_FILE}"), path.endswith(MANIFEST_FILE))))
