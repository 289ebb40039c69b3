"""What the gate asks of its process, and what that finds: JSON on the pipes between them."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from serving.engine.batching import Independence
from serving.engine.signature import Signature
from serving.gate.report import Check, Figures

PREPARED = "prepared form"
ROWS = "independent rows"
"""The check that refuses nothing: in doubt, requests run alone."""


class Task(BaseModel):
    """One version to look at, with all that the gate's process is told; bytes and seconds."""

    folder: Path
    extension_ops: bool = False
    """Operators of onnxruntime-extensions are allowed."""
    measure_only: bool = False
    """Only load and measure it: it serves already."""
    max_batch_rows: int = 512
    prepare_in: Path | None = None
    """An empty folder that gets the prepared form."""
    memory_bytes: int
    file_bytes: int
    cpu_s: int
    wall_s: float


class Findings(BaseModel):
    """What came of it. A version without a signature or with reasons is refused."""

    checks: list[Check] = []
    reasons: list[str] = []
    signature: Signature | None = None
    figures: Figures | None = None
    prepared: bool = False
    """Whether the prepared form was seen to give the model's answers."""
    independence: Independence | None = None
    extensions: list[str] = []
    """Its operators of onnxruntime-extensions."""
