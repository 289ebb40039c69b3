"""Who gets a model's traffic: the document in `traffic.json`, and what it means for versions and requests.

All of it is pure: `transitions` says what may change a document, and `traffic_store` keeps it on disk.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from serving.documented import Documented
from serving.errors import InvalidRequest, NotReady

TRAFFIC_FILE = "traffic.json"

RESERVED = frozenset({"stable", "canary", "shadow", "latest"})
"""Labels that follow the roles by themselves, so nobody can set them."""
MOST_LABELS = 100

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_TOKEN = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]{1,128}")


def _label(name: str) -> str:
    if name in RESERVED:
        raise ValueError(f"{name!r} follows the role of that name by itself: choose another label")
    if not _LABEL.fullmatch(name):
        raise ValueError("a label is letters, digits, dot, dash and underscore, 63 at most, and starts with the former")
    return name


def _header(name: str) -> str:
    name = name.lower()
    if not _TOKEN.fullmatch(name):
        raise ValueError("should be the name of an HTTP header, such as x-user")
    return name


Version: TypeAlias = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,17}$")]
Percent: TypeAlias = Annotated[float, Field(gt=0, le=100)]


class _Frozen(Documented):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Sticky(_Frozen):
    """What tells one caller from another: a request header, or the value of a feature in the first row."""

    header: Annotated[str, AfterValidator(_header)] | None = None
    """Name of an HTTP header (gRPC: metadata key)."""
    feature: Annotated[str, Field(min_length=1)] | None = None
    """Name of a feature of the stable version."""

    @model_validator(mode="after")
    def _one(self) -> Sticky:
        if (self.header is None) == (self.feature is None):
            raise ValueError("exactly one of header and feature")
        return self


class Canary(_Frozen):
    """A candidate that answers a share of the requests that name no version."""

    version: Version
    percent: Percent
    """Share of requests, above 0, at most 100."""
    sticky: Sticky | None = None
    """Decides by caller, so that each sees one version; without it, request by request."""


class Shadow(_Frozen):
    """A version that gets copies of live requests, and whose answers are only compared."""

    version: Version
    percent: Percent = 100.0
    """Share of requests that are copied, above 0, at most 100."""


class Judge(_Frozen):
    """When, and on what conditions, a change is made final; where one is broken it is taken back."""

    after_s: Annotated[float, Field(gt=0)] | None = None
    """Seconds to watch, in which it is served and asked."""
    rows: Annotated[int, Field(gt=0)] | None = None
    """Rows that the version must have answered."""
    error_rate: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Greatest share of predictions that may fail, 0 to 1; chance is allowed for."""
    latency_ratio: Annotated[float, Field(gt=0)] | None = None
    """Greatest mean seconds a prediction, as a multiple of those of the version that it is compared with."""
    agreement: Annotated[float, Field(ge=0, le=1)] | None = None
    """Least share of rows with the same label as stable, 0 to 1; a canary gets copies of stable's requests for it."""

    accuracy_loss: Annotated[float, Field(ge=0, le=1)] | None = None
    """Most that its share of right labels may lie below stable's, 0 to 1, by the true outcomes that callers report; of
    numbers, that its mean absolute error may lie above stable's, as a share of `largest_error` in model.toml."""

    @model_validator(mode="after")
    def _ends(self) -> Judge:
        if self.after_s is None and self.rows is None:
            raise ValueError("after_s or rows must say when to decide")
        return self


class Latest(_Frozen):
    """Keep the highest versions loaded."""

    latest: Annotated[int, Field(ge=1, le=1000)]


# The literal is last: generated clients take what comes behind one in a union for unreachable.
Keep: TypeAlias = Latest | Annotated[tuple[Version, ...], Field(min_length=1, strict=False)] | Literal["all"]


