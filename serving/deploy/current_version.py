"""Which version answers callers who name none, as far as the disk tells: asked before anything is put beside it."""

from __future__ import annotations

import contextlib

from serving.deploy.unservable_reason import unfit
from serving.errors import InvalidRequest
from serving.repository import model_settings
from serving.repository.traffic_store import TrafficStore
from serving.repository.transitions import pin


def current_version(store: TrafficStore, name: str) -> str | None:
    """Return the version that is stable, or else the highest that nothing speaks against; None where there is none.

    Raises ModelNotFound, InvalidRequest where traffic.json can't be read.
    """
    traffic = store.read(name)
    usable = store.usable(name)
    with contextlib.suppress(InvalidRequest):
        traffic = model_settings.read(store.root / name).traffic(traffic, usable)
    if traffic.stable is not None:
        return traffic.stable
    return next((v for v in reversed(usable) if not unfit(store.root, name, v, store.state_dir)), None)


def stay(store: TrafficStore, name: str, *, who: str) -> str | None:
    """Name the version that answers now as stable, where nobody has, so that the next one moves no traffic.

    Returns it. Raises what `current_version` does, and NotReady where the folder can't be written.
    """
    now = current_version(store, name)
    if now is not None and store.read(name).stable is None:
        why = "a version is published beside it, which would have taken all requests at once"
        store.change(name, pin(now), who=who, what=f"stay on {now}", why=why)
    return now
