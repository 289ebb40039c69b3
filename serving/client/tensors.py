"""Rows as the tensors that a model takes, where that changes nothing; and what a model's tensors say, by column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from serving.client.given import Columns, Given, Values, columns_of
from serving.engine.signature import Feature, Signature
from serving.errors import InvalidRequest
from serving.tensors import FLOATS, INTEGERS, NUMPY, Array, Datatype, limits


class Tensor(NamedTuple):
    """One named tensor; `array` has the datatype's dtype."""

    name: str
    datatype: Datatype
    array: Array


def tensors_of(asked: Given, signature: Signature) -> list[Tensor] | None:
    """Make the tensors of a request; None where there is doubt, and the server is to judge the rows as JSON.

    So there is where a value is missing that may not be, has another type than its feature, does not fit it, or where
    the server looks at JSON more closely (categories). Raises InvalidRequest for an array of a wrong shape.
    """
    if any(f.categories is not None and f.unknown_category == "refuse" for f in signature.features):
        return None
    names = [feature.name for feature in signature.features]
    if asked.array is not None:
        return _of_array(asked.array, signature, names)
    if asked.kind == "arrays" and (inputs := _of_inputs(asked.columns or {}, signature)) is not None:
        return inputs
    if signature.batch != "dynamic":
        return None
    columns = asked.columns if asked.columns is not None else _turned(asked.rows or (), names)
    return None if columns is None else _of_columns(columns, signature, names)


def _of_array(array: Array, signature: Signature, names: list[str]) -> list[Tensor] | None:
    """Take it for the model's only input, or for one column a feature."""
    if len(signature.inputs) > 1:
        return _of_columns(columns_of(array, names), signature, names)
    spec = signature.inputs[0]
    if array.ndim == 1 and spec.shape in ((-1, 1), (-1, -1)) and len(names) == 1:
        array = array[:, None]
    if not _fits(array, spec.shape):
        raise InvalidRequest(f"the array has shape {list(array.shape)}, and the model takes {list(spec.shape)}")
    return _of_inputs({spec.name: array}, signature)


def _of_inputs(columns: Mapping[str, Values], signature: Signature) -> list[Tensor] | None:
    """Take arrays for inputs of the graph, where they are named as these; None otherwise."""
    if {spec.name for spec in signature.inputs} != set(columns):
        return None
    made = []
    for index, spec in enumerate(signature.inputs):
        features = signature.features if signature.layout == "matrix" else signature.features[index : index + 1]
        array = _cast(np.asarray(columns[spec.name]), spec.datatype, features)
        if array is None or not _fits(array, spec.shape):
            return None
        made.append(Tensor(spec.name, spec.datatype, array))
    return made


def _of_columns(columns: Mapping[str, Values], signature: Signature, names: list[str]) -> list[Tensor] | None:
    """Make a tensor of each feature: a matrix is sent by its columns' names, which no other version can mistake."""
    if set(names) != set(columns):
        return None
    made = []
    for index, feature in enumerate(signature.features):
        values = columns[feature.name]
        array = values if isinstance(values, np.ndarray) else _listed(values, feature)
        array = None if array is None else _cast(array, feature.datatype, [feature])
        if array is None or not _fits(array, (-1, *feature.shape)):
            return None
        name = feature.name
        if signature.layout == "columns":
            spec = signature.inputs[index]
            name = spec.name
            if array.ndim == 1 and len(spec.shape) == 2:
                array = array[:, None]
            if array.ndim != len(spec.shape):
                return None
        made.append(Tensor(name, feature.datatype, array))
    return made


def _fits(array: Array, shape: tuple[int, ...]) -> bool:
    """Tell whether an array has a shape, in which -1 is any size."""
    return array.ndim == len(shape) and all(due in (-1, size) for due, size in zip(shape, array.shape, strict=True))


def _turned(rows: Sequence[Any], names: list[str]) -> dict[str, list[Any]] | None:
    """Turn rows into columns; None where they do not all have the features, or are written in several ways."""
    width = len(names)
    if all(type(row) is dict and len(row) == width for row in rows):
        try:
            return {name: [row[name] for row in rows] for name in names}
        except KeyError:
            return None
    if all(type(row) is list and len(row) == width for row in rows) and width > 1:
        return {name: [row[index] for row in rows] for index, name in enumerate(names)}
    if width == 1 and all(type(row) in (str, int, float) for row in rows):
        return {names[0]: list(rows)}
    return None


