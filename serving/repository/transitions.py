"""What may change who gets a model's traffic: each function makes a step from one document to the next.

A step that makes no sense raises a ServingError with a sentence. `available` is always the versions that can serve.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeAlias

from pydantic import ValidationError

from serving.errors import InvalidRequest, ModelNotFound, shown
from serving.repository.traffic import Judge, Keep, Latest, Sticky, Traffic, current, sentence

Transition: TypeAlias = Callable[[Traffic], Traffic]


def promote(version: str, *, available: Collection[str], judge: Judge | None = None) -> Transition:
    """Make a version stable. It ends the canary, and the shadow where that is the version.

    judge: takes it back where it breaks a condition. Raises ModelNotFound.
    """

    def change(traffic: Traffic) -> Traffic:
        _known(version, available)
        stable = current(traffic, available)
        shadow = None if traffic.shadow and traffic.shadow.version == version else traffic.shadow
        previous = traffic.previous if stable in (None, version) else stable
        return _changed(
            traffic, stable=version, previous=previous, canary=None, shadow=shadow, judge=judge, unloaded=False
        )

    return change


def pin(version: str) -> Transition:
    """Name the version that answers already as stable; where somebody has named one meanwhile, that one stays."""
    return lambda traffic: traffic if traffic.stable is not None else _changed(traffic, stable=version)


def canary(
    version: str | None,
    percent: float = 10.0,
    sticky: Sticky | None = None,
    *,
    available: Collection[str],
    judge: Judge | None = None,
) -> Transition:
    """Give a version a share of the traffic; None ends the canary. Raises ModelNotFound or InvalidRequest."""

    def change(traffic: Traffic) -> Traffic:
        if version is None:
            if traffic.canary is None:
                raise InvalidRequest("there is no canary to end")
            return _changed(traffic, canary=None, judge=None)
        stable = _beside(version, traffic, available, "canary")
        rest = None if traffic.shadow is not None and traffic.shadow.version == version else traffic.shadow
        candidate = {"version": version, "percent": percent, "sticky": sticky}
        return _changed(traffic, stable=stable, canary=candidate, shadow=rest, judge=judge)

    return change


def shadow(
    version: str | None, percent: float = 100.0, *, available: Collection[str], judge: Judge | None = None
) -> Transition:
    """Copy a share of the traffic to a version; None ends it. Raises ModelNotFound or InvalidRequest."""

    def change(traffic: Traffic) -> Traffic:
        if version is None:
            if traffic.shadow is None:
                raise InvalidRequest("there is no shadow to end")
            return _changed(traffic, shadow=None, judge=traffic.judge if traffic.canary is not None else None)
        stable = _beside(version, traffic, available, "shadow")
        if traffic.canary is not None and traffic.canary.version == version:
            raise InvalidRequest(f"version {version} is the canary: it answers already, so end the canary first")
        if judge is not None and traffic.canary is not None:
            raise InvalidRequest("judge: the canary is what is judged: end it first, or run the shadow without")
        rules = judge if traffic.canary is None else traffic.judge
        return _changed(traffic, stable=stable, shadow={"version": version, "percent": percent}, judge=rules)

    return change


def label(name: str, version: str | None, *, available: Collection[str]) -> Transition:
    """Point a label at a version; None removes it. Raises ModelNotFound or InvalidRequest."""

    def change(traffic: Traffic) -> Traffic:
        if version is None:
            if name not in traffic.labels:
                known = ", ".join(sorted(traffic.labels)) or "none"
                raise InvalidRequest(f"there is no label '{shown(name)}' to remove; labels: {known[:300]}")
            return _changed(traffic, labels={k: v for k, v in traffic.labels.items() if k != name})
        _known(version, available)
        return _changed(traffic, labels={**traffic.labels, name: version})

    return change


def rollback(*, available: Collection[str], earlier: Collection[str] = ()) -> Transition:
    """End the canary, or else go back to the version that was stable before; every trial ends with it.

    What is stable beside a canary stays: it is what served before, and a second rollback goes on from there. Goes to
    the newest of `previous`, `earlier` (newest first) and the next lower version that is still there. Where there is
    none, ending the shadow is all. Raises InvalidRequest where there is nothing to go back from.
    """

    def change(traffic: Traffic) -> Traffic:
        stable = current(traffic, available)
        if traffic.canary is not None and stable in available:
            return withdraw(traffic)
        lower = sorted((v for v in available if stable is not None and int(v) < int(stable)), key=int, reverse=True)
        candidates = [v for v in (traffic.previous, *earlier, *lower) if v in available and v != stable]
        if not candidates and traffic.canary is None and traffic.shadow is None:
            raise InvalidRequest("there is no earlier version to go back to")
        back = candidates[0] if candidates else stable
        return _changed(traffic, stable=back, previous=None, canary=None, shadow=None, judge=None, unloaded=False)

    return change


def withdraw(traffic: Traffic) -> Traffic:
    """End canary, shadow and judgement; stable stays. Nothing to end is no error."""
    return _changed(traffic, canary=None, shadow=None, judge=None)


def settle(traffic: Traffic) -> Traffic:
    """Take the judgement off: the change stays."""
    return _changed(traffic, judge=None)


def unload(traffic: Traffic) -> Traffic:
    """Serve nothing; canary, shadow and judgement end, stable and labels are remembered."""
    return _changed(traffic, unloaded=True, canary=None, shadow=None, judge=None)


def load(traffic: Traffic) -> Traffic:
    """Serve again."""
    return _changed(traffic, unloaded=False)


def keep(policy: Keep, *, available: Collection[str]) -> Transition:
    """Choose which versions stay loaded besides those with a role. Raises ModelNotFound or InvalidRequest."""

    def change(traffic: Traffic) -> Traffic:
        for version in policy if isinstance(policy, tuple) else ():
            _known(version, available)
        return _changed(traffic, keep=policy.model_dump() if isinstance(policy, Latest) else policy)

    return change


def restore(to: Traffic) -> Transition:
    """Go back to an earlier document, as a new generation."""
    return lambda traffic: to.model_copy(update={"generation": traffic.generation, "since": traffic.since})


def _changed(traffic: Traffic, **fields: Any) -> Traffic:
    """Copy with fields replaced, and checked. Raises InvalidRequest with a sentence that names the field."""
    try:
        return Traffic.model_validate({**{name: getattr(traffic, name) for name in Traffic.model_fields}, **fields})
    except ValidationError as error:
        raise InvalidRequest(sentence(error.errors(include_url=False)[0])) from None


def _known(version: str, available: Collection[str]) -> None:
    if version not in available:
        known = ", ".join(sorted(available, key=int)) or "none"
        raise ModelNotFound(f"there is no version '{shown(version)}' that can serve; versions: {known[:300]}")


def _beside(version: str, traffic: Traffic, available: Collection[str], role: str) -> str:
    """Check a version that is to run beside stable, and return stable: it has to be pinned, or it would move."""
    _known(version, available)
    if traffic.unloaded:
        raise InvalidRequest("the model is unloaded: load it first")
    stable = current(traffic, available)
    if stable is None or stable == version:
        raise InvalidRequest(
            f"version {version} already is stable and answers all: promote the version that is to answer beside its "
            f"{role} first"
        )
    return stable


def describe(before: Traffic, after: Traffic) -> str:
    """Say what changed between two documents."""
    said = []
    if after.unloaded != before.unloaded:
        said.append("is unloaded" if after.unloaded else "is loaded")
    if after.stable != before.stable:
        was = f", was {before.stable or 'the highest'}"
        said.append(f"{f'version {after.stable}' if after.stable else 'the highest version'} is stable{was}")
    if after.canary != before.canary:
        said.append(
            f"version {after.canary.version} gets {after.canary.percent:g} % as canary"
            if after.canary
            else "the canary has ended"
        )
    if after.shadow != before.shadow:
        said.append(
            f"version {after.shadow.version} is the shadow, of {after.shadow.percent:g} % of the requests"
            if after.shadow
            else "the shadow has ended"
        )
    for name in sorted(after.labels.keys() | before.labels.keys()):
        if after.labels.get(name) != before.labels.get(name):
            now = after.labels.get(name)
            said.append(f"label {name} is version {now}" if now else f"label {name} is removed")
    if after.keep != before.keep:
        said.append("other versions stay loaded")
    if after.judge is not None and after.judge != before.judge:
        said.append("it is judged")
    return ", ".join(said) or "nothing changes"
