"""What the gate found of a version: one document for the disk, the API and people."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict

from serving.engine.batching import Independence
from serving.errors import ServingError

REPORT_FILE = "gate.json"
PREPARED = "prepared form"

Outcome: TypeAlias = Literal["passed", "warned", "refused", "skipped"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="null")


class Check(_Frozen):
    """One thing that was looked at, in the order of looking."""

    name: str
    outcome: Outcome
    detail: str = ""
    seconds: float = 0.0


class Figures(_Frozen):
    """What a version costs on this machine, with one thread; seconds are medians."""

    load_s: float
    row_s: float | None = None
    """One run of one row; None where the model takes no made-up rows."""
    batch_rows: int = 1
    batch_s: float | None = None
    """One run of `batch_rows` rows."""
    memory_bytes: int
    """Growth of the process that loaded and warmed it."""


class Report(_Frozen):
    """The gate's verdict on one version."""

    ok: bool
    content: str
    """`Manifest.content` of what was examined."""
    runtime: str
    """Version of onnxruntime that it was examined with."""
    time: float
    """Seconds since 1970."""
    reasons: tuple[str, ...] = ()
    """Why it is refused, each a sentence; empty where it passed."""
    breaking: tuple[str, ...] = ()
    """What callers of the serving version would find broken; part of `reasons` unless that was allowed."""
    checks: tuple[Check, ...] = ()
    independence: Independence | None = None
    """Whether its rows are independent, so that callers' requests may run together; None where it is refused."""
    size_bytes: int = 0
    figures: Figures | None = None
    beside: Figures | None = None
    """The same of the version that serves now, measured in the same minute."""
    extensions: tuple[str, ...] = ()
    """Its operators of onnxruntime-extensions: whether they are allowed is for each server to say."""

    @property
    def reason(self) -> str:
        """All reasons in a line."""
        return "; ".join(self.reasons)

    @property
    def prepared(self) -> bool:
        """Whether a prepared form was written, and seen to give the model's answers."""
        return any(check.name == PREPARED and check.outcome == "passed" for check in self.checks)

    def text(self) -> bytes:
        """Write it as JSON."""
        return self.model_dump_json(indent=2, exclude_none=True).encode() + b"\n"


class GateRefused(ServingError):
    """The gate says no; the report says why."""

    def __init__(self, report: Report) -> None:
        super().__init__(f"the gate refuses it: {report.reason}")
        self.report = report