class Traffic(_Frozen):
    """The whole of `traffic.json`; the defaults are what a model without the file has."""

    generation: Annotated[int, Field(ge=0)] = 0
    """Grows by one with each change."""
    stable: Version | None = None
    """Answers requests that name no version; none: the highest version that can serve."""
    previous: Version | None = None
    """Was stable before: where `rollback` goes."""
    canary: Canary | None = None
    shadow: Shadow | None = None
    labels: Annotated[dict[Annotated[str, AfterValidator(_label)], Version], Field(max_length=MOST_LABELS)] = Field({})
    """Names for versions: /v1/models/<model>/labels/<label>:predict."""
    keep: Keep = Latest(latest=2)
    """Which versions stay loaded besides those with a role: "all", {"latest": 2}, or a list."""
    unloaded: bool = False
    """Serve nothing, and hold no memory."""
    judge: Judge | None = None
    """Decides by itself whether the last change stays."""
    since: Annotated[float, Field(ge=0)] = 0.0
    """Unix time of the last change."""

    @model_validator(mode="after")
    def _roles_differ(self) -> Traffic:
        if self.canary is not None:
            if self.stable is None:
                raise ValueError("canary: stable must name the version that gets the rest of the traffic")
            if self.canary.version == self.stable:
                raise ValueError("canary.version: is stable's: a version can't be compared with itself")
            if self.shadow is not None and self.shadow.version == self.canary.version:
                raise ValueError("shadow.version: is canary's: a version answers or is compared, not both")
        if self.shadow is not None and self.shadow.version == self.stable:
            raise ValueError("shadow.version: is stable's: a version can't be compared with itself")
        return self

    @model_validator(mode="after")
    def _judged(self) -> Traffic:
        judge, all_to_canary = self.judge, self.canary is not None and self.canary.percent == 100
        if judge is None:
            return self
        if judge.latency_ratio is not None and all_to_canary:
            raise ValueError("judge.latency_ratio: a canary of 100 % leaves stable nothing to compare it with")
        if judge.agreement is not None and self.canary is None and self.shadow is None:
            raise ValueError("judge.agreement: only a canary or a shadow answers the same rows as stable")
        if judge.agreement is not None and self.canary is not None and self.shadow is not None:
            raise ValueError("judge.agreement: end the shadow first, for the canary must be compared in its place")
        if judge.accuracy_loss is not None and (self.canary is None or all_to_canary):
            raise ValueError("judge.accuracy_loss: only a canary of less than 100 % answers callers beside stable")
        return self

    def document(self) -> dict[str, Any]:
        """Return it as JSON has it; what is not set is left out."""
        return self.model_dump(mode="json", exclude_none=True)

    def text(self) -> bytes:
        """Write it as `traffic.json` has it."""
        return json.dumps(self.document(), indent=1).encode() + b"\n"

    def same(self, other: Traffic) -> bool:
        """Tell whether both say the same, whenever and as whatever generation it was said."""
        unsaid = {"generation": 0, "since": 0.0}
        return self.model_copy(update=unsaid) == other.model_copy(update=unsaid)


_SENTENCES = {
    "keep": 'should be "all", {"latest": 2} or a list of versions such as ["1", "2"]',
    "canary.sticky": 'should be {"header": "x-user"} or {"feature": "user"}',
}
_VERSION_FIELDS = ("version", "stable", "previous")


def parse(text: bytes | str) -> Traffic:
    """Read a document. Raises InvalidRequest with a sentence for every bad field, by name."""
    try:
        return Traffic.model_validate_json(text)
    except ValidationError as error:
        found = dict.fromkeys(sentence(e) for e in error.errors(include_url=False))
        raise InvalidRequest(f"traffic.json: {'; '.join(found)}"[:1000]) from None


def sentence(error: ErrorDetails) -> str:
    """Say what is wrong with a field, by its name."""
    place = ".".join(str(part) for part in error["loc"])
    for field, sentence in _SENTENCES.items():
        if place == field or place.startswith(f"{field}."):
            return f"{field}: {sentence}"
    if error["type"] == "json_invalid":
        return f"is not JSON: {error['msg'].removeprefix('Invalid JSON: ')}"
    if error["type"] == "extra_forbidden":
        return f"{place}: there is no such field"
    if error["type"] == "missing":
        return f"{place}: is missing"
    if place.split(".")[-1] in _VERSION_FIELDS or (place.startswith("labels.") and not place.endswith("[key]")):
        return f'{place}: should be a version such as "3"'
    text = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{place.removesuffix('.[key]')}: {text}" if place else text


