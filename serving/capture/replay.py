"""Scores captured requests again, by any version, and says how its answers differ from those that were given."""

from __future__ import annotations

import heapq
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from serving.capture.capture import METADATA_KEY
from serving.engine.limits import Limits
from serving.engine.model import load
from serving.engine.rows import Rows
from serving.engine.signature import Feature
from serving.errors import InferenceFailed, InvalidRequest, ModelNotFound
from serving.tensors import INTEGERS

_CHUNK = 512
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
        self._session = load(folder / "model.onnx", limits=Limits(threads=threads, warm_rows=1))
        self.signature = self._session.signature
        self._rows = Rows(self.signature, folder.parent.name)
        self._check = self._rows.one("named", fail_fast=True)

    def score(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Answers, dict[int, str]]:
        """Answer rows by feature name; and those that it refuses, by number, with the reason."""
        refused: dict[int, str] = {}
        outputs: dict[str, list[Any]] = {spec.name: [] for spec in self.signature.outputs}
        together = _CHUNK if self.signature.batch == "dynamic" else 1
        good: list[tuple[int, list[Any]]] = []
        for number, row in enumerate(rows):
            try:
                good.append((number, self._cells(row)))
            except ValidationError as error:
                found = error.errors(include_url=False)[0]
                refused[number] = f"{found['loc'][0]}: {found['msg']}"
        made: dict[int, tuple[Any, ...]] = {}
        for start in range(0, len(good), together):
            self._run(good[start : start + together], made, refused)
        width = {name: next((values[i] for values in made.values()), None) for i, name in enumerate(outputs)}
        for number in range(len(rows)):
            values = made.get(number, tuple(_like(width[name]) for name in outputs))
            for name, value in zip(outputs, values, strict=True):
                outputs[name].append(value)
        signature = self.signature
        facts = {"label": signature.label, "scores": signature.scores, "classes": signature.classes}
        return answers(outputs, facts), refused

    def _run(
        self, rows: list[tuple[int, list[Any]]], made: dict[int, tuple[Any, ...]], refused: dict[int, str]
    ) -> None:
        try:
            outputs = self._session.run(self._rows.arrays([cells for _, cells in rows]))
        except (InferenceFailed, ValueError) as error:
            if len(rows) == 1:
                refused[rows[0][0]] = str(error)
            for row in rows if len(rows) > 1 else ():
                self._run([row], made, refused)
            return
        whole = self.signature.batch == "none"
        columns = [[output.tolist()] if whole else output.tolist() for output in outputs]
        for (number, _), values in zip(rows, zip(*columns, strict=True), strict=True):
            made[number] = values

    def _cells(self, row: Mapping[str, Any]) -> list[Any]:
        """Return a row's cells in feature order. Raises ValidationError where a client could not send it."""
        cells = {feature.name: _sent(row[feature.name], feature) for feature in self.signature.features}
        infinite = {
            f.name: 0.0
            for f in self.signature.features
            if f.allow_non_finite and isinstance(cells[f.name], float) and not math.isfinite(cells[f.name])
        }  # a tensor may hold these, and JSON has no word for them
        self._check.validate_python(cells | infinite)
        return list(cells.values())


def _sent(value: Any, feature: Feature) -> Any:
    """Return what a client would have to send for a captured value: None where it is missing."""
    if isinstance(value, list):
        return [_sent(each, feature) for each in value]
    if feature.nullable and (value == "" or (isinstance(value, float) and math.isnan(value))):
        return None
    whole = feature.datatype in INTEGERS and isinstance(value, float) and value.is_integer()
    return int(value) if whole else value


