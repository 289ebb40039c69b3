"""Predictions, true outcomes, and both joined: an SQLite file in the state folder, which all workers write to.

It survives restarts, but for what a worker had yet to write when it was killed: a second's predictions. It must not
lie on a network file system, where SQLite's locks do not hold.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from serving.engine.limits import Feedback
from serving.monitoring import quality

_SCHEMA = """
create table if not exists predictions (
    id integer primary key, model text, key text, row integer, version text, content text, label text, scores blob,
    value real, unique (model, key, row) on conflict replace);
create index if not exists predictions_of on predictions (model);
create table if not exists outcomes (
    id integer primary key, model text, key text, row integer, outcome text,
    unique (model, key, row) on conflict replace);
create index if not exists outcomes_of on outcomes (model);
create table if not exists joined (
    id integer primary key, model text, version text, content text, label text, scores blob, value real, outcome text);
create index if not exists joined_of on joined (model, version, content);
"""
_AT_ONCE = 10_000
_DEFAULT = Feedback()

Judged: TypeAlias = tuple[str | None, bytes | None, float | None, str]
"""Of a joined row: label, scores as float32, value, outcome."""


class Kept(NamedTuple):
    """One row predicted. key: what the caller calls the request; row: which of its rows. content: of the version."""

    model: str
    key: str
    row: int
    version: str
    content: str
    label: str | None
    scores: bytes | None
    value: float | None


class FeedbackStore:
    """One file; every method blocks on the disk and raises sqlite3.Error. For one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, timeout=5, isolation_level=None, check_same_thread=False)
        self._connection.execute("pragma journal_mode=wal")
        self._connection.execute("pragma synchronous=normal")
        self._connection.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._connection.execute("begin immediate")
        try:
            yield self._connection
            self._connection.execute("commit")
        except BaseException:
            self._connection.execute("rollback")
            raise

    def keep(self, rows: Iterable[Kept], most: dict[str, int]) -> None:
        """Write predictions down; of each model the last `most`."""
        with self._transaction() as connection:
            connection.executemany(
                "insert into predictions (model, key, row, version, content, label, scores, value)"
                " values (?, ?, ?, ?, ?, ?, ?, ?)",
                rows,
            )
            for model, number in most.items():
                _prune(connection, "predictions", model, number)

    def take(self, model: str, outcomes: Iterable[tuple[str, int, str]], most: int) -> int:
        """Write outcomes down, by key and row; return how many older ones made room, unmatched."""
        with self._transaction() as connection:
            connection.executemany(
                "insert into outcomes (model, key, row, outcome) values (?, ?, ?, ?)",
                [(model, *outcome) for outcome in outcomes],
            )
            return _prune(connection, "outcomes", model, most)

    def join(self, settings: dict[str, Feedback]) -> list[tuple[str, str, int, float]]:
        """Join outcomes with predictions; return model, version, how many, and how many of them were right, of each.

        settings: by model.
        """
        with self._transaction() as connection:
            found = connection.execute(
                "select o.id, p.id, p.model, p.version, p.content, p.label, p.scores, p.value, o.outcome"
                " from outcomes o join predictions p using (model, key, row) order by o.id limit ?",
                (_AT_ONCE,),
            ).fetchall()
            connection.executemany("insert into joined values (null, ?, ?, ?, ?, ?, ?, ?)", [row[2:] for row in found])
            connection.executemany("delete from outcomes where id = ?", [row[:1] for row in found])
            connection.executemany("delete from predictions where id = ?", [row[1:2] for row in found])
            counts: dict[tuple[str, str], list[Any]] = {}
            for _, _, model, version, _, label, _, value, outcome in found:
                count = counts.setdefault((model, version), [0, 0.0])
                count[0] += 1
                count[1] += label == outcome
                if label is None and (most := settings.get(model, _DEFAULT).largest_error) is not None:
                    count[1] += max(0.0, 1 - quality.error(value, outcome) / most)
            for model, version in counts:
                connection.execute(
                    "delete from joined where model = ?1 and version = ?2 and id <= (select id from joined"
                    " where model = ?1 and version = ?2 order by id desc limit 1 offset ?3)",
                    (model, version, settings.get(model, _DEFAULT).window),
                )
        return [(model, version, number, right) for (model, version), (number, right) in counts.items()]

    def judged(self, model: str, version: str, content: str) -> list[Judged]:
        """Return what is joined of a version, the oldest first."""
        return self._connection.execute(
            "select label, scores, value, outcome from joined where model = ? and version = ? and content = ?"
            " order by id",
            (model, version, content),
        ).fetchall()

    def kept(self) -> set[tuple[str, str]]:
        """Return the versions of which something is joined and, with version "", models of which something waits."""
        found = self._connection.execute(
            "select distinct model, version from joined union select distinct model, '' from predictions"
            " union select distinct model, '' from outcomes"
        )
        return set(found.fetchall())

    def forget(self, model: str, version: str) -> None:
        """Remove what is joined of a version; with version "", all that waits of a model."""
        with self._transaction() as connection:
            connection.execute("delete from joined where model = ? and version = ?", (model, version))
            if not version:
                connection.execute("delete from predictions where model = ?", (model,))
                connection.execute("delete from outcomes where model = ?", (model,))

    def waiting(self, model: str) -> tuple[int, int]:
        """Return how many predictions of a model wait for their outcomes, and outcomes for their predictions."""
        found: Any = self._connection.execute(
            "select (select count(*) from predictions where model = ?1),"
            " (select count(*) from outcomes where model = ?1)",
            (model,),
        ).fetchone()
        return found[0], found[1]


def _prune(connection: sqlite3.Connection, table: str, model: str, most: int) -> int:
    return connection.execute(
        f"delete from {table} where model = ?1 and id <="  # noqa: S608  one of two names of ours
        f" (select id from {table} where model = ?1 order by id desc limit 1 offset ?2)",
        (model, most),
    ).rowcount
