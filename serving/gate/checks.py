"""What the gate looks at in one version. Runs in a disposable process: any line here may kill it, or never return."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from serving.engine import golden
from serving.engine.batch_independence import prove, same
from serving.engine.probe_rows import MadeUpRows
from serving.engine.runtime import EXTENSIONS, NO_MEMORY, extensions_library, plain, write_prepared
from serving.engine.session import OnnxSession
from serving.errors import InferenceFailed, ModelInvalid, ServingError
from serving.gate.findings import ROWS, Findings, Task
from serving.gate.report import PREPARED, Check, Figures, Outcome
from serving.linux.memory import private_memory
from serving.repository import manifest
from serving.repository.manifest import MODEL_FILE, Hashes
from serving.tensors import INTEGERS

BUILT_IN = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc"})
"""Domains of operators that are part of onnxruntime."""

_INSTALL = "pip install onnxruntime-extensions"
_ALLOW = "allow them with --extension-ops"
_WARM_S = 1.0
"""Seconds of one run from which larger batches are not tried: a slow model on a busy machine is none that hangs."""
_BATCH_S = 0.5
"""Seconds that one run of the batch that is measured should take at most."""
_PREPARED = 1e-5
"""Largest difference of the answers of a prepared form, relative to the largest answer."""
_MEASURE_S = 0.05
_MOST_RUNS = 50
_LEAST_RUNS = 3


class Refused(Exception):
    """A check says no; the text is the reason."""


class Skipped(Exception):
    """A check does not apply; the text says why."""


class Examination:
    """One run over one version. Raises nothing that the version can cause.

    tell: told each check's name before it begins, so that a death has a place, and what was found before rows are
    tried, which may end this process and refuses nothing.
    """

    def __init__(self, task: Task, tell: Callable[[str | Findings], None]) -> None:
        self._task = task
        self._tell = tell
        self._model = task.folder / MODEL_FILE
        self._session: OnnxSession
        self._doubt = ""
        self.findings = Findings()

    def run(self) -> Findings:
        """Look at everything until something refuses."""
        checks: list[tuple[str, Callable[[], str]]] = [
            ("files", self._files),
            ("ONNX", self._valid),
            ("operators", self._operators),
            ("session and warm-up", self._load),
            ("golden rows", self._golden),
            ("measured", self._measure),
        ]
        if self._task.measure_only:
            del checks[:3]
        if self._task.prepare_in is not None:
            checks.append((PREPARED, self._prepare))
        for name, check in checks:
            if not self._passes(name, check):
                return self.findings
        if not self._task.measure_only:
            self._tell(self.findings)
            self._prove_rows()
        return self.findings

    def _passes(self, name: str, check: Callable[[], str]) -> bool:
        """Run one check, which returns what is worth saying of it, and note what came of it."""
        self._tell(name)
        began = time.monotonic()
        outcome: Outcome = "passed"
        try:
            detail = check()
        except Skipped as skipped:
            outcome, detail = "skipped", str(skipped)
        except Exception as error:
            outcome, detail = "refused", _reason(error, self._task.folder)
            self.findings.reasons.append(detail)
        self._done(name, outcome, detail, began)
        return outcome != "refused"

    def _done(self, name: str, outcome: Outcome, detail: str, began: float) -> None:
        seconds = round(time.monotonic() - began, 4)
        self.findings.checks.append(Check(name=name, outcome=outcome, detail=detail, seconds=seconds))

    def _files(self) -> str:
        hashes = Hashes()
        declared = manifest.read(self._task.folder)
        names = manifest.parts(self._task.folder)
        if declared is None:
            return f"no manifest; {', '.join(names)}"
        manifest.check(self._task.folder, declared, hashes)
        unlisted = [name for name in names if name not in declared.files]
        if unlisted:
            raise Refused(f"the graph names {', '.join(unlisted)}, which manifest.json does not")
        return f"{len(names)} as manifest.json says"

    def _valid(self) -> str:
        """Note what onnx's own checker says: exporters are laxer than it, and onnxruntime decides."""
        try:
            onnx.checker.check_model(str(self._model))
        except onnx.checker.ValidationError as error:
            self._doubt = f"not valid ONNX: {str(error).strip().splitlines()[0]}"
        return self._doubt

    def _operators(self) -> str:
        proto = onnx.load(str(self._model), load_external_data=False)
        own = {(function.domain, function.name) for function in proto.functions}
        strange = sorted(
            {
                f"{node.domain}::{node.op_type}"
                for node in _nodes(proto)
                if node.domain not in BUILT_IN and (node.domain, node.op_type) not in own
            }
        )
        extensions = [name for name in strange if name.partition("::")[0] in EXTENSIONS]
        others = [name for name in strange if name not in extensions]
        if others:
            raise Refused(f"no library here has its operators {', '.join(others[:5])}")
        if not extensions:
            return ""
        self.findings.extensions = extensions
        named = ", ".join(extensions[:5])
        if extensions_library() is None:
            raise Refused(f"it has operators of a package that is not here ({named}): {_INSTALL}, and {_ALLOW}")
        if not self._task.limits.extension_ops:
            raise Refused(f"operators of onnxruntime-extensions are not allowed here ({named}): {_ALLOW}")
        return f"of onnxruntime-extensions, and allowed: {named}"

    def _load(self) -> str:
        before, began = private_memory(), time.monotonic()
        try:
            rows = self._task.limits.max_batch_rows
            self._session = OnnxSession(self._model, threads=1, warm_rows=rows, warm_s=_WARM_S)
        except ModelInvalid as error:
            raise Refused(f"{error.message} ({self._doubt})" if self._doubt else error.message) from error
        load_s = round(time.monotonic() - began, 4)
        self._loaded = Figures(load_s=load_s, memory_bytes=max(0, private_memory() - before))
        self.findings.signature = self._session.signature
        return ""

    def _golden(self) -> str:
        worst, known = golden.check(self._session), self._session.signature.golden
        if worst is None or known is None:
            raise Skipped("its signature has none")
        return f"{len(known.rows)}, largest difference {worst:.1e}"

    def _measure(self) -> str:
        session, figures = self._session, self._loaded
        self.findings.figures = figures
        try:
            session.run(session.sample(1))
        except InferenceFailed as error:
            # Whole numbers may be sizes, and those were made up: then it is our fault.
            ours = any(spec.datatype in INTEGERS for spec in session.signature.inputs)
            if NO_MEMORY.search(str(error.__cause__)) and not ours:
                raise Refused("it asks for more memory than the gate gives a model") from None
            raise Skipped("it does not take made-up rows") from None
        rows, row_s = 1, _median(session, 1)
        if session.signature.batch == "dynamic":
            rows = max(1, min(64, self._task.limits.max_batch_rows, int(_BATCH_S / row_s)))
        batch_s = _median(session, rows)
        self.findings.figures = figures.model_copy(update={"row_s": row_s, "batch_rows": rows, "batch_s": batch_s})
        return f"1 row {row_s * 1e6:,.0f} µs, {rows} rows {batch_s * 1e6:,.0f} µs"

    def _prepare(self) -> str:
        """Write the prepared form. It only saves memory: a model that can't be written so serves as it is."""
        assert self._task.prepare_in is not None  # noqa: S101  told to mypy
        path = self._task.prepare_in / MODEL_FILE
        try:
            write_prepared(self._model, path)
            prepared = OnnxSession(path, threads=1, warm_rows=1, prepared=True)
            if prepared.signature != self._session.signature or not _same(self._session, prepared):
                raise Skipped("its answers were not seen to be equal")
        except ServingError as error:
            raise Skipped(error.message) from None
        return "its answers are the model's"

    def _prove_rows(self) -> None:
        self._tell(ROWS)
        began = time.monotonic()
        found = self.findings.independence = prove(self._session, self._model)
        detail = "" if found.proved else f"{found.reason}: requests run alone"
        self._done(ROWS, "passed" if found.proved else "warned", detail, began)


def _reason(error: Exception, folder: Path) -> str:
    if isinstance(error, MemoryError):
        return "it asks for more memory than the gate gives a model"
    if isinstance(error, ServingError):
        text = error.message
    elif isinstance(error, Refused):
        text = str(error)
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


def _same(one: OnnxSession, other: OnnxSession) -> bool:
    """Tell whether two forms of a model were seen to give the same answers: some that are numbers, of like rows."""
    made = MadeUpRows(one)
    if not made.inner:
        return False  # it refuses what is made up: nothing to compare with
    rows = made.make(3, seed=1, inner=made.inner[0])
    if not made.takes(rows):
        return False
    expected = one.run(rows)
    if any(a.dtype.kind == "f" and not np.isfinite(a).any() for a in expected):
        return False
    return all(same(a, b, _PREPARED) for a, b in zip(expected, other.run(rows), strict=True))


def _median(session: OnnxSession, rows: int) -> float:
    feeds = session.sample(rows)
    taken: list[float] = []
    until = time.perf_counter() + _MEASURE_S
    while len(taken) < _LEAST_RUNS or (len(taken) < _MOST_RUNS and time.perf_counter() < until):
        began = time.perf_counter()
        session.run(feeds)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)
