"""Reads a signature from a graph that carries none: a user's own bare `.onnx`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from serving.engine.signature import Batch, Feature, Signature, TensorSpec
from serving.errors import ModelInvalid
from serving.tensors import DATATYPE_OF, NUMPY, ONNX, Tensors

ZIPMAPS = {"seq(map(string,tensor(float)))": "BYTES", "seq(map(int64,tensor(float)))": "INT64"}
PROBE_ROWS = 3

Probe: TypeAlias = list[Any] | None


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output as onnxruntime states it: dims are ints, names of free dims, or None."""

    name: str
    type: str
    shape: tuple[int | str | None, ...]

    def spec(self) -> TensorSpec:
        """Give it in our words. Raises ModelInvalid for types that no protocol here can carry."""
        if self.type not in ONNX:
            raise ModelInvalid(f"{self.name} is {self.type}, which can't be served: use plain tensors")
        dims = tuple(d if isinstance(d, int) and d >= 0 else -1 for d in self.shape)
        return TensorSpec(name=self.name, datatype=ONNX[self.type], shape=dims)


def describe(
    inputs: list[Port], outputs: list[Port], probe: Callable[[Tensors], Probe]
) -> tuple[Signature, dict[int, tuple[Any, ...]]]:
    """Read a signature from the ports, and run `probe` on made-up rows to learn what they do not say.

    Returns the signature and, for each output that is a sequence of maps, its keys in order.
    """
    specs = tuple(port.spec() for port in inputs)
    batch = _batch(specs)
    seen, rows = _try(specs, batch, probe)
    zipped = _zipped(outputs, seen)
    output_specs = tuple(
        _output(port, None if seen is None else seen[index], zipped.get(index)) for index, port in enumerate(outputs)
    )
    if batch == "dynamic" and seen is not None and not _one_a_row(seen, zipped, rows):
        batch = "none"  # the graph mixes its rows: two callers' rows must never meet in it
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
    return signature, zipped


def _batch(specs: tuple[TensorSpec, ...]) -> Batch:
    if all(spec.shape and spec.shape[0] == -1 for spec in specs):
        return "dynamic"
    if all(spec.shape and spec.shape[0] == 1 for spec in specs):
        return "one"
    return "none"


def _try(specs: tuple[TensorSpec, ...], batch: Batch, probe: Callable[[Tensors], Probe]) -> tuple[Probe, int]:
    rows = PROBE_ROWS if batch == "dynamic" else 1
    for inner in (1, 4, 16, 64):  # a free inner dimension may still have a least size
        arrays = tuple(
            np.full(
                tuple((rows if i == 0 else inner) if dim == -1 else dim for i, dim in enumerate(spec.shape)),
                "" if spec.datatype == "BYTES" else 0,
                dtype=NUMPY[spec.datatype],
            )
            for spec in specs
        )
        seen = probe(arrays)
        if seen is not None:
            return seen, rows
    return None, rows


def _zipped(outputs: list[Port], seen: Probe) -> dict[int, tuple[Any, ...]]:
    zipped: dict[int, tuple[Any, ...]] = {}
    for index, port in enumerate(outputs):
        if port.type in ZIPMAPS:
            if seen is None or not seen[index]:
                raise ModelInvalid(
                    f"output {port.name} is a sequence of maps whose keys can't be learnt: export with zipmap=False"
                )
            zipped[index] = tuple(seen[index][0])
    return zipped


def _output(port: Port, seen: Any, keys: tuple[Any, ...] | None) -> TensorSpec:
    if keys is not None:
        return TensorSpec(name=port.name, datatype="FP32", shape=(-1, len(keys)))
    spec = port.spec()
    if seen is None:
        return spec
    # Exporters often leave an output's shape out, or wrong; what came out is the truth.
    if len(spec.shape) != seen.ndim:
        shape = (-1,) * seen.ndim
    else:
        shape = tuple(d if d == got else -1 for d, got in zip(spec.shape, seen.shape, strict=True))
    spec = spec.model_copy(update={"shape": shape})
    return spec.model_copy(update={"datatype": DATATYPE_OF[seen.dtype]})


def _one_a_row(seen: list[Any], zipped: dict[int, tuple[Any, ...]], rows: int) -> bool:
    return all(
        len(value) == rows if index in zipped else value.ndim > 0 and value.shape[0] == rows
        for index, value in enumerate(seen)
    )


def _features(specs: tuple[TensorSpec, ...], batch: Batch) -> tuple[Any, tuple[Feature, ...]]:
    first = specs[0]
    if len(specs) == 1 and batch != "none" and len(first.shape) == 2 and first.shape[1] > 1:
        return "matrix", tuple(Feature(name=f"f{i}", datatype=first.datatype) for i in range(first.shape[1]))
    features = []
    for spec in specs:
        shape = spec.shape if batch == "none" else spec.shape[1:]
        if batch != "none" and shape == (1,):
            shape = ()  # [batch, 1] is how exporters write a column: a scalar to its user
        features.append(Feature(name=spec.name, datatype=spec.datatype, shape=shape))
    return "columns", tuple(features)


def _roles(outputs: tuple[TensorSpec, ...]) -> tuple[str | None, str | None]:
    """Find label and scores where the outputs are the two that classifiers have everywhere."""
    if len(outputs) != 2:
        return None, None
    label, scores = outputs
    if (
        label.datatype in ("INT64", "BYTES")
        and len(label.shape) == 1
        and scores.datatype == "FP32"
        and len(scores.shape) == 2
    ):
        return label.name, scores.name
    return None, None
