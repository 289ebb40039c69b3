"""Removes a version that nobody is sent to: renamed away in one step, under the lock of who changes traffic."""

from __future__ import annotations

import contextlib
import secrets
import shutil

from serving.deploy.current_version import current_version
from serving.deploy.remote_versions import remove
from serving.errors import Conflict, ModelNotFound, shown
from serving.linux.files import sync
from serving.repository.traffic import Traffic
from serving.repository.traffic_store import TrafficStore

AWAY = ".deleted-"
"""Begins the name of a version that is on its way out; what a crash leaves of it is swept at the next publication."""


def delete(store: TrafficStore, name: str, version: str, *, who: str, why: str = "") -> Traffic:
    """Remove a version's folder, and note it in the history. Servers that have it loaded let it go.

    Raises ModelNotFound, Conflict where it is stable, canary, shadow, labelled or kept by name, and NotReady where the
    folder can't be written to; nothing is changed then.
    """
    folder = store.root / name / version
    away = folder.with_name(f"{AWAY}{secrets.token_hex(8)}")

    def move(traffic: Traffic) -> Traffic:
        half = store.remote is not None and store.remote.bucket.list(f"{name}/{version}")  # left by who was cut off
        if not half and version not in store.versions(name):
            raise ModelNotFound(f"model {name!r} has no version '{shown(version)}' in the folder")
        if roles := roles_of(version, traffic, current_version(store, name)):
            raise Conflict(f"version {version} is in use: it is {' and '.join(roles)}")
        if store.remote is None:
            folder.rename(away)
            sync(folder.parent)
        return traffic

    try:
        made = store.change(name, move, who=who, what=f"delete {version}", why=why)
    except BaseException:
        with contextlib.suppress(OSError):  # it was not moved, or the folder can't be written to
            away.rename(folder)  # what is not in the history has not happened
        raise
    if store.remote is not None:
        remove(store.remote.bucket, name, version)
        with contextlib.suppress(FileNotFoundError):  # a server of this machine was faster
            folder.rename(away)
    away.unlink() if away.is_symlink() else shutil.rmtree(away, ignore_errors=True)
    return made


def roles_of(version: str, traffic: Traffic, current: str | None) -> list[str]:
    """Say, in words, what a version is needed for; nothing where it is not."""
    keep = traffic.keep if isinstance(traffic.keep, tuple) else ()
    found = [
        ("stable", version == current),
        ("the canary", traffic.canary is not None and traffic.canary.version == version),
        ("the shadow", traffic.shadow is not None and traffic.shadow.version == version),
        *((f"labelled {label}", of == version) for label, of in sorted(traffic.labels.items())),
        ("kept by name", version in keep),
    ]
    return [role for role, has in found if has]