def _like(value: Any) -> Any:
    """Return what stands for an answer that there is none of, in the shape of others; it equals none."""
    return [_like(each) for each in value] if isinstance(value, list) else math.nan


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
    worst: list[tuple[float, int, dict[str, Any]]] = field(default_factory=list)

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
            "worst": [row for _, _, row in sorted(self.worst, key=lambda each: (-each[0], each[1]))],
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
    candidate = Version(models / name / version, threads)
    before: dict[str, Version] = {}
    result = Replayed(segments={segment: [] for segment in segments})
    for table, facts in _tables(folder / name):
        rows = _rows(table, candidate, facts, result.filled)
        new, refused = candidate.score(rows)
        given = answers({n[8:]: table[n] for n in table if n.startswith("outputs.")}, facts)
        if any(feature in facts["redacted"] for feature in result.filled):
            if facts["version"] not in before:
                before[facts["version"]] = Version(models / name / facts["version"], threads)
            old = before[facts["version"]]
            given, _ = old.score(_rows(table, old, facts, {}, like=rows))
        _compare(result, given, new, refused, table, facts, rows, worst)
    if not result.agreeing:
        raise InvalidRequest(f"{folder}: nothing of {name} was captured there")
    return result


def _tables(folder: Path) -> Iterator[tuple[dict[str, list[Any]], dict[str, Any]]]:
    """Give each file's columns and what is said of it. Raises InvalidRequest."""
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError:
        raise InvalidRequest('this needs pyarrow: pip install "serving[bulk]"') from None
    for path in sorted(folder.glob("*/[!.]*.parquet")):
        try:
            table = parquet.read_table(path)
        except (OSError, ValueError) as error:
            raise InvalidRequest(f"{path} can't be read: {error}") from None
        facts = json.loads((table.schema.metadata or {}).get(METADATA_KEY, b"null"))
        if facts is None:
            raise InvalidRequest(f"{path} is no file of captured requests")
        yield table.to_pydict(), facts


def _rows(
    table: Mapping[str, list[Any]],
    version: Version,
    facts: Mapping[str, Any],
    filled: dict[str, Any],
    *,
    like: Sequence[Mapping[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Return captured rows by the features of a version; `filled` is told what stood for those that are not there.

    like: rows that have been filled already, and have the word. Raises InvalidRequest where nothing can stand for one.
    """
    count = len(table["row"])
    columns: dict[str, Sequence[Any]] = {}
    example = version.signature.example or {}
    for feature in version.signature.features:
        if (captured := table.get(f"features.{feature.name}")) is not None:
            columns[feature.name] = captured
        elif like and feature.name in like[0]:
            columns[feature.name] = [row[feature.name] for row in like]
        elif feature.name in facts["redacted"] and feature.name in example:
            filled[feature.name] = example[feature.name]
            columns[feature.name] = [example[feature.name]] * count
        elif feature.nullable:
            columns[feature.name] = [None] * count
        else:
            raise InvalidRequest(f"version {version.name} wants {feature.name}, which was not captured")
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _compare(  # noqa: PLR0917
    result: Replayed,
    given: Answers,
    new: Answers,
    refused: Mapping[int, str],
    table: Mapping[str, list[Any]],
    facts: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    worst: int,
) -> None:
    count = len(rows)
    agreeing = [False] * count
    if given.labels is not None and new.labels is not None:
        agreeing = [a == b for a, b in zip(given.labels, new.labels, strict=True)]
    else:
        result.labelled = False
    differences = np.full(count, np.nan)
    common = [name for name in given.columns if name in new.columns]
    if common and given.scores is not None and new.scores is not None:
        answered = np.array([i not in refused for i in range(count)])
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
    for i in range(count):
        badness = math.inf if i in refused else (2.0 if result.labelled and not agreeing[i] else 0.0)
        badness += 0.0 if math.isnan(differences[i]) else differences[i]
        place = len(result.agreeing) + i
        if badness and (len(result.worst) < worst or badness > result.worst[0][0]):
            told = {
                "request_id": table["request_id"][i],
                "row": table["row"][i],
                "version": facts["version"],
                "features": rows[i],
                "given": given.of(i),
                "scored": {"refused": refused[i]} if i in refused else new.of(i),
                "difference": None if math.isnan(differences[i]) else float(differences[i]),
            }
            put = heapq.heappush if len(result.worst) < worst else heapq.heappushpop
            put(result.worst, (badness, -place, told))
    result.agreeing += agreeing
    result.differences += differences.tolist()
    result.refused += len(refused)
    result.reasons.update(refused.values())
    result.versions[facts["version"]] += count
