"""How onnxruntime is used: sessions are made with its options, arenas are bounded, and its errors put in plain words.

Only this file and `every_value` import it; `session` is what the server knows of a loaded model.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from serving.engine.providers import CPU, Provider
from serving.errors import ModelInvalid
from serving.linux.thread_scheduling import Call, lowest_priority
from serving.tensors import NUMPY, Array

EXTENSIONS = ("ai.onnx.contrib", "com.microsoft.extensions")
"""Domains of the operators of onnxruntime-extensions: tokenizers and sound in the first, pictures in the second."""
LIMITED = "is smaller than requested bytes"
_AVAILABLE = re.compile(rf"Available memory of (\d+) {LIMITED}")
NO_MEMORY = re.compile(LIMITED + "|bad_alloc|bad allocation|Failed to allocate memory")

_BF16 = "tensor(bfloat16)"
_BF16_ELEMENT = 16
"""Its number among ONNX element types (TensorProto.DataType)."""
_CPU_MEMORY = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
_AS_ASKED = 1
"""An arena grows by what is asked for; onnxruntime's own way doubles it, which ends at half of a limit."""
_GIVE_BACK = ort.RunOptions()
_GIVE_BACK.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
_GIVE_BACK.log_severity_level = 4
_GIVE_BACK.terminate = True
_UNREACHED = 1 << 62
"""Bytes that no machine has."""
_MAKING = threading.Lock()
"""The arena that is registered is one for the whole process: two sessions made at once would swap their limits."""
# Its own name and code, the file once more, and the place in its source, with the function as the compiler writes it.
_NOISE = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from \S+ failed:"
    r"|/\S+\.\w+:\d+ [^()]*\(.*?\)(?: const)?(?:::<lambda\(.*?\)>)?(?: \[with .*?\])? (?=\S)"
    r"|(?<=[ .:])[\w/]+\.(?:cc|h):\d+ \w+ "
    r"|/\S+\.(?:cc|h|cpp|hpp|inl):\d+"
)

ERRORS: tuple[type[Exception], ...] = (
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
"""What it raises for a model or for inputs."""
ort.set_default_logger_severity(4)  # its messages go to stderr with source paths; errors reach us as exceptions

Run = Callable[[ort.InferenceSession, dict[str, Array], "ort.RunOptions | None"], list[Any]]


def options(threads: int) -> ort.SessionOptions:
    """Make the options that every session here has; threads: that one run may use, its own among them."""
    made = ort.SessionOptions()
    made.intra_op_num_threads = threads
    made.inter_op_num_threads = 1
    # A spinning thread holds a core that another worker could use, for microseconds at most.
    made.add_session_config_entry("session.intra_op.allow_spinning", "0")
    made.log_severity_level = 4
    return made


def load(
    path: Path,
    *,
    threads: int,
    aside: Call,
    prepared: bool = False,
    quiet: bool = False,
    memory_bytes: int | None = None,
    providers: Sequence[Provider] = (),
) -> ort.InferenceSession:
    """Load a model that somebody has exported or, `prepared`, what `write_prepared` wrote.

    Raises ModelInvalid, also where a provider does not start.
    """
    chosen = options(threads)
    if prepared:
        # It is optimised already; another pass could lose the packed weights that belong to it.
        chosen.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # What a prepared form maps is in no arena.
    weights = 0 if prepared else sum(file.stat().st_size for file in path.parent.iterdir())
    session = aside(_make, path, chosen, memory_bytes, weights_bytes=weights, quiet=quiet, providers=providers)
    # onnxruntime goes on without a provider that does not start, and says nothing.
    absent = [provider.name for provider in providers if provider.name not in session.get_providers()]
    if absent:
        raise ModelInvalid(f"{', '.join(absent)} does not start on this machine: see to its driver and libraries")
    return session


def write_prepared(path: Path, to: Path) -> None:
    """Write the optimised graph of `path` to `to`, and its weights, packed for this processor, beside it.

    Processes that load it map the weights, and share one copy. Only for the same onnxruntime and processor. Raises
    ModelInvalid.
    """
    chosen = options(1)
    chosen.optimized_model_filepath = str(to)
    chosen.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
    # Below a page nothing is gained by mapping.
    chosen.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "4096")
    chosen.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    _make(path, chosen)


def _make(
    path: Path,
    chosen: ort.SessionOptions,
    memory_bytes: int | None = None,
    *,
    weights_bytes: int = 0,
    quiet: bool = False,
    providers: Sequence[Provider] = (),
) -> ort.InferenceSession:
    # onnxruntime iterates over `disabled_optimizers` once the session has its threads, which keep the priority of the
    # thread that made them and serve later, and before the work of loading.
    make = partial(
        ort.InferenceSession,
        str(path),
        chosen,
        providers=[*((provider.name, provider.options) for provider in providers), CPU],
        disabled_optimizers=_none_but_lower_priority() if quiet else None,
    )
    made = make if memory_bytes is None else partial(_bounded, make, chosen, memory_bytes, weights_bytes)
    try:
        return extended(made, chosen)
    except ERRORS as error:
        if providers:  # their own words come last, behind how they were called
            raise ModelInvalid(plain(str(error).strip().rsplit("\n", 1)[-1], path)) from error
        raise ModelInvalid(f"not a model that onnxruntime can load: {plain(first_line(error), path)}") from error


