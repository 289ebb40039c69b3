"""Scores captured requests again, by any version, and says how its answers differ from those that were given."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import parquet

from serving.bulk.arrow import ArrowReader
from serving.bulk.batch import BadRow, Piece, Position
from serving.bulk.columns import arrow_type
from serving.bulk.scoring import Answered, locally
from serving.capture.capture import METADATA_KEY
from serving.engine.limits import Limits
from serving.engine.model import load
from serving.engine.signature import Described
from serving.errors import InvalidRequest, ModelNotFound

_CHUNK = 512
"""Rows that are answered at a time."""
_DISTINCT = 10
"""Numbers that differ more often than this are put in quarters."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers to rows. labels: one a row, None where the model gives none. scores: [rows, columns], NaN where a row was
    refused; columns: what each is the score of."""

    labels: list[Any] | None
    scores: NDArray[np.float64] | None
    columns: tuple[str, ...]

    def of(self, row: int) -> dict[str, Any]:
        """Return the answer to a row as JSON values."""
        scores = {} if self.scores is None else dict(zip(self.columns, self.scores[row].tolist(), strict=True))
        return ({} if self.labels is None else {"label": self.labels[row]}) | scores


def answers(outputs: Mapping[str, list[Any]], facts: Mapping[str, Any]) -> Answers:
    """Read outputs, each a list of one value a row, by the roles that `facts` name: label, scores, classes."""
    label, scores, classes = facts["label"], facts["scores"], facts["classes"] or ()
    labels = None
    if label is not None:
        labels = outputs[label]
        if classes and isinstance(classes[0], str):  # an index into the classes
            known = dict(enumerate(classes))
            labels = [known.get(value, value) if isinstance(value, int) else value for value in labels]
    name = scores or next((name for name in outputs if name != label), None)
    if name is None:
        return Answers(labels, None, ())
    try:
        found = np.array(outputs[name], dtype=np.float64).reshape(len(outputs[name]), -1)
    except ValueError:  # texts, or rows of different shapes
        return Answers(labels, None, ())
    width = found.shape[1]
    columns = classes if len(classes) == width else (name,) if width == 1 else [f"{name}[{i}]" for i in range(width)]
    return Answers(labels, found, tuple(map(str, columns)))


class Version:
    """A version from the models folder, which scores rows. Raises ModelNotFound, ModelInvalid."""

    def __init__(self, folder: Path, threads: int) -> None:
        if not (folder / "model.onnx").is_file():
            raise ModelNotFound(f"there is no version {folder.name} of {folder.parent.name} in the models folder")
        self.name = folder.name
        session = load(folder / "model.onnx", limits=Limits(threads=threads, warm_rows=1))
        self.signature = session.signature
        described = Described(folder.parent.name, folder.name, session.signature)
        self._reader = ArrowReader(described, io.BytesIO())  # of tables that it is given
        self._answer = locally(session.run, described, rows=lambda outputs: outputs)

    def score(self, table: Any) -> tuple[Answers, dict[int, str]]:
        """Answer the rows of a RecordBatch of features; and say of those that it refuses, by number, why.

        Raises SignatureMismatch where a column is of another type than its feature.
        """
        self._reader.columns.check_types(table.schema)
        refused: dict[int, str] = {}
        outputs: dict[str, list[Any]] = {spec.name: [] for spec in self.signature.outputs}
        places: list[int] = []
        for each in self._found(table):
            if isinstance(each, BadRow):
                refused[each.line - 1] = f"{each.path[1:] or 'the row'}: {each.message}"
                continue
            arrays, lines = each
            for values, array in zip(outputs.values(), arrays, strict=True):
                values.extend([array.tolist()] if self.signature.batch == "none" else array.tolist())
            places += (lines - 1).tolist()
        made = answers(outputs, self.signature.model_dump(include={"label", "scores", "classes"}))
        labels, scores = made.labels, made.scores
        if labels is not None:
            known = dict(zip(places, labels, strict=True))
            labels = [known.get(row) for row in range(len(table))]
        if scores is not None:
            scores = np.full((len(table), len(made.columns)), np.nan)
            scores[places] = made.scores
        return Answers(labels, scores, made.columns), refused

    def _found(self, table: Any) -> Iterator[Answered]:
        for start in range(0, len(table), _CHUNK):
            end = min(start + _CHUNK, len(table))
            for batch in self._reader.read(Piece(table[start:end], start + 1, Position(end, end + 1))):
                yield from batch.bad
                if batch.inputs is not None:
                    yield from self._answer(batch.inputs, batch.lines)


@dataclass
class Replayed:
    """How a version's answers differ from those that were given, row by row; refused rows agree with nothing.

    differences: the largest of a row's scores, NaN where there are none to compare. shift: sums by column, of the
    answers that were given and of the new ones. filled: what stood for features that were not captured.
    """

    agreeing: list[bool] = field(default_factory=list)
    labelled: bool = True
    differences: list[float] = field(default_factory=list)
    refused: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    given: Counter[str] = field(default_factory=Counter)
    scored: Counter[str] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)
    filled: dict[str, Any] = field(default_factory=dict)
    segments: dict[str, list[Any]] = field(default_factory=dict)
    worst: list[tuple[float, dict[str, Any]]] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        every = np.ones(len(self.agreeing), bool)
        answered = len(self.agreeing) - self.refused
        return {
            "versions": dict(self.versions),
            "refused": self.refused,
            "reasons": dict(self.reasons.most_common(5)),
            **self._figures(every),
            "shift": {name: (self.scored[name] - self.given[name]) / max(1, answered) for name in self.given},
            "segments": {name: self._by(values) for name, values in self.segments.items()},
            "worst": [row for _, row in self.worst],
            "filled": self.filled,
        }

    def _figures(self, which: NDArray[np.bool_]) -> dict[str, Any]:
        apart = np.array(self.differences)[which]
        apart = apart[np.isfinite(apart)]
        return {
            "rows": int(which.sum()),
            "agreement": float(np.array(self.agreeing)[which].mean()) if self.labelled else None,
            "difference": dict(
                zip(("mean", "p50", "p99", "max"), (apart.mean(), *np.quantile(apart, (0.5, 0.99, 1))), strict=True)
            )
            if apart.size
            else None,
        }

    def _by(self, values: list[Any]) -> list[dict[str, Any]]:
        groups: list[tuple[str, NDArray[np.bool_]]] = []
        distinct = sorted(set(values), key=lambda value: (value is None, str(value)))
        if len(distinct) > _DISTINCT and all(isinstance(value, int | float) for value in distinct):
            numbers = np.array(values, dtype=np.float64)
            edges = np.nanquantile(numbers, [0, 0.25, 0.5, 0.75, 1])
            place = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, 3)
            for i in range(4):
                groups.append((f"{edges[i]:.4g} to {edges[i + 1]:.4g}", (place == i) & ~np.isnan(numbers)))
            groups.append(("missing", np.isnan(numbers)))
        else:
            groups = [(str(value), np.array([each == value for each in values])) for value in distinct]
        return [{"value": value} | self._figures(which) for value, which in groups if which.any()]


def replay(
    folder: Path, models: Path, name: str, version: str, *, segments: Sequence[str], worst: int, threads: int
) -> Replayed:
    """Score all that a folder of captures has of a model by one of its versions.

    segments: features, `principal` or `version`. worst: how many rows to show. Features that were not captured get the
    version's example, and then both versions are asked again, so that they are asked the same.
    Raises InvalidRequest, ModelNotFound, ModelInvalid.
    """
    loaded = cache(lambda known: Version(models / name / known, threads))
    candidate = loaded(version)
    result = Replayed(segments={segment: [] for segment in segments})
    for captured, facts in _tables(folder / name):
        rows = _rows(captured, candidate, facts, result.filled)
        new, refused = candidate.score(rows)
        table = captured.to_pydict()
        given = answers({n[8:]: table[n] for n in table if n.startswith("outputs.")}, facts)
        if any(feature in facts["redacted"] for feature in result.filled):
            old = loaded(facts["version"])
            given, _ = old.score(_rows(captured, old, facts, {}, like=rows))
        _compare(result, given, new, refused, table, facts, rows, worst)
    if not result.agreeing:
        raise InvalidRequest(f"{folder}: nothing of {name} was captured there")
    return result


def _tables(folder: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Give each file as a table, and what is said of it. Raises InvalidRequest."""
    for path in sorted(folder.glob("*/[!.]*.parquet")):
        try:
            table = parquet.read_table(path)
        except (OSError, ValueError) as error:
            raise InvalidRequest(f"{path} can't be read: {error}") from None
        facts = json.loads((table.schema.metadata or {}).get(METADATA_KEY, b"null"))
        if facts is None:
            raise InvalidRequest(f"{path} is no file of captured requests")
        yield table, facts