@dataclass(frozen=True, slots=True)
class Roles:
    """What each version of a model does. Nothing at all where the model is unloaded."""

    stable: str | None
    canary: Canary | None
    shadow: Shadow | None
    labels: dict[str, str]
    """The document's, and `stable`, `canary` and `latest`, which follow the roles."""
    loaded: tuple[str, ...]
    """In ascending order."""
    problems: tuple[str, ...] = ()
    """What the document names and is not there, a sentence each; the rest is served without it."""


NOTHING = Roles(None, None, None, {}, ())


def current(traffic: Traffic, available: Collection[str]) -> str | None:
    """Return the version that is stable, named or by being the highest; None where there is no version."""
    return traffic.stable or max(available, key=int, default=None)


def without(held: Collection[str], traffic: Traffic, available: Collection[str]) -> Traffic:
    """Return a document that asks for none of `held` as stable: the version before it answers in its place.

    That is `previous`, or else the next lower one. Where stable is not held, or nothing is before it, it comes back as
    it is.

    >>> without({"3"}, Traffic(stable="3", previous="1"), ["1", "2", "3"]).stable
    '1'
    """
    if traffic.stable is None or traffic.stable not in held:
        return traffic
    stable = int(traffic.stable)
    free = [version for version in available if version not in held]
    lower = [version for version in free if int(version) < stable]
    instead = traffic.previous if traffic.previous in free else max(lower, key=int, default=None)
    if instead is None:
        return traffic
    roles = {"canary": traffic.canary, "shadow": traffic.shadow}
    beside = {name: None if role is None or role.version == instead else role for name, role in roles.items()}
    return traffic.model_copy(update={"stable": instead, "judge": None, **beside})


def plan(traffic: Traffic, available: Collection[str]) -> Roles:
    """Say what each of the versions that can serve does.

    A canary, shadow, label or kept version that is not there is left out and named in `problems`. Raises NotReady
    where stable is not there: another version must never answer in its place unasked.
    """
    if traffic.unloaded:
        return NOTHING
    stable = current(traffic, available)
    if stable is None:
        raise NotReady("no version of it can serve")
    ordered = sorted(available, key=int)
    known = ", ".join(ordered) or "none"
    if stable not in available:
        raise NotReady(f"stable is version {stable}, which can't serve; versions that can: {known[:300]}")
    problems: list[str] = []

    def there(role: str, version: str) -> bool:
        if version not in available:
            problems.append(f"{role} is version {version}, which can't serve; versions that can: {known[:300]}")
        return version in available

    share = traffic.canary if traffic.canary and there("canary", traffic.canary.version) else None
    copy = traffic.shadow if traffic.shadow and there("shadow", traffic.shadow.version) else None
    if share is not None and copy is None and traffic.judge is not None and traffic.judge.agreement is not None:
        copy = Shadow(version=share.version)
    labels = {name: v for name, v in traffic.labels.items() if there(f"label {name}", v)}
    if isinstance(traffic.keep, Latest):
        kept = ordered[-traffic.keep.latest :]
    elif traffic.keep == "all":
        kept = ordered
    else:
        kept = [v for v in traffic.keep if there("a version to keep", v)]
    loaded = {stable, *labels.values(), *kept}
    loaded |= {role.version for role in (share, copy) if role is not None}
    whole = tuple(sorted(loaded, key=int))
    labels |= {"latest": whole[-1], "stable": stable}
    if share is not None:
        labels["canary"] = share.version
    return Roles(stable, share, copy, labels, whole, tuple(problems))


_WHOLE = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15
# Multiples of the golden ratio fall evenly into the unit interval, however few are taken (Weyl's sequence). Processes
# start apart, so that they do not all turn at once.
_turns = itertools.count(random.getrandbits(32))


def choose(key: bytes | None, percent: float) -> bool:
    """Tell whether a request is in a share of `percent`, 0 to 100.

    key: the same key gets the same answer, in every process, and raising the share only adds keys; None spreads
    evenly, request by request.

    >>> choose(b"ann", 0), choose(b"ann", 100), choose(None, 100)
    (False, True, True)
    """
    if key is None:
        point = next(_turns) * _GOLDEN % _WHOLE
    else:
        point = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
    return point < percent / 100 * _WHOLE
