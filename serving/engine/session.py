"""The only owner of onnxruntime: one loaded ONNX file, its signature, and `run`.

Sequence-of-map outputs (ZipMap, the default of scikit-learn exporters) come out as one [batch, classes] tensor, so
that nothing after this file knows of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from pydantic import ValidationError

from serving.engine import signature_inference
from serving.engine.signature import METADATA_KEY, Signature
from serving.engine.signature_inference import ZIPMAPS, Port, Probe
from serving.errors import InferenceFailed, ModelInvalid, QueueFull, ServingError
from serving.linux import memory_maps
from serving.linux.allocator import resident
from serving.linux.thread_scheduling import Aside, lowest_priority
from serving.tensors import DATATYPE_OF, FLOATS, NUMPY, ONNX, Array, Overriding, Tensors

log = logging.getLogger("serving.session")

WARM_BYTES = 16 * 1024 * 1024
"""Most that a warm-up feeds a model: images by the hundred would take memory that no client asked for."""

WARM_S = 0.01
"""Seconds of one run from which larger batches are not tried: what they allocate costs little beside what they compute,
and others serve meanwhile."""

_GIVE_BACK = ort.RunOptions()
_GIVE_BACK.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
_GIVE_BACK.log_severity_level = 4
_GIVE_BACK.terminate = True
BF16 = "tensor(bfloat16)"
BF16_ELEMENT = 16
"""Its number among ONNX element types (TensorProto.DataType)."""

LIGHT_S = 0.0001
"""Seconds of one row up to which a small model gets no threads of its own beside the one that runs it."""

TRIM_BYTES = 1024 * 1024
"""Size of a file from which what reading it took is given back to the system: the allocator would keep nearly all."""

WEIGHTS_FILE = "weights.bin"
"""Where the prepared form of a model has its weights."""

_MAPPING = threading.Lock()
_MAKING = threading.Lock()
_CPU_MEMORY = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
_AS_ASKED = 1
"""An arena grows by what is asked for; onnxruntime's own way doubles it, which ends at half of a limit."""
_LIMITED = "is smaller than requested bytes"
_NO_MEMORY = re.compile(_LIMITED + "|bad_alloc|bad allocation")
# Its own name and code, the file once more, and the place in its source, with the function as the compiler writes it.
_NOISE = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from \S+ failed:"
    r"|/\S+\.\w+:\d+ [^()]*\(.*?\)(?: const)?(?:::<lambda\(.*?\)>)?(?: \[with .*?\])? (?=\S)"
    r"|(?<=[ .:])[\w/]+\.(?:cc|h):\d+ \w+ "
    r"|/\S+\.(?:cc|h|cpp|hpp|inl):\d+"
)

ORT_ERRORS: tuple[type[Exception], ...] = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    ort_errors.EPFail,
    RuntimeError,
    ValueError,
    TypeError,
)
ort.set_default_logger_severity(4)  # its messages go to stderr with source paths; errors reach us as exceptions


class _TooLarge(InferenceFailed):
    """A run needs more memory than it may take."""


