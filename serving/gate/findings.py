"""What the gate asks of its process, and what that finds: JSON on the pipes between them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from serving.engine.batching import Independence
from serving.engine.signature import Signature
from serving.gate.report import Check, Figures

ROWS = "independent rows"
"""The check that refuses nothing: in doubt, requests run alone."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one version may take while it is looked at; bytes and seconds."""

    memory_bytes: int | None = None
    """None: 2 GiB and six times its files, and at most three quarters of what the machine has left."""
    cpu_s: int = 300
    wall_s: float = 120.0
    max_batch_rows: int = 512
    extension_ops: bool = False
    """Whether operators of onnxruntime-extensions are allowed."""


class Task(BaseModel):
    """One version to look at, with all that the gate's process is told."""

    folder: Path
    size: int
    """Bytes of its files."""
    limits: Limits
    measure_only: bool = False
    """Only load and measure it: it serves already."""
    prepare_in: Path | None = None
    """An empty folder that gets the prepared form."""


class Findings(BaseModel):
    """What came of it. A version without a signature or with reasons is refused."""

    checks: list[Check] = []
    reasons: list[str] = []
    signature: Signature | None = None
    figures: Figures | None = None
    independence: Independence | None = None
    extensions: list[str] = []
    """Its operators of onnxruntime-extensions."""