def extended(make: Callable[[], ort.InferenceSession], chosen: ort.SessionOptions) -> ort.InferenceSession:
    """Make a session; of a model with operators of onnxruntime-extensions with the library of these.

    Whether such a model may be loaded at all is the gate's to say, before anything here.
    """
    try:
        return make()
    except ERRORS as error:
        library = extensions_library()
        if library is None or not any(domain in str(error) for domain in EXTENSIONS):
            raise
    chosen.register_custom_ops_library(str(library))
    return make()


def extensions_library() -> Path | None:
    """Return the library of onnxruntime-extensions, without importing that; None where it is not installed."""
    found = find_spec("onnxruntime_extensions")
    folders = (found.submodule_search_locations if found else None) or ()
    return next((path for folder in folders for path in Path(folder).glob("_extensions_pydll*.so")), None)


def _none_but_lower_priority() -> Iterator[str]:
    """Name no optimizer, and put the thread that loads behind all others."""
    lowest_priority()
    yield from ()


def _bounded(
    make: Callable[[], ort.InferenceSession], chosen: ort.SessionOptions, memory_bytes: int, weights_bytes: int
) -> ort.InferenceSession:
    """Make a session whose arena is bounded: it takes the one that is registered meanwhile, and keeps it."""
    chosen.add_session_config_entry("session.use_env_allocators", "1")
    limit = memory_bytes + weights_bytes
    with _MAKING:
        session = _in_arena(make, limit)
        left = _left(session)
        if left is not None and abs(left - memory_bytes) <= memory_bytes // 100:
            return session
        # Weights count too, those that were computed in loading among them, and where they exceed the limit, the arena
        # ignores it: what they take is found by a limit that nothing exceeds.
        if left is None:
            del session
            limit = _UNREACHED
            session = _in_arena(make, limit)
            left = _left(session) or 0
        del session
        return _in_arena(make, memory_bytes + limit - left)


def _in_arena(make: Callable[[], ort.InferenceSession], limit: int) -> ort.InferenceSession:
    arena = ort.OrtArenaCfg({"max_mem": limit, "arena_extend_strategy": _AS_ASKED})
    ort.create_and_register_allocator(_CPU_MEMORY, arena)
    return make()


def _left(session: ort.InferenceSession) -> int | None:
    """Return how many bytes the arena of this session may take yet; None where it holds more than its limit.

    What the process grows by would say less: others load models, and let them go, meanwhile.
    """
    try:
        session.create_ortvalue_from_shape_and_type([_UNREACHED // 4], np.float64, "cpu")
    except ERRORS as error:
        said = _AVAILABLE.search(str(error))
        if said or NO_MEMORY.search(str(error)):
            return int(said[1]) if said else None
        raise
    return None


def runner(session: ort.InferenceSession) -> Run:
    """Return what runs this session: outputs in the order of its graph, as numpy arrays or lists of maps (ZipMap).

    A function, and no method of an object that has the session: that would keep its memory until the collector came by.
    """
    ports = (*session.get_inputs(), *session.get_overridable_initializers(), *session.get_outputs())
    return _run_values if any(port.type == _BF16 for port in ports) else _run_arrays


def give_back(session: ort.InferenceSession, run: Run, feeds: dict[str, Array]) -> None:
    """Give the memory that runs have taken, and that none needs now, back to the system."""
    # Only the end of a run shrinks an arena. This one ends before its first node.
    with contextlib.suppress(*ERRORS):
        run(session, feeds, _GIVE_BACK)


def _run_arrays(session: ort.InferenceSession, feeds: dict[str, Array], chosen: ort.RunOptions | None) -> list[Any]:
    return list(session.run(None, feeds, chosen))


def _run_values(session: ort.InferenceSession, feeds: dict[str, Array], chosen: ort.RunOptions | None) -> list[Any]:
    """Run where arrays will not do: onnxruntime takes and gives BF16 as its own values only."""
    values = {name: _value(array) for name, array in feeds.items()}
    return [_array(value) for value in session.run_with_ort_values(None, values, chosen)]


def _value(array: Array) -> ort.OrtValue:
    if array.dtype != NUMPY["BF16"]:
        return ort.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"))
    # Shares the memory of `array`, which the caller holds until the run is over.
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
        np.asarray(array, order="C").view(np.uint16), onnx_element_type=_BF16_ELEMENT
    )


def _array(value: ort.OrtValue) -> Any:
    if value.data_type() != _BF16:
        return value.numpy()
    memory = {"version": 3, "shape": tuple(value.shape()), "typestr": "<u2", "data": (value.data_ptr(), True)}
    return np.array(SimpleNamespace(__array_interface__=memory)).view(NUMPY["BF16"])  # copied: the value goes


def first_line(error: Exception) -> str:
    """Return the line of an error that says something to people."""
    return str(error).strip().split("\n", 1)[0]


def plain(text: str, path: Path) -> str:
    """Keep what helps of onnxruntime's words on a file (the reason), and drop folders and where its source says so."""
    return _NOISE.sub("", text.replace(str(path), path.name)).replace(str(path.parent), ".")[:300]