class OnnxSession:
    """One ONNX file, ready to run.

    `run` takes arrays in the order of `signature.inputs` and gives arrays in the order of `signature.outputs`.
    prepared: the file is one that `write_prepared` wrote. warm_rows: the largest batch that is tried, in steps that end
    where a run takes `warm_s` seconds. quiet: others serve meanwhile, and have the processor first. memory_bytes: most
    that its runs and their answers may take at a time, beside the weights; None bounds them by nothing.
    Raises ModelInvalid where the file is no ONNX, is truncated, or is not what its own signature says.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int = 1,
        warm_rows: int = 2,
        warm_s: float = WARM_S,
        prepared: bool = False,
        quiet: bool = False,
        memory_bytes: int | None = None,
    ) -> None:
        self.memory_bytes = memory_bytes
        self._running: set[int] = set()
        self._ended = 0
        with Aside(apart=quiet) as aside:
            # Where there are hundreds of small models, threads that help none of them would be thousands.
            small = threads > 1 and not prepared and path.stat().st_size < TRIM_BYTES
            self._load(path, threads=1 if small else threads, prepared=prepared, quiet=quiet, aside=aside)
            self._warm(warm_rows, warm_s, aside)
            if small and self._row_seconds(aside) > LIGHT_S:
                self._load(path, threads=threads, prepared=prepared, quiet=quiet, aside=aside)
                self._warm(warm_rows, warm_s, aside)

    def _row_seconds(self, aside: Aside) -> float:
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

    def _load(self, path: Path, *, threads: int, prepared: bool, quiet: bool, aside: Aside) -> None:
        options = _options(threads)
        if prepared:  # the graph is optimised already; another pass could lose the packed weights that belong to it
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if prepared:
            self._session, pages = _mapping_session(path, options, aside, self.memory_bytes, quiet=quiet)
            weakref.finalize(self, memory_maps.part, self._session, pages).atexit = False
        else:
            weights = sum(file.stat().st_size for file in path.parent.iterdir()) if self.memory_bytes is not None else 0
            self._session = aside(_session, path, options, self.memory_bytes, weights_bytes=weights, quiet=quiet)
        ports = (
            *self._session.get_inputs(),
            *self._session.get_overridable_initializers(),
            *self._session.get_outputs(),
        )
        # Functions and not methods: a session that knows itself would keep its memory until the collector came by.
        self._call = _run_values if any(p.type == BF16 for p in ports) else _run_arrays
        self._input_names = [port.name for port in self._session.get_inputs()]
        self._output_names = [port.name for port in self._session.get_outputs()]
        self._dimension_names = {port.name: _named(port.shape) for port in self._session.get_inputs()}
        self._zipped: dict[int, tuple[Any, ...]] = {}
        self.path, self.prepared = path, prepared
        self._failures = 0
        self._complained = 0.0
        self.threads = threads
        own = self._own_signature()
        self._is_bare = own is None
        self._values = signature_inference.TYPICAL
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
        self._running.add(me)
        ended = self._ended
        try:
            raw = self._called(feeds)
        except ORT_ERRORS as error:
            self._complain(error)
            if _NO_MEMORY.search(str(error)):
                alone = self._running == {me} and self._ended == ended
                raise self._too_large(limited=_LIMITED in str(error), alone=alone) from error
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
            return self._call(self._session, feeds, None)
        except ORT_ERRORS as error:
            if not _NO_MEMORY.search(str(error)):
                raise
        # What runs of other sizes have left lies in pieces that are too small for this one.
        self.give_back()
        return self._call(self._session, feeds, None)

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
        feeds = dict(zip(self._input_names, self.sample(1), strict=True))
        # Only the end of a run shrinks an arena. This one ends before its first node.
        with contextlib.suppress(*ORT_ERRORS):
            self._call(self._session, feeds, _GIVE_BACK)

    @property
    def dimension_names(self) -> list[tuple[str | None, ...]]:
        """What the graph calls the dimensions of each input; None for those without a name."""
        return [self._dimension_names[spec.name] for spec in self.signature.inputs]

    def _complain(self, error: Exception) -> None:
        """Log a failure, once a second at most: looking for the culprit in a batch makes many."""
        self._failures += 1
        now = time.monotonic()
        if now - self._complained >= 1:
            log.warning("inference failed: %s (%d runs since the last such line)", _first_line(error), self._failures)
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

    def _bare_signature(self, aside: Aside) -> Signature:
        inputs = [Port(p.name, p.type, tuple(p.shape)) for p in self._session.get_inputs()]
        outputs = [Port(p.name, p.type, tuple(p.shape)) for p in self._session.get_outputs()]
        found = signature_inference.describe(inputs, outputs, lambda made_up: aside(self._probe, made_up))
        self._zipped = found.zipped
        self._made_up = lambda rows, values: signature_inference.made_up(
            inputs, [rows] * len(inputs), found.inner, values
        )
        weights = [Port(p.name, p.type, tuple(p.shape)) for p in self._session.get_overridable_initializers()]
        optional = tuple(port.spec("input") for port in weights if port.type in ONNX)
        return found.signature.model_copy(update={"optional": optional})

    def _probe(self, inputs: Tensors) -> Probe:
        """Run on made-up inputs; None where the graph refuses them, which says nothing against it."""
        try:
            return self._call(self._session, dict(zip(self._input_names, inputs, strict=True)), None)
        except ORT_ERRORS:
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

    def _warm(self, warm_rows: int, warm_s: float, aside: Aside) -> None:
        """Run at growing batch sizes: the first run of a size allocates, and a client would wait for it."""
        size = sum(array.nbytes for array in self.sample(1))
        most = min(warm_rows, max(1, WARM_BYTES // max(1, size))) if self.signature.batch == "dynamic" else 1
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
                if self._is_bare and self.example is None and self._values is signature_inference.TYPICAL:
                    self._values, rows = signature_inference.ZEROS, 0
                    continue
                if self.signature.example is None or (isinstance(error, _TooLarge) and rows > least):
                    break  # a bare graph may well refuse made-up inputs, and many rows take more memory than few
                raise ModelInvalid(f"it fails on its own example: {error.message}") from error
            spent = time.monotonic() - began
            if self.example is None:
                self.example = sample
            try:
                self._check_outputs(outputs, rows)
            except ModelInvalid:
                if self._is_bare:
                    break  # its signature was guessed from made-up inputs, and these are others
                raise

    def _check_outputs(self, outputs: Tensors, rows: int) -> None:
        for spec, array in zip(self.signature.outputs, outputs, strict=True):
            actual = DATATYPE_OF.get(array.dtype)
            if actual != spec.datatype:
                raise ModelInvalid(f"output {spec.name} is {actual}, and its signature declares {spec.datatype}")
            fits = len(spec.shape) == array.ndim and all(
                d in (-1, a) for d, a in zip(spec.shape, array.shape, strict=True)
            )
            if not fits:
                declared, got = list(spec.shape), list(array.shape)
                raise ModelInvalid(f"output {spec.name} has shape {got}, and its signature declares {declared}")
            if self.signature.batch == "dynamic" and (array.ndim == 0 or array.shape[0] != rows):
                raise ModelInvalid(f"output {spec.name} has {list(array.shape)} for {rows} rows: not one a row")

    def sample(self, rows: int) -> Tensors:
        """Make `rows` rows of valid input: the signature's example, or what a bare graph is likely to take."""
        signature = self.signature
        if self._is_bare:
            return self._made_up(rows, self._values)
        values = signature.example or {}
        if signature.layout == "matrix":
            spec = signature.inputs[0]
            row = [values.get(f.name, _blank(spec.datatype)) for f in signature.features]
            row = [_missing(spec.datatype) if v is None else v for v in row]
            return (np.repeat(np.array([row], dtype=NUMPY[spec.datatype]), rows, axis=0),)
        return tuple(
            _filled(spec.datatype, _concrete(spec.shape, rows), values.get(feature.name, _blank(spec.datatype)))
            for spec, feature in zip(signature.inputs, signature.features, strict=True)
        )


