"""What the gate looks at in one version. Runs in a disposable process: any line here may kill it, or never return."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from pydantic import BaseModel

from serving.engine.batch_independence import prove, same
from serving.engine.batching import Independence
from serving.engine.probe_rows import MadeUpRows
from serving.engine.rows import Rows
from serving.engine.runtime import plain, write_prepared
from serving.engine.session import OnnxSession
from serving.engine.signature import Signature
from serving.errors import InferenceFailed, ServingError
from serving.gate.report import Check, Figures
from serving.linux.memory import private_memory
from serving.repository import manifest
from serving.repository.manifest import MODEL_FILE, Hashes
from serving.tensors import INTEGERS, Array, Tensors

BUILT_IN = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc"})
"""Domains of operators that onnxruntime brings along."""

ROWS = "independent rows"
"""The check that refuses nothing: in doubt, requests run alone."""

_WARM_S = 1.0
"""Seconds of one run from which larger batches are not tried: a slow model on a busy machine is none that hangs."""
_BATCH_S = 0.5
"""Seconds that one run of the batch that is measured should take at most."""
_PREPARED = 1e-5
"""Largest difference of the answers of a prepared form, relative to the largest answer."""
_MEASURE_S = 0.05
_MOST_RUNS = 50
_LEAST_RUNS = 3


class Task(BaseModel):
    """One version to look at, with all that the gate's process is told."""

    folder: Path
    allow_custom_ops: bool = False
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
    """What came of it."""

    checks: list[Check] = []
    reasons: list[str] = []
    signature: Signature | None = None
    figures: Figures | None = None
    prepared: bool = False
    independence: Independence | None = None


class Refused(Exception):
    """A check says no; the text is the reason."""


