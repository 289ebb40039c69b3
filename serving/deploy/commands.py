"""What a deployer can ask for, the same from the command line and over HTTP: each order makes one step."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar, NamedTuple

from pydantic import ConfigDict, Field

from serving.deploy.unservable_reason import unfit
from serving.documented import Documented
from serving.errors import InvalidRequest
from serving.repository import transitions
from serving.repository.traffic import Judge, Keep, Latest, Percent, Sticky, Traffic, Version
from serving.repository.traffic_store import TrafficStore
from serving.repository.transitions import Transition


class Step(NamedTuple):
    """What an order does to one model's document, why, for the history, and what there is to say of it besides."""

    transition: Transition
    why: str
    notes: tuple[str, ...] = ()


class Order(Documented):
    """One change that somebody wants; `why` goes into the history."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    verb: ClassVar[str]
    anyway: ClassVar[bool] = False
    """Whether it is made though traffic.json can't be read, from what that said last."""
    why: Annotated[str, Field(max_length=2000)] = ""
    """The reason, for the history."""

    @property
    def what(self) -> str:
        """Say it in a few words, for the history."""
        return self.verb

    def said(self, before: Traffic, after: Traffic) -> str:
        """Say it for the history, once it is known what it has changed."""
        return self.what

    @abstractmethod
    def step(self, store: TrafficStore, name: str) -> Step:
        """Return the step for a model; looks at the folder for what is there. Raises what makes no sense."""


class Promote(Order):
    """Make a version stable: it answers all requests that name no version."""

    verb = "promote"
    version: Annotated[Version, Field(examples=["2"])]
    judge: Judge | None = None
    """Take it back by itself where it breaks a condition."""

    @property
    def what(self) -> str:  # noqa: D102
        return f"promote {self.version}{_judged(self.judge)}"

    def step(self, store: TrafficStore, name: str) -> Step:  # noqa: D102
        return Step(transitions.promote(self.version, available=store.versions(name), judge=self.judge), self.why)


class StartCanary(Order):
    """Give a version a share of the requests that name no version, or end that."""

    verb = "canary"
    version: Annotated[Version | None, Field(examples=["2"])] = None
    """The candidate; null ends the canary."""
    percent: Percent = 10.0
    """Its share, above 0, at most 100."""
    sticky: Annotated[Sticky | None, Field(examples=[{"header": "x-user"}])] = None
    """What tells callers apart, so that each sees one version."""
    judge: Judge | None = None
    """Promote it by itself, or end it where it breaks a condition."""

    @property
    def what(self) -> str:  # noqa: D102
        if self.version is None:
            return "end the canary"
        by = ""
        if self.sticky is not None:
            kind, name = next(iter(self.sticky.model_dump(exclude_none=True).items()))
            by = f", by {kind} {name}"
        return f"canary {self.version} at {self.percent:g} %{by}{_judged(self.judge)}"

    def step(self, store: TrafficStore, name: str) -> Step:  # noqa: D102
        available = store.versions(name)
        canary = transitions.canary(self.version, self.percent, self.sticky, available=available, judge=self.judge)
        return Step(canary, self.why)


class StartShadow(Order):
    """Give a version copies of live requests and compare its answers, or end that."""

    verb = "shadow"
    version: Annotated[Version | None, Field(examples=["2"])] = None
    """The version; null ends the shadow."""
    percent: Percent = 100.0
    """Share of the requests that are copied, above 0, at most 100."""
    judge: Judge | None = None
    """Promote it by itself, or end it where it breaks a condition."""

    @property
    def what(self) -> str:  # noqa: D102
        if self.version is None:
            return "end the shadow"
        return f"shadow {self.version} at {self.percent:g} %{_judged(self.judge)}"

    def step(self, store: TrafficStore, name: str) -> Step:  # noqa: D102
        return Step(
            transitions.shadow(self.version, self.percent, available=store.versions(name), judge=self.judge), self.why
        )


class SetLabel(Order):
    """Point a label at a version, or remove it."""

    verb = "label"
    label: Annotated[str, Field(examples=["blue"])]
    """Requests reach it at /v1/models/<model>/labels/<label>:predict."""
    version: Annotated[Version | None, Field(examples=["2"])] = None
    """The version; null removes the label."""

    @property
    def what(self) -> str:  # noqa: D102
        return f"remove label {self.label}" if self.version is None else f"label {self.version} as {self.label}"

    def step(self, store: TrafficStore, name: str) -> Step:  # noqa: D102
        return Step(transitions.label(self.label, self.version, available=store.versions(name)), self.why)


class Rollback(Order):
    """End the canary, or else go back to the version that was stable before; every trial ends with it."""

    verb = "rollback"
    anyway = True

    def said(self, before: Traffic, after: Traffic) -> str:
        """Say it for the history: from what to what."""
        return f"rollback: {transitions.describe(before, after)}"

    def step(self, store: TrafficStore, name: str) -> Step:
        """Pass over versions that can't serve; the notes have the reasons."""
        now, earlier, available = store.read(name, anyway=True), store.earlier(name), store.usable(name)
        notes: list[str] = []

        def can_serve(version: str) -> bool:
            reason = unfit(store.root, name, version, store.state_dir)
            if reason:
                notes.append(f"version {version} is passed over: {reason}")
                available.remove(version)
            return not reason

        while now.stable is None and available and not can_serve(available[-1]):
            pass  # none of these was the version that serves
        while True:
            transition = transitions.rollback(available=tuple(available), earlier=earlier)
            try:
                back = transition(now).stable
            except InvalidRequest as error:
                raise InvalidRequest("; ".join((error.message, *notes))) from None
            if back in (None, now.stable) or can_serve(back):
                return Step(transition, "; ".join(filter(None, (self.why, *notes))), tuple(notes))


class Unload(Order):
    """Serve nothing of a model, and hold no memory for it."""

    verb = "unload"

    def step(self, store: TrafficStore, name: str) -> Step:  # noqa: D102
        return Step(transitions.unload, self.why)


class Load(Order):
    """Serve an unloaded model again."""

    verb = "load"

    def step(self, store: TrafficStore, name: str) -> Step:  # noqa: D102
        return Step(transitions.load, self.why)


class KeepLoaded(Order):
    """Choose which versions stay loaded besides those with a role."""

    verb = "keep"
    keep: Annotated[Keep, Field(examples=[{"latest": 2}])]
    """"all", {"latest": 2}, or a list of versions."""

    @property
    def what(self) -> str:  # noqa: D102
        if isinstance(self.keep, Latest):
            return f"keep the latest {self.keep.latest}"
        return f"keep {self.keep if isinstance(self.keep, str) else ', '.join(self.keep)}"

    def step(self, store: TrafficStore, name: str) -> Step:  # noqa: D102
        return Step(transitions.keep(self.keep, available=store.versions(name)), self.why)


ORDERS: tuple[type[Order], ...] = (
    Promote,
    StartCanary,
    StartShadow,
    SetLabel,
    Rollback,
    Unload,
    Load,
    KeepLoaded,
)


def _judged(judge: Judge | None) -> str:
    if judge is None:
        return ""
    ends = []
    if judge.after_s is not None:
        ends.append(f"{judge.after_s:g} s")
    if judge.rows is not None:
        ends.append(f"{judge.rows:,} rows")
    return f", judged after {' and '.join(ends)}"
