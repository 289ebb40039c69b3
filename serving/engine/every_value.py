"""Runs a graph with all its values as outputs, unoptimised: what its rules are checked against (`batch_graph`).

Shapes are not inferred: they are seen, at several numbers of rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

from serving.engine import runtime
from serving.tensors import Array, count

_SMALL = 65536
"""Elements of a weight up to which its content is looked at."""


class Observed(NamedTuple):
    """One run: how many rows it had, the shape of each value, and the content of those that were to be kept.

    A sequence counts as one dimension.
    """

    rows: int
    shapes: Mapping[str, tuple[int, ...]]
    arrays: Mapping[str, Array]


class EveryValue:
    """One graph, loaded for that. folder: where its external data is. keep: names of values whose content is kept.

    Raises what onnxruntime raises.
    """

    def __init__(self, model: onnx.ModelProto, folder: Path, *, keep: Collection[str]) -> None:
        self._keep = keep
        seen = onnx.ModelProto()
        seen.CopyFrom(model)
        there = {port.name for port in seen.graph.output}
        made = dict.fromkeys(name for node in seen.graph.node for name in node.output if name)
        seen.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made if name not in there)
        options = runtime.options(1)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        self._session = ort.InferenceSession(seen.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self._names = [port.name for port in self._session.get_outputs()]

    def run(self, feeds: dict[str, Array], rows: int) -> Observed:
        """Run it once, and note what came out everywhere."""
        values: Sequence[object] = self._session.run(None, feeds)
        seen = dict(zip(self._names, values, strict=True)) | feeds
        arrays = {name: value for name, value in seen.items() if isinstance(value, np.ndarray)}
        others = {name: (len(value) if isinstance(value, list) else 0,) for name, value in seen.items()}
        shapes = others | {name: array.shape for name, array in arrays.items()}
        return Observed(rows, shapes, {name: arrays[name] for name in self._keep if name in arrays})


class Values:
    """What the values of one graph were in runs with several numbers of rows."""

    def __init__(self, graph: onnx.GraphProto, runs: Sequence[Observed]) -> None:
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        self._runs = runs
        self.numbers = [run.rows for run in runs]
        """How many rows each run had."""

    def shapes(self, name: str) -> list[tuple[int, ...]]:
        """Return the shape of a value in each run."""
        if name in self._weights:
            return [tuple(self._weights[name].dims)] * len(self._runs)
        return [run.shapes[name] for run in self._runs]

    def contents(self, name: str) -> list[Array] | None:
        """Return the content of a value in each run; None where it was not kept."""
        tensor = self._weights.get(name)
        if tensor is not None:
            small = count(tuple(tensor.dims)) <= _SMALL and not tensor.external_data
            return [numpy_helper.to_array(tensor)] * len(self._runs) if small else None
        found = [run.arrays[name] for run in self._runs if name in run.arrays]
        return found if len(found) == len(self._runs) else None

    def repeats(self, name: str, axis: int, stride: int = 1) -> bool:
        """Tell whether a value is the same for each row, however many there are; they would lie along `axis`.

        Before its first axis, or along one of a single element, a value is broadcast over the rows.
        """
        seen = []
        for rows, array in zip(self.numbers, self.contents(name) or (), strict=False):
            if axis < 0 or array.shape[axis] == 1:
                seen.append(array)
                continue
            dim, period = array.shape[axis], rows * stride
            if dim % period:
                return False
            shape = (*array.shape[:axis], dim // period, rows, stride, *array.shape[axis + 1 :])
            each = np.moveaxis(array.reshape(shape), axis + 1, 0)
            if not all(equal(each[0], row) for row in each[1:]):
                return False
            seen.append(each[0])
        return bool(seen) and all(equal(seen[0], other) for other in seen[1:])


def equal(one: Array, other: Array) -> bool:
    """Tell whether two arrays have the same elements; a NaN is as any other."""
    return np.array_equal(one, other, equal_nan=one.dtype.kind in "fc")