class Examination:
    """One run over one version.

    note: told each check's name before it begins, so that a death has a place. tell: told what was found before rows
    are tried, which may end this process and refuses nothing.
    """

    def __init__(self, task: Task, note: Callable[[str], None], tell: Callable[[Findings], None]) -> None:
        self._task = task
        self._note = note
        self._tell = tell
        self._model = task.folder / MODEL_FILE
        self.findings = Findings()

    def run(self) -> Findings:
        """Look at everything until something refuses."""
        try:
            if not self._task.measure_only:
                with self._check("files"):
                    self._files()
                with self._check("ONNX"):
                    self._valid()
                with self._check("operators"):
                    self._operators()
            with self._check("session and warm-up"):
                session, figures = self._load()
            self.findings.signature = session.signature
            with self._check("golden rows"):
                self._golden(session)
            with self._check("measured"):
                self.findings.figures = self._measured(session, figures)
            if self._task.prepare_in is not None:
                with self._check("prepared form"):
                    self._prepare(session, self._task.prepare_in)
            if not self._task.measure_only:
                self._tell(self.findings)
                self._rows_apart(session)
        except Refused as refusal:
            self.findings.reasons.append(str(refusal))
        return self.findings

    @contextmanager
    def _check(self, name: str) -> Iterator[None]:
        self._note(name)
        began = time.monotonic()
        self._detail = ""
        try:
            yield
        except Exception as error:
            reason = _reason(error, self._task.folder)
            self._done(name, "refused", reason, began)
            raise Refused(reason) from None
        self._done(name, "skipped" if self._detail.startswith("skipped: ") else "passed", self._detail, began)

    def _done(self, name: str, outcome: Any, detail: str, began: float) -> None:
        detail = detail.removeprefix("skipped: ")
        seconds = round(time.monotonic() - began, 4)
        self.findings.checks.append(Check(name=name, outcome=outcome, detail=detail, seconds=seconds))

    def _files(self) -> None:
        hashes = Hashes()
        declared = manifest.read(self._task.folder)
        names = manifest.parts(self._task.folder)
        if declared is None:
            self._detail = f"no manifest; {', '.join(names)}"
            return
        manifest.check(self._task.folder, declared, hashes)
        unlisted = [name for name in names if name not in declared.files]
        if unlisted:
            raise Refused(f"the graph names {', '.join(unlisted)}, which manifest.json does not")
        self._detail = f"{len(names)} as manifest.json says"

    def _valid(self) -> None:
        try:
            onnx.checker.check_model(str(self._model))
        except onnx.checker.ValidationError as error:
            if "Field 'shape' of 'type'" not in str(error):
                raise
            # Exporters leave the shape of an output out, and onnxruntime does not miss it: see to the rest.
            proto = onnx.load(str(self._model), load_external_data=False)
            for port in (*proto.graph.input, *proto.graph.output):
                if port.type.HasField("tensor_type"):
                    port.type.tensor_type.shape.SetInParent()
            onnx.checker.check_model(proto)
            self._detail = "an input or output has no shape"

    def _operators(self) -> None:
        proto = onnx.load(str(self._model), load_external_data=False)
        own = {(function.domain, function.name) for function in proto.functions}
        strange = sorted(
            {
                f"{node.domain}::{node.op_type}"
                for node in _nodes(proto)
                if node.domain not in BUILT_IN and (node.domain, node.op_type) not in own
            }
        )
        if strange and not self._task.allow_custom_ops:
            raise Refused(f"custom operators are not allowed here: {', '.join(strange[:5])}")
        self._detail = f"custom, and allowed: {', '.join(strange[:5])}" if strange else ""

    def _load(self) -> tuple[OnnxSession, Figures]:
        before, began = private_memory(), time.monotonic()
        session = OnnxSession(self._model, threads=1, warm_rows=self._task.max_batch_rows, warm_s=_WARM_S)
        load_s = time.monotonic() - began
        return session, Figures(load_s=round(load_s, 4), memory_bytes=max(0, private_memory() - before))

    def _golden(self, session: OnnxSession) -> None:
        golden = session.signature.golden
        if golden is None or not golden.rows:
            self._detail = "skipped: its signature has none"
            return
        signature = session.signature
        rows = Rows(signature, "golden")
        cells = [[row.get(name) for name in rows.names] for row in golden.rows]
        if signature.batch == "dynamic":
            outputs = session.run(rows.arrays(cells))
        else:
            singles = [session.run(rows.arrays([row])) for row in cells]
            join = np.concatenate if signature.batch == "one" else np.stack
            outputs = tuple(join(parts) for parts in zip(*singles, strict=True))
        worst = 0.0
        for spec, actual in zip(signature.outputs, outputs, strict=True):
            if spec.name in golden.outputs:
                worst = max(worst, difference(golden.outputs[spec.name], actual, golden.tolerance, spec.name))
        self._detail = f"{len(golden.rows)}, largest difference {worst:.1e}"

    def _measured(self, session: OnnxSession, figures: Figures) -> Figures:
        try:
            session.run(session.sample(1))
        except InferenceFailed as error:
            # Whole numbers may be sizes, and those were made up: then it is our fault.
            ours = any(spec.datatype in INTEGERS for spec in session.signature.inputs)
            if "alloc" in str(error.__cause__) and not ours:
                raise Refused("it asks for more memory than the gate gives a model") from None
            self._detail = "skipped: it does not take made-up rows"
            return figures
        rows, row_s = 1, _median(session, 1)
        if session.signature.batch == "dynamic":
            rows = max(1, min(64, self._task.max_batch_rows, int(_BATCH_S / row_s)))
        batch_s = _median(session, rows)
        self._detail = f"1 row {row_s * 1e6:,.0f} µs, {rows} rows {batch_s * 1e6:,.0f} µs"
        return figures.model_copy(update={"row_s": row_s, "batch_rows": rows, "batch_s": batch_s})

    def _rows_apart(self, session: OnnxSession) -> None:
        self._note(ROWS)
        began = time.monotonic()
        found = self.findings.independence = prove(session, self._model)
        detail = "" if found.proved else f"{found.reason}: requests run alone"
        self._done(ROWS, "passed" if found.proved else "warned", detail, began)

    def _prepare(self, session: OnnxSession, folder: Path) -> None:
        path = folder / MODEL_FILE
        try:
            write_prepared(self._model, path)
            prepared = OnnxSession(path, threads=1, warm_rows=1, prepared=True)
            proved = prepared.signature == session.signature and _same(session, prepared)
        except ServingError as error:
            # It only saves memory: a model that can't be written so serves as it is.
            self._detail = f"skipped: {error.message}"
            return
        self.findings.prepared = proved
        self._detail = "its answers are the model's" if proved else "skipped: its answers were not seen to be equal"