def _rows(table: Any, version: Version, facts: Mapping[str, Any], filled: dict[str, Any], *, like: Any = None) -> Any:
    """Return captured rows as a RecordBatch of a version's features; `filled` is told what stood for some.

    like: rows that have been filled already, and have the word. Raises InvalidRequest where nothing can stand for one.
    """
    columns: dict[str, Any] = {}
    example = version.signature.example or {}
    for feature in version.signature.features:
        name, kind = feature.name, arrow_type(feature)
        if f"features.{name}" in table.column_names:
            columns[name] = table[f"features.{name}"].combine_chunks()
            if feature.nullable and columns[name].type == pa.string():  # an empty one stands for what was missing
                columns[name] = pc.if_else(pc.equal(columns[name], ""), pa.scalar(None, pa.string()), columns[name])
        elif like is not None and name in like.schema.names:
            columns[name] = like[name]
        elif name in facts["redacted"] and name in example:
            filled[name] = example[name]
            columns[name] = pa.array([example[name]] * len(table), kind)
        elif feature.nullable:
            columns[name] = pa.nulls(len(table), kind)
        else:
            raise InvalidRequest(f"version {version.name} wants {name}, which was not captured")
    return pa.RecordBatch.from_pydict(columns)


def _compare(  # noqa: PLR0917
    result: Replayed,
    given: Answers,
    new: Answers,
    refused: Mapping[int, str],
    table: Mapping[str, list[Any]],
    facts: Mapping[str, Any],
    rows: Any,
    worst: int,
) -> None:
    count = len(rows)
    answered = np.array([i not in refused for i in range(count)])
    agreeing = np.zeros(count, bool)
    if given.labels is not None and new.labels is not None:
        agreeing = np.array([a == b for a, b in zip(given.labels, new.labels, strict=True)]) & answered
    else:
        result.labelled = False
    differences = np.full(count, np.nan)
    common = [name for name in given.columns if name in new.columns]
    if common and given.scores is not None and new.scores is not None:
        old = given.scores[:, [given.columns.index(name) for name in common]]
        now = new.scores[:, [new.columns.index(name) for name in common]]
        differences[answered] = np.abs(now - old)[answered].max(axis=1)
        for i, name in enumerate(common):
            result.given[name] += float(np.nansum(old[answered, i]))  # type: ignore[assignment]
            result.scored[name] += float(np.nansum(now[answered, i]))  # type: ignore[assignment]
    for segment, values in result.segments.items():
        column = table.get(f"features.{segment}", table.get(segment) if segment == "principal" else None)
        if segment == "version":
            column = [facts["version"]] * count
        if column is None:
            raise InvalidRequest(f"--segment {segment}: is no feature that was captured, nor principal or version")
        values.extend(column)
    badness = np.where(answered, np.nan_to_num(differences) + 2.0 * (result.labelled & ~agreeing), math.inf)
    for i in np.argsort(-badness, kind="stable")[:worst].tolist():
        told = {
            "request_id": table["request_id"][i],
            "row": table["row"][i],
            "version": facts["version"],
            "features": rows[i : i + 1].to_pylist()[0],
            "given": given.of(i),
            "scored": {"refused": refused[i]} if i in refused else new.of(i),
            "difference": None if math.isnan(differences[i]) else float(differences[i]),
        }
        if badness[i]:
            result.worst.append((badness[i], told))
    result.worst = sorted(result.worst, key=lambda each: -each[0])[:worst]
    result.agreeing += agreeing.tolist()
    result.differences += differences.tolist()
    result.refused += len(refused)
    result.reasons.update(refused.values())
    result.versions[facts["version"]] += count
