"""A request's named tensors against a model's own: what the Open Inference Protocol asks for on every transport."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from serving.engine.signature import Signature, TensorSpec
from serving.errors import InvalidRequest, SignatureMismatch
from serving.tensor_bytes import strings
from serving.tensors import FLOATS, INTEGERS, NUMPY, Array, Overriding, Tensors, count

_MOST_BESIDE_ZERO = 2**20


class RequestedOutput(NamedTuple):
    """One output that a request asks for: its position, whether as raw bytes, and how many classes (0: the tensor)."""

    position: int
    binary: bool = False
    classes: int = 0


class TensorBinder:
    """Inputs and outputs of one signature. All methods raise InvalidRequest with the place, `at`, of the fault."""

    def __init__(self, signature: Signature, *, together: bool = True) -> None:
        self._together = together
        self.inputs = signature.inputs
        self.outputs = signature.outputs
        self.dynamic = signature.batch == "dynamic"
        self._batched = signature.batch != "none"
        # A client that sends a table sends a tensor a column, by the names of the features, instead of the matrix.
        self._columns = signature.features if signature.layout == "matrix" else ()
        columns = (TensorSpec(name=f.name, datatype=f.datatype, shape=(-1,)) for f in self._columns)
        self.slots = (*self.inputs, *columns, *signature.optional)
        """What a request may name: the inputs, and behind them the columns of a matrix, to be sent in its stead, and
        weights that can be overridden."""
        self._optional = signature.optional
        self._positions = {spec.name: i for i, spec in reversed(tuple(enumerate(self.slots)))}
        self._output_positions = {spec.name: i for i, spec in enumerate(self.outputs)}
        self._classes = {self._output_positions[signature.scores]: signature.classes} if signature.scores else {}
        each = [(feature,) for feature in signature.features]
        groups = [signature.features, *each] if self._columns else each
        self.finite = [
            spec.datatype in FLOATS and not all(feature.allow_non_finite for feature in features)
            for spec, features in zip(self.slots, groups, strict=False)
        ]
        self._nullable: list[Any] = [np.array([feature.nullable for feature in features]) for features in groups]
        self.finite += [False] * len(self._optional)
        self._nullable += [spec.datatype in FLOATS for spec in self._optional]
        self._all = tuple(RequestedOutput(i) for i in range(len(self.outputs)))
        self._all_binary = tuple(RequestedOutput(i, True) for i in range(len(self.outputs)))

    def all_outputs(self, *, binary: bool) -> tuple[RequestedOutput, ...]:
        """Return all outputs, for a request that lists none."""
        return self._all_binary if binary else self._all

    def input(self, name: Any, datatype: Any, at: str) -> int:
        """Return the position of an input that a request names with a datatype."""
        position = self._positions.get(name) if isinstance(name, str) else None
        if position is None:
            known = ", ".join(spec.name for spec in self.inputs)
            shown = repr(name[:64]) if isinstance(name, str) else "without a name"
            raise InvalidRequest(f"{at}/name: the model has no input {shown}; inputs: {known}"[:600])
        due = self.slots[position].datatype
        number = self._is_column(position) and due in FLOATS | INTEGERS and datatype in FLOATS | INTEGERS
        if datatype != due and not number:
            known_type = isinstance(datatype, str) and datatype in NUMPY
            said = datatype if known_type else "no datatype of the protocol"
            raise InvalidRequest(f"{at}/datatype: is {said}, and input {name!r} takes {due}")
        return position

    def may_miss(self, position: int) -> bool:
        """Tell whether any element of an input may be missing."""
        return bool(np.any(self._nullable[position]))

    def shape(self, position: int, dims: Sequence[Any], at: str) -> tuple[int, ...]:
        """Check a shape that a request gives for an input."""
        spec = self.slots[position]
        declared = list(spec.shape)
        if not all(type(dim) is int for dim in dims):
            raise InvalidRequest(f"{at}/shape: should be an array of whole numbers")
        if self._is_column(position) and len(dims) == 2 and dims[1] == 1:
            declared.append(1)
        if any(dim < 0 for dim in dims):
            raise InvalidRequest(f"{at}/shape: has a negative dimension")
        if 0 in dims and math.prod(dim for dim in dims if dim) > _MOST_BESIDE_ZERO:
            # It costs its sender nothing, and a model that reduces the empty dimension would make all of it.
            raise InvalidRequest(f"{at}/shape: beside 0 its dimensions may make {_MOST_BESIDE_ZERO} at most")
        if not declared:
            return tuple(dims)  # onnxruntime says the same of an input without a shape: it has the word
        if declared == [-1, 1] and len(dims) == 1:
            dims = (*dims, 1)  # a column, as it is written without a matrix in mind
        if len(dims) != len(declared):
            raise InvalidRequest(f"{at}/shape: has {len(dims)} dimensions, and input {spec.name!r} has {declared}")
        if any(d not in (-1, g) for d, g in zip(declared, dims, strict=True)):
            raise InvalidRequest(f"{at}/shape: is {str(list(dims))[:200]}, and input {spec.name!r} has {declared}")
        return tuple(dims)

    def raw_shape(self, size: int) -> tuple[int, ...]:
        """Infer the shape of the only input from the bytes of a body that is nothing but this tensor."""
        if len(self.inputs) != 1:
            names = ", ".join(spec.name for spec in self.inputs)
            raise InvalidRequest(f"a raw body is for models with one input, and this one has {names}"[:500])
        spec = self.inputs[0]
        shape = list(spec.shape)
        if spec.datatype == "BYTES":
            if any(dim not in (-1, 1) for dim in shape):
                raise InvalidRequest(f"a raw body is one BYTES element, and input {spec.name!r} has {shape}")
            return (1,) * len(shape)
        free = [i for i, dim in enumerate(shape) if dim == -1]
        if len(free) > 1 and free[0] == 0 and self._batched:
            shape[free.pop(0)] = 1
        if len(free) > 1:
            raise InvalidRequest(f"the shape of a raw body can't be inferred: input {spec.name!r} has {shape}")
        for i in free:
            shape[i] = max(1, size // max(1, count(tuple(d for d in shape if d != -1)) * NUMPY[spec.datatype].itemsize))
        return tuple(shape)

    def check(self, position: int, array: Array, at: str) -> None:
        """Refuse numbers that are not finite, where the signature says that they have no meaning."""
        if not self.finite[position]:
            return
        # A sum is finite only if all of its terms are, and costs half of asking each one.
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(array.sum()):
                return
        bad = ~np.isfinite(array) & ~(np.isnan(array) & self._nullable[position])  # NaN is how bytes say missing
        if bad.any():
            index = int(np.flatnonzero(bad)[0])
            what = "missing: NaN or null" if np.isnan(array.flat[index]) else "infinite"
            raise SignatureMismatch(f"{at}: element {index} is not finite ({what}), which this model does not take")

    def assemble(self, arrays: Iterable[Array | None]) -> tuple[Tensors, int]:
        """Return the inputs in order and the number of rows; all must be there, with as many rows each in batches."""
        given = list(arrays)
        columns = given[len(self.inputs) : len(self.inputs) + len(self._columns)]
        overrides = given[len(self.inputs) + len(self._columns) :]
        del given[len(self.inputs) :]
        if any(column is not None for column in columns):
            if given[0] is not None:
                raise InvalidRequest(f"input {self.inputs[0].name!r} is sent, and columns of it too: send one of both")
            given[0] = self._matrix(columns)
        missing = [spec.name for spec, array in zip(self.inputs, given, strict=True) if array is None]
        if missing:
            raise InvalidRequest(f"inputs are missing: {', '.join(missing)}"[:500])
        inputs: Tensors = tuple(array for array in given if array is not None)
        if any(array is not None for array in overrides):
            made = Overriding(inputs)
            sent = zip(self._optional, overrides, strict=True)
            made.overrides = {spec.name: array for spec, array in sent if array is not None}
            inputs = made
        if not self.dynamic:
            return inputs, 1
        rows = int(inputs[0].shape[0])
        for spec, array in zip(self.inputs, inputs, strict=True):
            if array.shape[0] != rows and self._together:
                raise InvalidRequest(
                    f"inputs have different numbers of rows: {self.inputs[0].name} {rows}, {spec.name} {array.shape[0]}"
                )
        return inputs, rows

    def _is_column(self, position: int) -> bool:
        return 0 <= position - len(self.inputs) < len(self._columns)

    def _matrix(self, columns: Sequence[Array | None]) -> Array:
        """Make the matrix of its columns, in whatever numbers each was sent."""
        missing = [f.name for f, column in zip(self._columns, columns, strict=True) if column is None]
        if missing:
            raise InvalidRequest(f"columns are missing: {', '.join(missing)}"[:500])
        there = [column.reshape(-1) for column in columns if column is not None]
        rows = len(there[0])
        dtype = NUMPY[self.inputs[0].datatype]
        matrix: Array = np.empty((rows, len(there)), dtype)
        for index, (feature, column) in enumerate(zip(self._columns, there, strict=True)):
            if len(column) != rows:
                lengths = f"{self._columns[0].name} {rows}, {feature.name} {len(column)}"
                raise InvalidRequest(f"columns have different lengths: {lengths}"[:500])
            with np.errstate(over="ignore", invalid="ignore"):
                matrix[:, index] = column
            whole = feature.datatype in INTEGERS
            if (matrix[:, index] != column).any() if whole else _overflows(column, matrix[:, index]):
                raise SignatureMismatch(f"column {feature.name!r} has a number that does not fit {feature.datatype}")
        return matrix

    def requested(self, asked: Iterable[tuple[Any, bool, int]]) -> tuple[RequestedOutput, ...]:
        """Read the outputs that a request lists as (name, binary, classes); each once, in its order."""
        chosen: list[RequestedOutput] = []
        seen: set[int] = set()
        for index, (name, binary, classes) in enumerate(asked):
            at = f"/outputs/{index}"
            position = self._output_positions.get(name) if isinstance(name, str) else None
            if position is None:
                known = ", ".join(self._output_positions)
                raise InvalidRequest(f"{at}/name: the model has no such output; outputs: {known}"[:600])
            if position in seen:
                raise InvalidRequest(f"{at}/name: output {name!r} is listed twice")
            if classes < 0:
                raise InvalidRequest(f"{at}/parameters/classification: should be a whole number, 1 or more")
            if classes and self.outputs[position].datatype in ("BYTES", "BOOL"):
                raise InvalidRequest(
                    f"{at}/parameters/classification: output {name!r} has no numbers to take the greatest of"
                )
            seen.add(position)
            chosen.append(RequestedOutput(position, binary, classes))
        return tuple(chosen)

    def classified(self, position: int, array: Array, classes: int) -> Array:
        """Return the `classes` greatest of each row as BYTES `value:index` or, for scores, `value:index:label`.

        Source: Triton's classification extension; the value has six decimals, as there.
        """
        rows = array.reshape(array.shape[0] if self._batched and array.ndim else 1, -1)
        names = self._classes.get(position)
        if names is not None and len(names) != rows.shape[1]:
            names = None
        form = "{:f}:{}" if self.outputs[position].datatype in FLOATS else "{}:{}"
        most = min(classes, rows.shape[1])
        shape = (len(rows), most) if self._batched else (most,)
        return strings(_greatest(rows, most, names, form), shape)


def _overflows(column: Array, made: Array) -> bool:
    return made.dtype.kind in "fV" and bool((np.isinf(made) & np.isfinite(column)).any())


def _greatest(rows: Array, most: int, names: tuple[Any, ...] | None, form: str) -> list[str]:
    """Write the greatest of each row, as `classified` says."""
    orders = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :most]
    texts = []
    for row, order in zip(rows.tolist(), orders.tolist(), strict=True):
        for index in order:
            label = "" if names is None else f":{names[index]}"
            texts.append(form.format(row[index], index) + label)
    return texts
