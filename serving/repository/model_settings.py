"""Settings of one model: `models/<name>/model.toml`, and Triton's `config.pbtxt` beside it.

Where both speak of the same, model.toml has the word. A change is taken like one of traffic. A file that can't be read
is a problem with its name, and changes nothing that serves.
"""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import ConfigDict, Field, ValidationError

from serving.documented import Documented
from serving.engine.batching import NOTHING_OF_ITS_OWN, Batching, Independence
from serving.engine.limits import LEAST_MODEL_MEMORY, CacheSize, Drift, Feedback, Limits
from serving.engine.providers import Provider, fault
from serving.errors import InvalidRequest, ServingError
from serving.linux.files import Stamp, stamp
from serving.repository import triton_config
from serving.repository.traffic import Keep, Traffic
from serving.repository.triton_config import CONFIG_FILE, TritonConfig

log = logging.getLogger("serving.settings")

SETTINGS_FILE = "model.toml"
_MOST_BYTES = 1024 * 1024

Facts: TypeAlias = tuple[Stamp, ...]


class _Strict(Documented):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class BatchingTable(_Strict):
    """`[batching]` of model.toml."""

    enabled: bool | None = None
    """Run requests of different callers together where the model's rows are independent; false runs each alone."""
    max_batch_rows: int | None = Field(None, ge=1)
    """Rows that run together; a larger request runs alone."""
    max_delay_ms: float | None = Field(None, ge=0, le=1000)
    """Milliseconds that the model waits for company when it is idle; 0 never waits."""
    allow_dynamic_quantization: bool = False
    """Run them together too where all that rows share is a scale that the model takes over the batch: answers then
    differ a little with who asks at the same time."""


class LimitsTable(_Strict):
    """`[limits]` of model.toml."""

    max_queued_rows: int | None = Field(None, ge=1)
    """Rows that may wait; beyond it the answer is 429."""
    deadline_s: float | None = Field(None, gt=0, le=86400)
    """Seconds after which a request that still waits is answered 504, where its caller asks for no less."""
    memory_bytes: int | None = Field(None, ge=LEAST_MODEL_MEMORY)
    """Most that runs of this model and their answers may take at a time, beside its weights, in bytes."""


class ExecutionTable(_Strict):
    """`[execution]` of model.toml."""

    instances: int | None = Field(None, ge=1, le=64)
    """Batches that run at the same time, in each worker."""
    threads: int | None = Field(None, ge=1, le=1024)
    """Threads of one run."""
    warm_rows: int | None = Field(None, ge=1, le=1_000_000)
    """The largest batch that is tried before the model serves, whatever it takes."""
    providers: tuple[Provider, ...] | None = Field(None, strict=False, max_length=8)
    """What runs the model beside the processor, in order."""


class CaptureTable(_Strict):
    """`[capture]` of model.toml."""

    share: float | None = Field(None, ge=0, le=1)
    """Share of predictions that are kept, where the server has a folder for them; 0 keeps none."""


class PrivacyTable(_Strict):
    """`[privacy]` of model.toml."""

    sensitive: tuple[str, ...] | None = Field(None, strict=False, max_length=10_000)
    """Names of features that are left out of what is kept, beside those that the signature marks."""


class AccessTable(_Strict):
    """`[access]` of model.toml."""

    predict: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] | None = Field(
        None, strict=False, min_length=1, max_length=1000
    )
    """Names of the keys, and of tokens as `jwt:<subject>`, that may predict; without it, all with the scope."""


class SettingsDocument(_Strict):
    """The whole of model.toml."""

    batching: BatchingTable = BatchingTable()
    limits: LimitsTable = LimitsTable()
    execution: ExecutionTable = ExecutionTable()
    cache: CacheSize | None = None
    drift: Drift | None = None
    feedback: Feedback | None = None
    capture: CaptureTable = CaptureTable()
    privacy: PrivacyTable = PrivacyTable()
    access: AccessTable = AccessTable()


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """What was set for one model. off: who has switched batching off, empty where nobody has. own: all that a worker
    goes by.
    """

    off: str = ""
    allow_dynamic_quantization: bool = False
    own: Limits = NOTHING_OF_ITS_OWN
    keep: Keep | None = None

    def shown(self) -> dict[str, Any]:
        """Return what was set, by name, as JSON values that people understand."""
        own = self.own
        named: dict[str, Any] = {
            "batching": self.off,
            "allow_dynamic_quantization": self.allow_dynamic_quantization,
            **own.model_dump(
                exclude_unset=True, exclude={"providers", "cache", "drift", "feedback", "callers", "sensitive"}
            ),
            "providers": [provider.name for provider in own.providers],
            **{
                name: str(getattr(own, name)) for name in ("cache", "drift", "feedback") if name in own.model_fields_set
            },
            "sensitive": sorted(own.sensitive),
        }
        return {name: value for name, value in named.items() if value not in ("", False, [])} | (
            {} if own.callers is None else {"predict": sorted(own.callers)}
        )

    def decide(self, independence: Independence) -> Batching:
        """Say how the requests of a version run, by what was proved of its rows."""
        together = independence.proved or (independence.quantised and self.allow_dynamic_quantization)
        reason = "" if together else independence.reason
        if self.off:
            together, reason = False, self.off
        return Batching(together, reason, self.own)

    def traffic(self, asked: Traffic, available: Collection[str]) -> Traffic:
        """Return what is asked for with the versions to keep of config.pbtxt, where nobody has asked for others.

        Of a list the highest answers, where stable is not named, as in Triton.
        """
        if self.keep is None or asked.keep != Traffic().keep:
            return asked
        listed = self.keep if isinstance(self.keep, tuple) else ()
        known = [version for version in listed if version in available] or listed
        stable = asked.stable or max(known, key=int, default=None)
        return asked.model_copy(update={"keep": self.keep, "stable": stable})


