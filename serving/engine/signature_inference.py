"""Reads a signature from a graph that carries none: a user's own bare `.onnx`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from serving.engine.signature import Batch, Feature, Signature, TensorSpec
from serving.errors import ModelInvalid
from serving.tensors import DATATYPE_OF, FLOATS, NUMPY, ONNX, Tensors

ZIPMAPS = {"seq(map(string,tensor(float)))": "BYTES", "seq(map(int64,tensor(float)))": "INT64"}
PROBE_ROWS = (3, 5)
ZEROS: dict[str, Any] = {**dict.fromkeys(NUMPY, 0), "BYTES": ""}
_ONES: dict[str, Any] = {**dict.fromkeys(NUMPY, 1), "BYTES": "a"}
LIKELY = ({**_ONES, **dict.fromkeys(FLOATS, 0.5)}, _ONES, ZEROS)
"""What inputs may take, the likeliest first: zero is no size and divides nothing, and scales and depths are whole."""

Probe: TypeAlias = list[Any] | None
Run: TypeAlias = tuple[int, list[Any]]
"""Rows, and the outputs for them."""


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output as onnxruntime states it: dims are ints, names of free dims, or None."""

    name: str
    type: str
    shape: tuple[int | str | None, ...]

    def spec(self, role: str) -> TensorSpec:
        """Give it in our words. Raises ModelInvalid, with its role (input, output), for types no protocol carries."""
        if self.type not in ONNX:
            raise ModelInvalid(
                f"{role} {self.name} is of type {self.type}, which no protocol here carries: make it a plain tensor"
            )
        dims = tuple(d if isinstance(d, int) and d >= 0 else -1 for d in self.shape)
        return TensorSpec(name=self.name, datatype=ONNX[self.type], shape=dims)


class Inferred(NamedTuple):
    """What was found out of a graph.

    zipped: of each output that is a sequence of maps, its keys in order. inner: a size of free inner dimensions that
    it takes, as far as that was found.
    """

    signature: Signature
    zipped: dict[int, tuple[Any, ...]]
    inner: int


def describe(inputs: list[Port], outputs: list[Port], probe: Callable[[Tensors], Probe]) -> Inferred:
    """Read a signature from the ports, and run `probe` on made-up rows to learn what they do not say."""
    specs = tuple(port.spec("input") for port in inputs)
    batch = _batch(specs)
    numbers = PROBE_ROWS if batch == "dynamic" else (1,)
    inner, runs = _try(inputs, numbers, probe)
    zipped = _zipped(outputs, runs)
    for index, port in enumerate(outputs):
        if index not in zipped:
            port.spec("output")  # a type that no protocol carries is refused
    if batch != "none" and not _one_a_row(inputs, outputs, runs, zipped, len(numbers)):
        batch = "none"
    # A rank may be decided by whole numbers (axes, a shape), and those of a probe are made up.
    by_value = any(spec.datatype not in FLOATS for spec in specs)
    output_specs = tuple(
        _output(port, [seen[index] for _, seen in runs], zipped.get(index), declared=by_value, batch=batch)
        for index, port in enumerate(outputs)
    )
    layout, features = _features(specs, batch)
    label, scores = _roles(output_specs)
    classes = next(iter(zipped.values()), None)
    signature = Signature(
        task="classification" if label and scores else "other",
        inputs=specs,
        outputs=output_specs,
        layout=layout,
        batch=batch,
        features=features,
        label=label,
        scores=scores,
        classes=classes,
    )
    return Inferred(signature, zipped, inner)


def _batch(specs: tuple[TensorSpec, ...]) -> Batch:
    if not specs:
        return "none"
    if all(spec.shape and spec.shape[0] == -1 for spec in specs):
        return "dynamic"
    if all(spec.shape and spec.shape[0] == 1 for spec in specs):
        return "one"
    return "none"


def _try(inputs: list[Port], numbers: Sequence[int], probe: Callable[[Tensors], Probe]) -> tuple[int, list[Run]]:
    """Run on made-up rows, so many of them: the size of free inner dimensions, and the runs; none where it refuses."""
    for inner in (1, 4, 16, 64):  # a free inner dimension may still have a least size
        seen = probe(made_up(inputs, [numbers[0]] * len(inputs), inner, ZEROS))
        if seen is None:
            continue
        runs = [(numbers[0], seen)]
        for rows in numbers[1:]:
            more = probe(made_up(inputs, [rows] * len(inputs), inner, ZEROS))
            runs += [(rows, more)] if more is not None else []
        apart = _apart(inputs) if len(numbers) > 1 else []
        if apart and probe(made_up(inputs, apart, inner, ZEROS)) is not None:
            return inner, runs[:1]
        return inner, runs
    return 1, []


