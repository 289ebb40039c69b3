"""The tables of jobs. Times are seconds since the epoch by the database's clock, the only one that decides anything."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Double, ForeignKey, Index, String, Text, UniqueConstraint
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.sql.functions import FunctionElement

from serving.jobs.documents import Format

ACTIVE = ("queued", "running")
ENDED = ("succeeded", "failed", "cancelled")
STATES = (*ACTIVE, *ENDED)

SPLIT, SCORE, PUBLISH = "split", "score", "publish"
"""Kinds of pieces: find the pieces of the input; predict the rows of one; make one result of them."""
WAITING, LEASED, DONE = "waiting", "leased", "done"


class now(FunctionElement[float]):
    """The time by the database's clock."""

    type = Double()
    inherit_cache = True


@compiles(now, "sqlite")
def _sqlite(*_: Any, **__: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _postgresql(*_: Any, **__: Any) -> str:
    # Not now(): that is when the transaction began, which may have waited for a lock since.
    return "extract(epoch from clock_timestamp())::float8"


class Base(DeclarativeBase):
    """Base of the tables."""


class Job(Base):
    """Rows to be predicted by one version of one model, and what has become of them."""

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("owner", "idempotency_key"),
        Index("jobs_of_owner", "owner", "created_at"),
        Index("jobs_by_state", "state", "created_at"),
    )

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    owner: Mapped[str] = mapped_column(String(256))
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    fingerprint: Mapped[str] = mapped_column(String(64))
    """SHA-256 of what was asked for: the same key with another one is a mistake."""
    model: Mapped[str] = mapped_column(String(256))
    version: Mapped[str] = mapped_column(String(32))
    url: Mapped[str | None] = mapped_column(Text)
    """Where the input is; None: it was sent, and is kept with the results."""
    identity: Mapped[str | None] = mapped_column(Text)
    """What tells the input from what may replace it: an ETag, or size and time of a file."""
    input_format: Mapped[Format] = mapped_column(String(16))
    output_format: Mapped[Format] = mapped_column(String(16))
    traceparent: Mapped[str | None] = mapped_column(String(55))
    """What the request that asked for it is part of."""
    state: Mapped[str] = mapped_column(String(16), default="queued")
    error: Mapped[str] = mapped_column(Text, default="")
    """Why it failed or, while it is active, what it waits for."""
    rows_good: Mapped[int] = mapped_column(BigInteger, default=0)
    rows_bad: Mapped[int] = mapped_column(BigInteger, default=0)
    size: Mapped[int] = mapped_column(BigInteger, default=0)
    """Of the input: bytes of text, rows of Parquet; 0 until it was looked at."""
    done: Mapped[int] = mapped_column(BigInteger, default=0)
    """How much of `size` is predicted."""
    result_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    tidied: Mapped[bool] = mapped_column(default=False)
    """Whether what only an active job needs is removed: its input, if that was sent, and its parts."""
    created_at: Mapped[float] = mapped_column(Double, default=now())
    started_at: Mapped[float | None] = mapped_column(Double)
    finished_at: Mapped[float | None] = mapped_column(Double)


class Piece(Base):
    """A part of a job's work, which one worker has at a time.

    Who claims it gets the next `token`. Parts are written under names with the token, and only who still has the last
    one can have the piece count as done: whatever a worker does that was taken for dead changes nothing.
    """

    __tablename__ = "job_pieces"
    __table_args__ = (Index("pieces_to_do", "state", "lease_until"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    start: Mapped[int] = mapped_column(BigInteger, default=0)
    end: Mapped[int] = mapped_column(BigInteger, default=0)
    """Bytes of text from `start` up to `end`, or rows of a Parquet."""
    line: Mapped[int] = mapped_column(BigInteger, default=1)
    """Number of the first line, from 1."""
    bad: Mapped[int] = mapped_column(BigInteger, default=0)
    """How many of its rows were bad, once it is done."""
    state: Mapped[str] = mapped_column(String(16), default=WAITING)
    token: Mapped[int] = mapped_column(BigInteger, default=0)
    lease_until: Mapped[float] = mapped_column(Double, default=0.0)
    """Until when it is somebody's; of one that waits, from when on it may be claimed."""
