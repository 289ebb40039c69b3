"""What is asked for and said of jobs over HTTP."""

from __future__ import annotations

from datetime import datetime
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import ConfigDict, Field, model_validator

from serving.bulk.formats import MEDIA_TYPES, SUFFIXES
from serving.documented import Documented

Format: TypeAlias = Literal["csv", "ndjson", "parquet"]
State: TypeAlias = Literal["queued", "running", "succeeded", "failed", "cancelled"]

_KINDS: dict[str, Format] = {"csv": "csv", "ndjson": "ndjson", "parquet": "parquet"}
TYPES: dict[str, Format] = {name: _KINDS[kind] for name, kind in MEDIA_TYPES.items() if kind in _KINDS}
"""Media types of what may be sent."""


class Asked(Documented):
    """What is to be predicted with, and written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Annotated[str, Field(min_length=1, max_length=256, description="Name of the model.")]
    version: Annotated[
        Annotated[str, Field(max_length=32)] | None,
        Field(description="Version of it; without it the one that answers now."),
    ] = None
    label: Annotated[
        Annotated[str, Field(max_length=256)] | None, Field(description="Label of the version, in place of its number.")
    ] = None
    output: Annotated[Format, Field(description="Format of the result.")] = "csv"

    @model_validator(mode="after")
    def _one_version(self) -> Asked:
        if self.version is not None and self.label is not None:
            raise ValueError("give a version or a label, not both")
        return self


class JobRequest(Asked):
    """A job whose rows are in the request, or where the server finds them."""

    rows: list[Any] | None = None
    """The rows, as `instances` of a prediction."""
    url: Annotated[str, Field(max_length=4096)] | None = None
    """Where they are: s3://, gs://, az://, file:// or a whole path, below what the server may read."""
    input: Format | None = None
    """Format of what is at the URL; without it by its ending."""

    @model_validator(mode="after")
    def _one_input(self) -> JobRequest:
        if (self.rows is None) == (self.url is None):
            raise ValueError("give rows or a url, one of the two; a file is sent as the body itself, as text/csv")
        if self.rows is not None and (not self.rows or self.input is not None):
            raise ValueError("rows should have at least one, and no input format")
        if self.url is not None and self.format is None:
            raise ValueError("input: the url has no ending that says it: give csv, ndjson or parquet")
        return self

    @property
    def format(self) -> Format | None:
        """The format of the input."""
        if self.rows is not None or self.input is not None:
            return self.input or "ndjson"
        return _KINDS.get(SUFFIXES.get(PurePosixPath(self.url or "").suffix.lower(), ""))


class JobDocument(Documented):
    """A job as it is now."""

    id: str
    state: State
    error: str
    """Why it failed or, while it is active, what it waits for; empty where nothing is wrong."""
    model: str
    version: str
    """The version that predicts, the same for all rows."""
    url: str | None
    """Where the input is; null where it was sent."""
    input: Format
    output: Format
    rows_good: int
    rows_bad: int
    progress: float
    """How much of the input is done, 0 to 1."""
    rows_per_s: float | None
    seconds_left: float | None
    """At the rate so far; null where nothing is known yet, or it has ended."""
    result_bytes: int | None
    """Size of the result; null until there is one."""
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class JobList(Documented):
    """Some jobs of who asks, the latest first."""

    jobs: list[JobDocument]
    total: int
    """How many there are, whatever was skipped."""
