"""Runs of models that take or give strings: of many strings, some rows at a time.

onnxruntime makes strings of its own of Python's, and the other way round, and keeps the interpreter, and with it the
event loop, meanwhile: a million of them take 40 ms each way. All of it can't be cut where a model takes one example
(batch "none"), where its rows are not independent, or where one row has as many.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from serving.engine.signature import Signature
from serving.errors import InferenceFailed
from serving.tensor_bytes import HANDOVER_S, MOST_STRINGS, Filling, LongStrings
from serving.tensors import Array, Tensors, count

Run: TypeAlias = Callable[[Tensors, bool], Tensors]
"""Runs some rows; the second argument tells whether they are the last."""

_CHARACTERS = 1024 * 1024
"""Characters that are run at a time."""


def text_runs(signature: Signature, *, apart: bool) -> TextRuns | None:
    """Return what runs a model that takes or gives strings; None for any other.

    apart: its rows are independent, so that some of a request's may run before the others.
    """
    texts = any(spec.datatype == "BYTES" for spec in (*signature.inputs, *signature.outputs))
    return TextRuns(signature, apart=apart) if texts else None


class TextRuns:
    """Large runs of one model."""

    def __init__(self, signature: Signature, *, apart: bool) -> None:
        self._rows = apart and signature.batch == "dynamic"
        self._outputs = [spec.shape[1:] for spec in signature.outputs if spec.datatype == "BYTES"]

    def usual_bytes(self, one: Tensors) -> int:
        """Return up to how many bytes of the first input there are few strings; `one`: inputs of one row."""
        return max(1, MOST_STRINGS // self._strings(one, 1)) * one[0].nbytes

    def _strings(self, inputs: Tensors, rows: int) -> int:
        """Return how many strings a run takes or gives, whichever are more, as far as that can be known before."""
        asked = sum(array.size for array in inputs if array.dtype.hasobject)
        largest = max(array.size for array in inputs)
        return max(1, asked, sum(largest if -1 in shape else rows * count(shape) for shape in self._outputs))

    def run(self, run: Run, inputs: Tensors) -> Tensors:
        """Run all rows, with a moment's sleep between some and the next. Raises InferenceFailed."""
        long = any(isinstance(array, LongStrings) for array in inputs)
        plain = tuple(array.view(np.ndarray) for array in inputs)
        rows = len(plain[0]) if self._rows else 1
        step = max(1, rows * MOST_STRINGS // self._strings(plain, rows))
        if long:
            step = max(1, min(step, rows * _CHARACTERS // _characters(plain)))
        outputs = self._by_the_piece(run, plain, rows, step) if step < rows else None
        if outputs is None:
            outputs = run(plain, True)
        return tuple(_long(output) if long else output for output in outputs)

    def _by_the_piece(self, run: Run, inputs: Tensors, rows: int, step: int) -> Tensors | None:
        """Run some rows at a time; None where the shapes of outputs depend on what the rows hold."""
        texts: dict[int, Filling] = {}
        numbers: dict[int, list[Array]] = {}
        shapes: list[tuple[int, ...]] = []
        for at in range(0, rows, step):
            outputs = run(tuple(array[at : at + step] for array in inputs), at + step >= rows)
            # Rows that can't be told apart must never be handed to somebody.
            if any(not output.ndim or len(output) != min(step, rows - at) for output in outputs):
                raise InferenceFailed("the model answered another number of rows than it was given")
            shapes = shapes or [output.shape[1:] for output in outputs]
            if shapes != [output.shape[1:] for output in outputs]:
                return None
            for index, output in enumerate(outputs):
                if not output.dtype.hasobject:
                    numbers.setdefault(index, []).append(output)
                    continue
                if not at:
                    texts[index] = Filling((rows, *shapes[index]))
                texts[index].add(output)
            del outputs, output
            time.sleep(HANDOVER_S)
        return tuple(
            texts[index].array if index in texts else np.concatenate(numbers[index]) for index in range(len(shapes))
        )


def _characters(inputs: Tensors) -> int:
    """Return how many characters strings have that are not many: only then are they long."""
    most = 1
    for array in inputs:
        if array.dtype.hasobject:
            few = array.size <= 4 * MOST_STRINGS
            most += sum(map(len, array.ravel().tolist())) if few else 0
    return most


def _long(output: Array) -> Array:
    """Have strings that answer long ones be handled as such, however few they are."""
    if isinstance(output, LongStrings) or not output.dtype.hasobject or not output.ndim:
        return output
    filling = Filling(output.shape)
    filling.add(output)
    return filling.array
