"""Datatypes and shapes in the words of the Open Inference Protocol v2, and their numpy and ONNX equivalents.

Source: https://github.com/kserve/open-inference-protocol (tensor datatypes).
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
"""A tensor: C-ordered; strings are dtype object and hold `str`."""

Tensors: TypeAlias = tuple[Array, ...]
"""Arrays in the order of a signature's inputs or outputs; dim 0 is the batch where the model has one."""


class Overriding(tuple[Array, ...]):
    """Tensors of a request that also sends, by name, what is to stand for weights of the graph: it runs alone."""

    overrides: dict[str, Array]


_Unsigned: TypeAlias = Literal["UINT8", "UINT16", "UINT32", "UINT64"]
_Signed: TypeAlias = Literal["INT8", "INT16", "INT32", "INT64"]
_Float: TypeAlias = Literal["FP16", "FP32", "FP64", "BF16"]
Datatype: TypeAlias = Literal["BOOL", _Unsigned, _Signed, _Float, "BYTES"]

_EQUIVALENTS: tuple[tuple[Datatype, type, str], ...] = (
    ("BOOL", np.bool_, "bool"),
    ("UINT8", np.uint8, "uint8"),
    ("UINT16", np.uint16, "uint16"),
    ("UINT32", np.uint32, "uint32"),
    ("UINT64", np.uint64, "uint64"),
    ("INT8", np.int8, "int8"),
    ("INT16", np.int16, "int16"),
    ("INT32", np.int32, "int32"),
    ("INT64", np.int64, "int64"),
    ("FP16", np.float16, "float16"),
    ("FP32", np.float32, "float"),
    ("FP64", np.float64, "double"),
    ("BF16", ml_dtypes.bfloat16, "bfloat16"),
    ("BYTES", object, "string"),
)
"""Datatype, its type in numpy, and its elements' name in ONNX."""

NUMPY: dict[str, np.dtype[Any]] = {datatype: np.dtype(kind) for datatype, kind, _ in _EQUIVALENTS}
ONNX: dict[str, Datatype] = {f"tensor({element})": datatype for datatype, _, element in _EQUIVALENTS}
DATATYPE_OF: dict[np.dtype[Any], Datatype] = {NUMPY[datatype]: datatype for datatype in ONNX.values()}

INTEGERS = frozenset({*get_args(_Unsigned), *get_args(_Signed)})
FLOATS = frozenset(get_args(_Float))
HALVES = frozenset({"FP16", "BF16"})
"""Floats that the protocol carries as raw bytes only, not in JSON or typed contents."""


def limits(datatype: str) -> tuple[int, int]:
    """Return the least and the greatest value of an integer datatype.

    >>> limits("INT8")
    (-128, 127)
    """
    info = np.iinfo(NUMPY[datatype])
    return int(info.min), int(info.max)


def count(shape: tuple[int, ...]) -> int:
    """Return how many elements a concrete shape holds, in Python integers, so that it can't overflow."""
    total = 1
    for dim in shape:
        total *= dim
    return total