def _apart(inputs: list[Port]) -> list[int]:
    """Return another number of rows for each input whose first dimension may be another than the others' by its name.

    What takes that has no common batch: texts and an image, two matrices. Nothing where there is no such input.
    """
    firsts = [port.shape[0] for port in inputs]
    groups = [str(first) if isinstance(first, str) else f"{index}" for index, first in enumerate(firsts)]
    kinds = sorted(set(groups))
    return [2 + kinds.index(group) for group in groups] if len(kinds) > 1 else []


def made_up(inputs: list[Port], rows: list[int], inner: int, values: dict[str, Any]) -> Tensors:
    """Make inputs of one value for each datatype, so many rows in each; dimensions of equal names have equal sizes."""
    sizes = {port.shape[0]: number for port, number in zip(inputs, rows, strict=True) if port.shape}
    arrays = []
    for port, number in zip(inputs, rows, strict=True):
        spec = port.spec("output")
        wanted = [
            number if i == 0 else sizes.get(d, inner) if isinstance(d, str) else inner for i, d in enumerate(port.shape)
        ]
        shape = tuple(size if dim == -1 else dim for dim, size in zip(spec.shape, wanted, strict=True))
        arrays.append(np.full(shape, values[spec.datatype], dtype=NUMPY[spec.datatype]))
    return tuple(arrays)


def _zipped(outputs: list[Port], runs: list[Run]) -> dict[int, tuple[Any, ...]]:
    zipped: dict[int, tuple[Any, ...]] = {}
    for index, port in enumerate(outputs):
        if port.type in ZIPMAPS:
            if not runs or not runs[0][1][index]:
                raise ModelInvalid(
                    f"output {port.name} is of type {port.type}, and the graph ran on no made-up rows that would "
                    "tell its keys: export with zipmap=False"
                )
            zipped[index] = tuple(runs[0][1][index][0])
    return zipped


def _output(port: Port, seen: list[Any], keys: tuple[Any, ...] | None, *, declared: bool, batch: Batch) -> TensorSpec:
    """Describe an output by what came out.

    declared: a rank that the graph gives counts for more than a probe's, and one that it does not give stays unknown
    where there are no rows.
    """
    if keys is not None:
        return TensorSpec(name=port.name, datatype="FP32", shape=(-1, len(keys)))
    spec = port.spec("output")
    if not seen:
        return spec
    # Exporters often leave an output's shape out, or wrong; what came out is the truth.
    if any(len(spec.shape) != array.ndim for array in seen):
        shape = spec.shape if declared and (spec.shape or batch == "none") else (-1,) * seen[0].ndim
    else:
        shape = tuple(
            d if all(d == got for got in sizes) else -1
            for d, *sizes in zip(spec.shape, *(array.shape for array in seen), strict=True)
        )
    spec = spec.model_copy(update={"shape": shape})
    return spec.model_copy(update={"datatype": DATATYPE_OF[seen[0].dtype]})


def _one_a_row(
    inputs: list[Port], outputs: list[Port], runs: list[Run], zipped: dict[int, tuple[Any, ...]], due: int
) -> bool:
    """Tell whether outputs have one row for each of input: as `due` runs showed or, without any, as the graph says."""
    if not runs:
        names = {port.shape[0] for port in inputs}
        return len(names) == 1 and all(port.shape and port.shape[0] in names for port in outputs)
    return len(runs) == due and all(
        len(value) == rows if index in zipped else value.ndim > 0 and value.shape[0] == rows
        for rows, seen in runs
        for index, value in enumerate(seen)
    )


def _features(specs: tuple[TensorSpec, ...], batch: Batch) -> tuple[Any, tuple[Feature, ...]]:
    # Nothing says that a float must be finite, or there: the graph itself decides.
    free = {spec.datatype: dict.fromkeys(("nullable", "allow_non_finite"), spec.datatype in FLOATS) for spec in specs}
    first = specs[0] if len(specs) == 1 and batch != "none" else None
    if first is not None and len(first.shape) == 2 and first.shape[1] > 1:
        kind = first.datatype
        return "matrix", tuple(Feature(name=f"f{i}", datatype=kind, **free[kind]) for i in range(first.shape[1]))
    features = []
    for spec in specs:
        shape = spec.shape if batch == "none" else spec.shape[1:]
        if batch != "none" and shape == (1,):
            shape = ()  # [batch, 1] is how exporters write a column: a scalar to its user
        features.append(Feature(name=spec.name, datatype=spec.datatype, shape=shape, **free[spec.datatype]))
    return "columns", tuple(features)


def _roles(outputs: tuple[TensorSpec, ...]) -> tuple[str | None, str | None]:
    """Find label and scores where the outputs are the two that classifiers have everywhere."""
    if len(outputs) != 2:
        return None, None
    label, scores = outputs
    labels = label.datatype in ("INT64", "BYTES") and len(label.shape) == 1
    by_class = scores.datatype == "FP32" and len(scores.shape) == 2
    return (label.name, scores.name) if labels and by_class else (None, None)
