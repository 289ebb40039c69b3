"""onnxruntime called directly, and small ONNX graphs that together take every datatype the server takes."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto as T
from onnx import helper

from serving.linux.limits import cores
from tests.conftest import MODELS

DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    **{f"{sign}INT{bits}": f"{sign.lower()}int{bits}" for sign in ("U", "") for bits in (8, 16, 32, 64)},
    **{"FP16": "float16", "FP32": "float32", "FP64": "float64", "BYTES": object},
}
_OF_ONNX = {f"tensor({np.dtype(v).name})": k for k, v in DTYPES.items() if k != "BYTES"} | {
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}
_ELEMENTS = {k: getattr(T, np.dtype(v).name.upper(), None) for k, v in DTYPES.items()} | {
    "FP32": T.FLOAT,
    "FP64": T.DOUBLE,
    "BYTES": T.STRING,
}


@dataclass(frozen=True)
class Port:
    """An input or output; shape is whole, -1 where free."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class Direct:
    """The highest version of a model, run in this process with as many threads as the server gives it."""

    def __init__(self, folder: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = cores()
        options.log_severity_level = 4
        self.name = folder.name
        self.versions = sorted((p.name for p in folder.iterdir() if p.is_dir()), key=int)
        self._session = ort.InferenceSession(str(folder / self.versions[-1] / "model.onnx"), options)
        self.inputs = [_port(p) for p in self._session.get_inputs()]
        self.outputs = [_port(p) for p in self._session.get_outputs()]
        self.signature: dict[str, Any] = json.loads(
            self._session.get_modelmeta().custom_metadata_map.get("serving.signature", "{}")
        )

    def __repr__(self) -> str:
        return self.name

    def __call__(self, feeds: dict[str, Any]) -> list[Any]:
        return list(self._session.run(None, feeds))

    @cached_property
    def batched(self) -> bool:
        """Whether the first dimension counts rows, be it fixed at one."""
        return all(p.shape and p.shape[0] in (-1, 1) for p in self.inputs) and self.name != "mixing"

    @property
    def most_rows(self) -> int:
        """How many rows an example may have."""
        return 5 if self.batched and self.inputs[0].shape[0] == -1 else 1

    @cached_property
    def features(self) -> list[dict[str, Any]]:
        """What V1 calls the cells of a row, in order: name, and shape without the batch."""
        if "features" in self.signature:
            return [{"shape": [], **feature} for feature in self.signature["features"]]
        only = self.inputs[0]
        if self.batched and len(self.inputs) == 1 and len(only.shape) == 2 and only.shape[1] > 1:
            return [{"name": f"f{i}", "shape": []} for i in range(only.shape[1])]
        shapes = [p.shape[1:] if self.batched else p.shape for p in self.inputs]
        shapes = [() if s == (1,) and self.batched else s for s in shapes]
        return [{"name": p.name, "shape": list(s)} for p, s in zip(self.inputs, shapes, strict=True)]

    @property
    def matrix(self) -> bool:
        """Whether the features are the columns of one input."""
        return len(self.features) > len(self.inputs) or self.signature.get("layout") == "matrix"

    def may_be_missing(self, port: Port) -> bool:
        """Whether NaN has a meaning in all of an input: the value is missing."""
        return (
            "features" in self.signature
            and not self.matrix
            and any(
                f["name"] == port.name and f.get("nullable") and port.datatype.startswith("FP") for f in self.features
            )
        )


def _port(port: Any) -> Port:
    return Port(port.name, _OF_ONNX[port.type], tuple(d if isinstance(d, int) else -1 for d in port.shape))


def gathered(folder: Path) -> dict[str, Direct]:
    """Fill a folder with the shipped models and the made ones; return each, by name, as it is called directly."""
    for shipped in sorted(p for p in MODELS.iterdir() if p.is_dir()):
        shutil.copytree(shipped, folder / shipped.name)
    for name, graph in _made().items():
        path = folder / name / "1" / "model.onnx"
        path.parent.mkdir(parents=True)
        onnx.save(graph, path)
    return {path.name: Direct(path) for path in sorted(folder.iterdir()) if path.name[0] != "."}


def _made() -> dict[str, onnx.ModelProto]:
    every = [d for d in DTYPES if d != "FP16"]
    return {
        "every_type": _graph(
            [(f"in_{d.lower()}", d, ["n", 2]) for d in every],
            [(f"out_{d.lower()}", d, ["n", 2]) for d in every],
            [("Identity", [f"in_{d.lower()}"], [f"out_{d.lower()}"], {}) for d in every],
        ),
        "scalars": _graph(
            [(d.lower(), d, ["n", 1]) for d in DTYPES],
            [(f"twice_{d.lower()}", d, ["n", 2]) for d in DTYPES],
            [("Concat", [d.lower(), d.lower()], [f"twice_{d.lower()}"], {"axis": 1}) for d in DTYPES],
        ),
        "halves": _graph(
            [("x", "FP16", ["n", 3])],
            [("y", "FP16", ["n", 3]), ("wide", "FP32", ["n", 3])],
            [("Neg", ["x"], ["y"], {}), ("Cast", ["x"], ["wide"], {"to": T.FLOAT})],
        ),
        "trailing": _graph(
            [("x", "FP32", ["n", "width"]), ("words", "BYTES", ["n", "count"]), ("k", "INT64", ["n", "depth", 2])],
            [
                ("turned", "INT64", ["n", 2, "depth"]),
                ("same", "BYTES", ["n", "count"]),
                ("low", "FP32", ["n", "width"]),
            ],
            [
                ("Transpose", ["k"], ["turned"], {"perm": [0, 2, 1]}),
                ("Identity", ["words"], ["same"], {}),
                ("Neg", ["x"], ["low"], {}),
            ],
        ),
        "empty": _graph(
            [("x", "FP32", ["n", 4]), ("s", "BYTES", ["n", 4])],
            [("no_numbers", "FP32", ["n", 0]), ("no_strings", "BYTES", ["n", 0]), ("no_wholes", "INT64", ["n", 0, 3])],
            [
                ("Slice", ["x", "zero", "zero", "one"], ["no_numbers"], {}),
                ("Slice", ["s", "zero", "zero", "one"], ["no_strings"], {}),
                ("Slice", ["cube", "zero", "zero", "one"], ["no_wholes"], {}),
                ("Cast", ["x3"], ["cube"], {"to": T.INT64}),
                ("Concat", ["x1", "x1", "x1"], ["x3"], {"axis": 2}),
                ("Unsqueeze", ["bounded", "two"], ["x1"], {}),
                ("IsNaN", ["x"], ["nan"], {}),
                ("Cast", ["nan"], ["bounded"], {"to": T.FLOAT}),
            ],
            {"zero": [0], "one": [1], "two": [2]},
        ),
        "not_finite": _graph(
            [("x", "FP32", ["n", 3]), ("d", "FP64", ["n", 1])],
            [("log", "FP32", ["n", 3]), ("root", "FP64", ["n", 1])],
            [("Log", ["x"], ["log"], {}), ("Sqrt", ["d"], ["root"], {})],
        ),
        "one_row": _graph([("x", "FP64", [1, 3])], [("y", "FP64", [1, 3])], [("Neg", ["x"], ["y"], {})]),
        "mixing": _graph(  # its rows can't be told apart: never batched
            [("x", "FP32", ["n"])],
            [("where", "INT64", [1, "k"]), ("total", "FP32", [])],
            [("NonZero", ["x"], ["where"], {}), ("ReduceMax", ["x"], ["total"], {"keepdims": 0})],
        ),
    }


def _graph(inputs: Any, outputs: Any, nodes: Any, constants: dict[str, list[int]] | None = None) -> onnx.ModelProto:
    values = [[helper.make_tensor_value_info(n, _ELEMENTS[d], s) for n, d, s in side] for side in (inputs, outputs)]
    made = [helper.make_node(kind, ins, outs, **attributes) for kind, ins, outs, attributes in nodes]
    kept = [helper.make_tensor(n, T.INT64, [len(v)], v) for n, v in (constants or {}).items()]
    done, known = [], {n for n, _, _ in inputs} | {k.name for k in kept}
    while made:  # in an order in which each finds what it takes
        node = next(n for n in made if known.issuperset(n.input))
        made.remove(node)
        done.append(node)
        known.update(node.output)
    graph = helper.make_graph(done, "drill", *values, kept)  # type: ignore[call-arg]
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
