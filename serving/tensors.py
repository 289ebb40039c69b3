"""Datatypes and shapes in the words of the Open Inference Protocol v2, and their numpy and ONNX equivalents.

Source: https://github.com/kserve/open-inference-protocol (tensor datatypes).
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

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


Datatype: TypeAlias = Literal[
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "FP16",
    "FP32",
    "FP64",
    "BF16",
    "BYTES",
]

NUMPY: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "BYTES": np.dtype(object),
}

ONNX: dict[str, Datatype] = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(bfloat16)": "BF16",
    "tensor(string)": "BYTES",
}

DATATYPE_OF: dict[np.dtype[Any], Datatype] = {NUMPY[d]: d for d in ONNX.values()}

INTEGERS = frozenset({"UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"})
FLOATS = frozenset({"FP16", "FP32", "FP64", "BF16"})
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