def _listed(values: Sequence[Any], feature: Feature) -> Array | None:
    """Make an array of a list, where all of its values are of the feature's own kind."""
    kinds = set(map(type, values))
    datatype = feature.datatype
    try:
        if feature.shape and kinds <= {list, np.ndarray}:
            array = np.array(values)
            return None if array.dtype.hasobject else array
        if datatype == "BYTES" and kinds == {str}:
            return np.array(values, object)
        if datatype in FLOATS and kinds <= {int, float, type(None)}:
            return np.array(values, np.float64)
        if (datatype in INTEGERS and kinds == {int}) or (datatype == "BOOL" and kinds == {bool}):
            return np.array(values, NUMPY[datatype])
    except (ValueError, OverflowError):  # lists of several lengths; whole numbers that no dtype holds
        pass
    return None


def _cast(array: Array, datatype: Datatype, features: Sequence[Feature]) -> Array | None:
    """Give an array the dtype of a datatype; None where a value would become another one or is not taken.

    features: of each column of a matrix, or the only one.
    """
    kind = array.dtype.kind
    if datatype == "BYTES":
        array = array.astype(object) if kind == "U" else array
        return array if array.dtype.hasobject and all(type(value) is str for value in array.flat) else None
    if datatype == "BOOL":
        return array if kind == "b" else None
    if datatype in INTEGERS:
        least, greatest = limits(datatype)
        held = kind in "iu" and (not array.size or (least <= int(array.min()) and int(array.max()) <= greatest))
        return array.astype(NUMPY[datatype]) if held else None
    if kind not in "iuf" and array.dtype != NUMPY["BF16"]:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        made = array.astype(NUMPY[datatype])
    finite = np.isfinite(made)
    if finite.all() or (features[0].allow_non_finite and bool((np.isinf(made) == np.isinf(array)).all())):
        return made
    missing = np.isnan(made) & [feature.nullable for feature in features]
    return made if bool((finite | missing).all()) else None


def answered(outputs: Mapping[str, Array], signature: Signature) -> Columns:
    """Give a model's outputs as an answer's columns, as V1 names them: the classes of a classifier by name."""
    if not signature.answers_by_class:
        return {name: _flat(array, signature) for name, array in outputs.items()}
    label, scores = outputs[str(signature.label)], outputs[str(signature.scores)]
    classes = signature.classes or ()
    labels = label.reshape(-1)
    if labels.dtype.kind in "iu" and isinstance(classes[0], str):  # an index into the classes
        texts = np.empty(len(labels), object)
        texts[:] = [classes[i] if 0 <= i < len(classes) else i for i in labels.tolist()]
        labels = texts
    return {"label": labels, signature.scores_key: scores}


def read_columns(document: Any, signature: Signature) -> Columns:
    """Give the `outputs` of a V1 answer as columns with the dtypes of the model's outputs; null is NaN."""
    dtypes = {spec.name: NUMPY[spec.datatype] for spec in signature.outputs}
    if not signature.answers_by_class:
        by_name = {signature.outputs[0].name: document} if len(signature.outputs) == 1 else document
        return {name: _array(values, dtypes[name]) for name, values in by_name.items()}
    classes = signature.classes or ()
    key = signature.scores_key
    dtype = np.dtype(object) if isinstance(classes[0], str) else dtypes[str(signature.label)]
    by_class = [document[key][str(c)] for c in classes]
    scores = _array(by_class, dtypes[str(signature.scores)]).T
    return {"label": _array(document["label"], dtype), key: np.ascontiguousarray(scores)}


def _flat(array: Array, signature: Signature) -> Array:
    if signature.batch != "none" and array.ndim == 2 and array.shape[1] == 1:
        return array.reshape(-1)
    return array


def _array(values: Any, dtype: np.dtype[Any]) -> Array:
    if dtype == NUMPY["BF16"]:
        return np.array(values, np.float64).astype(dtype)
    return np.array(values, dtype)