def _run_arrays(session: ort.InferenceSession, feeds: dict[str, Array], options: Any) -> list[Any]:
    return list(session.run(None, feeds, options))


def _run_values(session: ort.InferenceSession, feeds: dict[str, Array], options: Any) -> list[Any]:
    """Run where arrays will not do: onnxruntime takes and gives BF16 as its own values only."""
    values = {name: _value(array) for name, array in feeds.items()}
    return [_array(value) for value in session.run_with_ort_values(None, values, options)]


def write_prepared(path: Path, to: Path) -> None:
    """Write the optimised graph of `path` to `to`, and its weights, packed for this processor, beside it.

    Processes that load it map the weights, and share one copy. Only for the same onnxruntime and processor. Raises
    ModelInvalid.
    """
    options = _options(1)
    options.optimized_model_filepath = str(to)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", WEIGHTS_FILE)
    # Below a page nothing is gained by mapping.
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "4096")
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    _session(path, options)


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # A spinning thread holds a core that another worker could use, for microseconds at most.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    return options


class _Lowering:
    """Names no optimizer to leave out, and puts the thread that asks behind all others.

    onnxruntime asks when it has made the session's threads, which keep the priority of who made them and serve later,
    and before it does the work of loading.
    """

    def __iter__(self) -> Iterator[str]:
        lowest_priority()
        return iter(())