def _reason(error: Exception, folder: Path) -> str:
    if isinstance(error, MemoryError):
        return "it asks for more memory than the gate gives a model"
    if isinstance(error, ServingError):
        text = error.message
    elif isinstance(error, Refused):
        text = str(error)
    elif isinstance(error, onnx.checker.ValidationError):
        text = f"not valid ONNX: {str(error).strip().splitlines()[0]}"
    else:
        lines = str(error).strip().splitlines()
        text = f"it can't be examined: {plain(lines[0], folder / MODEL_FILE) if lines else type(error).__name__}"
    return text.replace(str(folder), "").strip()[:500]


def _nodes(proto: Any) -> Iterator[Any]:
    waiting = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    while waiting:
        node = waiting.pop()
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                waiting.extend(graph.node)


def difference(expected: list[Any], actual: Array, tolerance: float, name: str) -> float:
    """Return the largest difference of an output from its known answer, relative above 1; labels must be equal.

    Raises Refused where it is above `tolerance`, with the row.
    """
    due: Array = np.array(expected)
    if actual.dtype.kind == "f":
        due = due.astype(np.float64)
    if due.shape != actual.shape:
        raise Refused(f"golden rows: output {name} has shape {list(actual.shape)}, and {list(due.shape)} is known")
    if actual.dtype.kind != "f":
        wrong = np.flatnonzero((due != actual).reshape(len(due), -1).any(axis=1))
        if wrong.size:
            row = int(wrong[0])
            raise Refused(f"golden row {row}: output {name} is {_cell(actual[row])}, and {_cell(due[row])} is known")
        return 0.0
    got = actual.astype(np.float64)
    both = np.isnan(due) & np.isnan(got) | (due == got)
    with np.errstate(invalid="ignore"):
        apart = np.where(both, 0.0, np.abs(due - got) / np.maximum(1, np.abs(due)))
    apart = np.where(np.isfinite(apart), apart, np.inf).reshape(len(due), -1)
    worst = float(apart.max(initial=0.0))
    if worst > tolerance:
        row = int(apart.max(axis=1).argmax())
        raise Refused(f"golden row {row}: output {name} is {_cell(got[row])}, and {_cell(due[row])} is known")
    return worst


def _cell(value: Any) -> str:
    return str(value.tolist() if hasattr(value, "tolist") else value)[:80]


def _same(one: OnnxSession, other: OnnxSession) -> bool:
    """Tell whether two forms of a model were seen to give the same answers: some that are numbers, of like rows."""
    made = MadeUpRows(one.signature, one.dimension_names, lambda inputs: _answer(one, inputs) is not None)
    if not made.inner:
        return False  # it refuses what is made up: nothing to compare with
    rows = made.make(3, seed=1, inner=made.inner[0])
    expected = _answer(one, rows)
    if expected is None or any(a.dtype.kind == "f" and not np.isfinite(a).any() for a in expected):
        return False
    return all(same(a, b, _PREPARED) for a, b in zip(expected, other.run(rows), strict=True))


def _answer(session: OnnxSession, inputs: Tensors) -> Tensors | None:
    try:
        return session.run(inputs)
    except InferenceFailed:
        return None


def _median(session: OnnxSession, rows: int) -> float:
    feeds = session.sample(rows)
    taken: list[float] = []
    until = time.perf_counter() + _MEASURE_S
    while len(taken) < _LEAST_RUNS or (len(taken) < _MOST_RUNS and time.perf_counter() < until):
        began = time.perf_counter()
        session.run(feeds)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def examine(task: Task, note: Callable[[str], None], tell: Callable[[Findings], None]) -> Findings:
    """Look at one version; see `Examination`. Raises nothing that the version can cause."""
    return Examination(task, note, tell).run()