def in_words(shown: dict[str, Any]) -> str:
    """Put what `ModelSettings.shown` returned in a line.

    >>> in_words({"threads": 2, "predict": ["ci", "web"]})
    'threads 2, predict ci and web'
    """
    said = {
        name: " and ".join(value) or "nobody" if isinstance(value, list) else value for name, value in shown.items()
    }
    return ", ".join(f"{name} {value}" for name, value in said.items())


def parse(text: str) -> SettingsDocument:
    """Read model.toml. Raises InvalidRequest with a sentence for each bad field, by name.

    >>> parse("[batching]\\nenabled = false").batching.enabled
    False
    """
    try:
        return SettingsDocument.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise InvalidRequest(f"{SETTINGS_FILE}: is not TOML: {error}"[:500]) from None
    except ValidationError as error:
        said = [_sentence(".".join(map(str, e["loc"])), e["type"], e["msg"]) for e in error.errors(include_url=False)]
        raise InvalidRequest(f"{SETTINGS_FILE}: {'; '.join(said)}"[:1000]) from None


def _sentence(place: str, kind: str, text: str) -> str:
    if kind == "extra_forbidden":
        return f"{place}: there is no such setting"
    return f"{place}: {text.removeprefix('Input ').removeprefix('Value error, ')}"


def read(folder: Path) -> ModelSettings:
    """Read both files of a model. Raises InvalidRequest where one can't be read."""
    toml, triton = _text(folder / SETTINGS_FILE), _text(folder / CONFIG_FILE)
    document = parse(toml) if toml is not None else SettingsDocument()
    config = triton_config.parse(triton, folder.name) if triton is not None else TritonConfig(True, {}, None)
    batching, predict, sensitive = document.batching, document.access.predict, document.privacy.sensitive
    if wrong := fault(document.execution.providers or ()):
        raise InvalidRequest(f"{SETTINGS_FILE}: execution.providers: {wrong}")
    off = ""
    if batching.enabled is False:
        off = f"switched off in {SETTINGS_FILE}"
    elif batching.enabled is None and batching.max_batch_rows is None and not config.batched:
        off = f"max_batch_size is 0 in {CONFIG_FILE}"
    given = {
        "max_batch_rows": batching.max_batch_rows,
        "max_delay": None if batching.max_delay_ms is None else batching.max_delay_ms / 1000,
        **dict(document.limits),
        **dict(document.execution),
        "cache": document.cache,
        "drift": document.drift,
        "feedback": document.feedback,
        "callers": None if predict is None else frozenset(predict),
        "capture_share": document.capture.share,
        "sensitive": None if sensitive is None else frozenset(sensitive),
    }
    set_here = {name: value for name, value in given.items() if value is not None}
    own = Limits.model_validate(config.own | set_here)
    return ModelSettings(off, batching.allow_dynamic_quantization, own, config.keep)


class SettingsFiles:
    """Looks at the files of all models in a folder; those that have not changed are not read again."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seen: dict[str, tuple[Facts, ModelSettings, str]] = {}

    def look(self, names: Collection[str]) -> tuple[dict[str, ModelSettings], list[tuple[str, str]]]:
        """Return the settings of those that have any, and what is wrong with files, as name and sentence."""
        self._seen = {name: self._one(name) for name in sorted(names)}
        settings = {name: found for name, (_, found, _) in self._seen.items() if found != ModelSettings()}
        return settings, [(name, problem) for name, (_, _, problem) in self._seen.items() if problem]

    def _one(self, name: str) -> tuple[Facts, ModelSettings, str]:
        folder = self._root / name
        facts = tuple(stamp(folder / file) for file in (SETTINGS_FILE, CONFIG_FILE))
        before = self._seen.get(name)
        if before is not None and before[0] == facts:
            return before
        try:
            settings, problem = (read(folder) if any(facts) else ModelSettings()), ""
        except ServingError as error:
            if before is not None:
                settings, meanwhile = before[1], "what was set before goes on"
            else:  # nobody knows what it should say: one at a time is never wrong
                own = Limits(callers=_callers(folder), capture_share=0.0)
                settings, meanwhile = ModelSettings(off="its settings can't be read", own=own), "requests run alone"
            problem = f"{error.message} (until that is mended {meanwhile})"
            log.error("%s: %s", name, problem)
        else:
            if before is not None:
                log.info("%s: new settings: %s", name, settings)
        return facts, settings, problem


def _callers(folder: Path) -> frozenset[str] | None:
    """Return who may predict by settings that can't be read as a whole; nobody where they may say it, unreadably."""
    try:
        text = _text(folder / SETTINGS_FILE) or ""
        if "access" not in text:
            return None
        predict = AccessTable.model_validate(tomllib.loads(text).get("access", {})).predict
    except (ServingError, ValueError):
        return frozenset()
    return None if predict is None else frozenset(predict)


def _text(path: Path) -> str | None:
    """Return what a file says; None where there is none. Raises InvalidRequest."""
    try:
        with path.open("rb") as file:
            return file.read(_MOST_BYTES).decode()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidRequest(f"{path.name} can't be read: {why}") from None