def _session(
    path: Path,
    options: ort.SessionOptions,
    memory_bytes: int | None = None,
    *,
    weights_bytes: int = 0,
    quiet: bool = False,
) -> ort.InferenceSession:
    left_out = _Lowering() if quiet else None
    make = partial(
        ort.InferenceSession, str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=left_out
    )
    try:
        return make() if memory_bytes is None else _bounded(make, options, memory_bytes, weights_bytes)
    except ORT_ERRORS as error:
        raise ModelInvalid(f"not a model that onnxruntime can load: {plain(_first_line(error), path)}") from error


def _bounded(
    make: Callable[[], ort.InferenceSession], options: ort.SessionOptions, memory_bytes: int, weights_bytes: int
) -> ort.InferenceSession:
    """Make a session whose arena is bounded: it takes the one that is registered meanwhile, and keeps it."""
    options.add_session_config_entry("session.use_env_allocators", "1")
    limit = memory_bytes + weights_bytes
    with _MAKING:
        while True:
            arena = ort.OrtArenaCfg({"max_mem": limit, "arena_extend_strategy": _AS_ASKED})
            ort.create_and_register_allocator(_CPU_MEMORY, arena)
            before = resident()
            session = make()
            grown = resident() - before
            if grown <= limit:
                return session
            # Weights count too, those that were computed in loading among them. Are they more than the limit, the
            # arena takes it for none.
            del session
            limit = memory_bytes + grown


def _mapping_session(
    path: Path, options: ort.SessionOptions, aside: Aside, memory_bytes: int | None, *, quiet: bool
) -> tuple[ort.InferenceSession, list[memory_maps.Range]]:
    """Make a session, and find the pages of its weights; one at a time, so that none gets another's."""
    weights = path.with_name(WEIGHTS_FILE)
    with _MAPPING:
        before = memory_maps.ranges(weights)
        session = aside(_session, path, options, memory_bytes, quiet=quiet)
        return session, memory_maps.added(before, memory_maps.ranges(weights))


def _named(shape: list[Any]) -> tuple[str | None, ...]:
    return tuple(dim if isinstance(dim, str) else None for dim in shape)


def _concrete(shape: tuple[int, ...], rows: int) -> tuple[int, ...]:
    return tuple((rows if i == 0 else 1) if dim == -1 else dim for i, dim in enumerate(shape))


def _filled(datatype: str, shape: tuple[int, ...], value: Any) -> Array:
    if value is None:
        value = _missing(datatype)
    array = np.array(value, dtype=NUMPY[datatype])
    if array.ndim and array.size != 1:
        return np.ascontiguousarray(np.broadcast_to(array, (shape[0], *array.shape)))
    full: Array = np.full(shape, array.item() if array.ndim == 0 else array.ravel()[0], dtype=NUMPY[datatype])
    return full


def _blank(datatype: str) -> Any:
    return "" if datatype == "BYTES" else 0


def _missing(datatype: str) -> Any:
    return "" if datatype == "BYTES" else np.nan if datatype in FLOATS else 0


def _unzip(maps: list[dict[Any, float]], keys: tuple[Any, ...]) -> Array:
    return np.array([[row[key] for key in keys] for row in maps], dtype=np.float32)


def _value(array: Array) -> ort.OrtValue:
    if array.dtype != NUMPY["BF16"]:
        return ort.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"))
    # Shares the memory of `array`, which the caller holds until the run is over.
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
        np.asarray(array, order="C").view(np.uint16), onnx_element_type=BF16_ELEMENT
    )


def _array(value: ort.OrtValue) -> Any:
    if value.data_type() != BF16:
        return value.numpy()
    raw = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    return np.frombuffer(raw, NUMPY["BF16"]).reshape(value.shape())


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


def plain(text: str, path: Path) -> str:
    """Keep what helps of onnxruntime's words on a file (the reason), and drop folders and where its source says so."""
    return _NOISE.sub("", text.replace(str(path), path.name)).replace(str(path.parent), ".")[:300]
