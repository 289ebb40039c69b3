"""One loaded ONNX file: its signature, and `run`.

Sequence-of-map outputs (ZipMap, the default of scikit-learn exporters) come out as one [batch, classes] tensor, so
that nothing after this file knows of them.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from serving.engine import mlflow_columns, runtime, signature_inference
from serving.engine.providers import Provider
from serving.engine.rows import Rows
from serving.engine.signature import METADATA_KEY, Feature, Signature
from serving.engine.signature_inference import ZIPMAPS, Port, Probe
from serving.errors import InferenceFailed, ModelInvalid, QueueFull, ServingError
from serving.linux.thread_scheduling import Call, thread_aside
from serving.tensors import DATATYPE_OF, ONNX, Array, Overriding, Tensors

log = logging.getLogger("serving.session")

WARM_BYTES = 16 * 1024 * 1024
"""Most that a warm-up feeds a model: images by the hundred would take memory that no client asked for."""

WARM_S = 0.01
"""Seconds of one run from which larger batches are not tried: what they allocate costs little beside what they compute,
and others serve meanwhile."""

LIGHT_S = 0.0001
"""Seconds of one row up to which a small model gets no threads of its own beside the one that runs it."""

TRIM_BYTES = 1024 * 1024
"""Size of a file from which what reading it took is given back to the system: the allocator would keep nearly all."""


class _TooLarge(InferenceFailed):
    """A run needs more memory than it may take."""


class OnnxSession:
    """One ONNX file, ready to run.

    `run` takes arrays in the order of `signature.inputs` and gives arrays in the order of `signature.outputs`.
    exact_threads: a small model gets all of `threads` too, though they seldom help one. prepared: the file is one that
    `write_prepared` wrote. warm_rows: the largest batch that is tried, in steps that end where a run takes `warm_s`
    seconds; where that is infinite, all are. quiet: others serve meanwhile, and have the processor first. memory_bytes:
    most that its runs and their answers may take at a time, beside the weights; None bounds them by nothing. providers:
    run what they can of it, in order, and the processor the rest.
    Raises ModelInvalid where the file is no ONNX, is truncated, or is not what its own signature says.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int = 1,
        exact_threads: bool = False,
        warm_rows: int = 2,
        warm_s: float = WARM_S,
        prepared: bool = False,
        quiet: bool = False,
        memory_bytes: int | None = None,
        providers: Sequence[Provider] = (),
    ) -> None:
        self.memory_bytes = memory_bytes
        self.providers = tuple(providers)
        self._running: set[int] = set()
        self._ended = 0
        with thread_aside() as aside:
            # Where there are hundreds of small models, threads that help none of them would be thousands.
            small = threads > 1 and not exact_threads and not prepared and path.stat().st_size < TRIM_BYTES
            self._load(path, threads=1 if small else threads, prepared=prepared, quiet=quiet, aside=aside)
            self._warm(warm_rows, warm_s, aside)
            if small and self._row_seconds(aside) > LIGHT_S:
                self._load(path, threads=threads, prepared=prepared, quiet=quiet, aside=aside)
                self._warm(warm_rows, warm_s, aside)

    def _row_seconds(self, aside: Call) -> float:
        """Return the shortest of a few runs of one row; infinite where it takes no made-up ones."""
        sample, best = self.sample(1), math.inf
        for _ in range(5):
            began = time.monotonic()
            try:
                aside(self.run, sample)
            except InferenceFailed:
                return math.inf
            best = min(best, time.monotonic() - began)
        return best

    def _load(self, path: Path, *, threads: int, prepared: bool, quiet: bool, aside: Call) -> None:
        self._session = runtime.load(
            path,
            threads=threads,
            aside=aside,
            prepared=prepared,
            quiet=quiet,
            memory_bytes=self.memory_bytes,
            providers=self.providers,
        )
        self._run = runtime.runner(self._session)
        self._input_names = [port.name for port in self._session.get_inputs()]
        self._output_names = [port.name for port in self._session.get_outputs()]
        self._zipped: dict[int, tuple[Any, ...]] = {}
        self.path, self.prepared = path, prepared
        self._failures = 0
        self._complained = 0.0
        self.threads = threads
        own = self._own_signature()
        self._is_bare = own is None
        self._likely = list(signature_inference.LIKELY)
        self._made_up: Callable[[int, dict[str, Any]], Tensors]
        self.example: Tensors | None = None
        """One row that it has answered."""
        self.signature = own or self._bare_signature(aside)
        self._check_ports()
        self._positions = [self._output_names.index(output.name) for output in self.signature.outputs]
        self._ordered = self._positions == list(range(len(self._output_names)))
        self.large = prepared or path.stat().st_size >= TRIM_BYTES
        """Whether loading it, and letting it go, leaves much in the heap that is to be given back."""

    def run(self, inputs: Tensors) -> Tensors:
        """Run the graph.

        Raises InferenceFailed, whose text says nothing of paths or node internals; QueueFull where the memory for it
        is taken by runs beside it.
        """
        feeds = dict(zip(self._input_names, inputs, strict=True))
        if isinstance(inputs, Overriding):
            feeds |= inputs.overrides
        me = threading.get_ident()
        # No lock: each thread adds and takes away only itself. A run that began and ended within this one shows in the
        # number of those that have ended, and had memory that this one missed.
        self._running.add(me)
        ended = self._ended
        try:
            raw = self._called(feeds)
        except runtime.ERRORS as error:
            self._complain(error)
            if runtime.NO_MEMORY.search(str(error)):
                alone = self._running == {me} and self._ended == ended
                raise self._too_large(limited=runtime.LIMITED in str(error), alone=alone) from error
            raise InferenceFailed(
                "the model could not run on these inputs: a value or shape is one it refuses"
            ) from error
        finally:
            self._ended += 1
            self._running.discard(me)
        if self._zipped:
            for index, keys in self._zipped.items():
                raw[index] = _unzip(raw[index], keys)
        return tuple(raw) if self._ordered else tuple(raw[position] for position in self._positions)

    def _called(self, feeds: dict[str, Array]) -> list[Any]:
        try:
            return self._run(self._session, feeds, None)
        except runtime.ERRORS as error:
            if not runtime.NO_MEMORY.search(str(error)):
                raise
        # What runs of other sizes have left lies in pieces that are too small for this one.
        self.give_back()
        return self._run(self._session, feeds, None)

    def _too_large(self, *, limited: bool, alone: bool) -> ServingError:
        if not alone:
            return QueueFull("other requests have the memory that this model may take: come back later")
        limit = f"its limit of {self.memory_bytes} bytes" if limited else "the server has left"
        return _TooLarge(
            f"the model needs more memory for these inputs than {limit}: send fewer rows, or values that ask for less"
        )

    @property
    def busy(self) -> bool:
        """Whether it runs now."""
        return bool(self._running)

    def give_back(self) -> None:
        """Give the memory that runs have taken, and that none needs now, back to the system."""
        runtime.give_back(self._session, self._run, dict(zip(self._input_names, self.sample(1), strict=True)))

    @property
    def dimension_names(self) -> list[tuple[str | None, ...]]:
        """What the graph calls the dimensions of each input; None for those without a name."""
        dims = {port.name: port.shape for port in self._session.get_inputs()}
        named = ((dim if isinstance(dim, str) else None for dim in dims[spec.name]) for spec in self.signature.inputs)
        return [tuple(names) for names in named]

    def _complain(self, error: Exception) -> None:
        """Log a failure, once a second at most: looking for the culprit in a batch makes many."""
        self._failures += 1
        now = time.monotonic()
        if now - self._complained >= 1:
            log.warning(
                "inference failed: %s (%d runs since the last such line)", runtime.first_line(error), self._failures
            )
            self._complained, self._failures = now, 0

    def _own_signature(self) -> Signature | None:
        text = self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        if text is None:
            return None
        try:
            signature = Signature.model_validate_json(text)
        except ValidationError as error:
            raise ModelInvalid(f"its signature can't be read: {error.errors()[0]['msg']}") from error
        for index, port in enumerate(self._session.get_outputs()):
            if port.type in ZIPMAPS:
                self._zipped[index] = signature.classes or ()
        return signature

    def _bare_signature(self, aside: Call) -> Signature:
        inputs = [Port(p.name, p.type, tuple(p.shape)) for p in self._session.get_inputs()]
        outputs = [Port(p.name, p.type, tuple(p.shape)) for p in self._session.get_outputs()]
        found = signature_inference.describe(inputs, outputs, lambda made_up: aside(self._probe, made_up))
        self._zipped = found.zipped
        self._made_up = lambda rows, values: signature_inference.made_up(
            inputs, [rows] * len(inputs), found.inner, values
        )
        weights = [Port(p.name, p.type, tuple(p.shape)) for p in self._session.get_overridable_initializers()]
        optional = tuple(port.spec("input") for port in weights if port.type in ONNX)
        bare = found.signature.model_copy(update={"optional": optional})
        logged = self._session.get_modelmeta().custom_metadata_map.get(mlflow_columns.METADATA_KEY)
        try:
            return mlflow_columns.describe(bare, mlflow_columns.read(logged))
        except ModelInvalid as error:
            log.warning("a model of MLflow is served by its graph's own names: %s", error.message)
            return bare

    def _probe(self, inputs: Tensors) -> Probe:
        """Run on made-up inputs; None where the graph refuses them, which says nothing against it."""
        try:
            return self._run(self._session, dict(zip(self._input_names, inputs, strict=True)), None)
        except runtime.ERRORS:
            return None

    def _check_ports(self) -> None:
        declared = {spec.name: spec.datatype for spec in self.signature.inputs}
        actual = {port.name: ONNX.get(port.type) for port in self._session.get_inputs()}
        if declared != actual:
            raise ModelInvalid(f"its signature declares inputs {declared}, and its graph has {actual}")
        self._input_names = [spec.name for spec in self.signature.inputs]
        missing = [spec.name for spec in self.signature.outputs if spec.name not in self._output_names]
        if missing:
            raise ModelInvalid(f"its signature declares outputs that its graph lacks: {', '.join(missing)}")

    def _warm(self, warm_rows: int, warm_s: float, aside: Call) -> None:
        """Run at growing batch sizes: the first run of a size allocates, and a client would wait for it."""
        size = sum(array.nbytes for array in self.sample(1))
        fitting = max(1, WARM_BYTES // max(1, size)) if warm_s < math.inf else warm_rows
        most = min(warm_rows, fitting) if self.signature.batch == "dynamic" else 1
        rows, spent = 0, 0.0
        # One row does not show whether rows come out one by one; for a bare graph that is known already.
        least = 1 if self._is_bare else 2
        while rows < most and (rows < least or spent < warm_s):
            rows = min(most, 4 * rows or 1)
            sample = self.sample(rows)
            began = time.monotonic()
            try:
                outputs = aside(self.run, sample)
            except InferenceFailed as error:
                if self._is_bare and self.example is None and len(self._likely) > 1:
                    del self._likely[0]
                    rows = 0
                    continue
                if self.signature.example is None or (isinstance(error, _TooLarge) and rows > least):
                    break  # a bare graph may well refuse made-up inputs, and many rows take more memory than few
                raise ModelInvalid(f"it fails on its own example: {error.message}") from error
            spent = time.monotonic() - began
            # An example whose answer has another rank than is said (axes were made up) would mislead.
            said = zip(outputs, self.signature.outputs, strict=True)
            if self.example is None and all(not spec.shape or output.ndim == len(spec.shape) for output, spec in said):
                self.example = sample
            try:
                self._check_outputs(outputs, rows)
            except ModelInvalid:
                if self._is_bare:
                    break  # its signature was guessed from made-up inputs, and these are others
                raise

    def _check_outputs(self, outputs: Tensors, rows: int) -> None:
        for spec, array in zip(self.signature.outputs, outputs, strict=True):
            datatype = DATATYPE_OF.get(array.dtype)
            alike = len(spec.shape) == array.ndim and datatype == spec.datatype
            if not alike or any(d not in (-1, a) for d, a in zip(spec.shape, array.shape, strict=True)):
                declared = f"{spec.datatype} {list(spec.shape)}"
                raise ModelInvalid(
                    f"output {spec.name} is {datatype} {list(array.shape)}, and its signature declares {declared}"
                )
            if self.signature.batch == "dynamic" and (array.ndim == 0 or array.shape[0] != rows):
                raise ModelInvalid(f"output {spec.name} has {list(array.shape)} for {rows} rows: not one a row")

    def sample(self, rows: int) -> Tensors:
        """Make `rows` rows of valid input: the signature's example, or what a bare graph is likely to take."""
        return self._made_up(rows, self._likely[0]) if self._is_bare else sample_of(self.signature, rows)


def sample_of(signature: Signature, rows: int) -> Tensors:
    """Make `rows` rows of a signature's example."""
    example = signature.example or {}
    cells = [example.get(feature.name, _blank(feature)) for feature in signature.features]
    one = Rows(signature, "sample").arrays([cells])
    return tuple(np.repeat(array, rows, axis=0) for array in one) if signature.batch == "dynamic" else one


def _blank(feature: Feature) -> Any:
    shape = [1 if dim == -1 else dim for dim in feature.shape]
    return np.full(shape, "" if feature.datatype == "BYTES" else 0, object).tolist()


def _unzip(maps: list[dict[Any, float]], keys: tuple[Any, ...]) -> Array:
    return np.array([[row[key] for key in keys] for row in maps], dtype=np.float32)
