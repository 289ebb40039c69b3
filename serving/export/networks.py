"""Writes networks of PyTorch and Keras as ONNX files, by the exporters that come with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from serving.export.asked import Image, Reference
from serving.export.refusal import CannotExport, one_line
from serving.tensors import Array

_FAMILIES = {"torch.nn.modules.module.Module": "PyTorch", "keras.src.models.model.Model": "Keras"}
_INSTEAD = {
    "PyTorch": "write it with torch.onnx.export, the first dimension dynamic, and give the path of the file",
    "Keras": "write it with tf2onnx or model.export(format='onnx'), and give the path of the file",
}


def family_of(model: Any) -> str | None:
    """Name the library that a network is of; None for what is none."""
    kinds = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(model).__mro__)
    return next((_FAMILIES[kind] for kind in kinds if kind in _FAMILIES), None)


def write(model: Any, table: pd.DataFrame, path: Path, image: Image | None) -> Reference:
    """Write a network that takes one tensor, and return what says what the network itself answers for rows.

    table: rows like those to come; all columns make one tensor [rows, columns], or of the shape of an image. Raises
    CannotExport, with what its own exporter says.
    """
    family = family_of(model) or ""
    name = type(model).__name__
    try:
        rows = _tensor(table, image)
    except (TypeError, ValueError):
        raise CannotExport(name, "takes one tensor of numbers, and a column holds texts", _INSTEAD[family]) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters' own, which their users can do nothing about
            answer = _torch(model, rows, path) if family == "PyTorch" else _keras(model, rows, path)
    except ModuleNotFoundError as error:
        raise CannotExport(name, f"its exporter needs {error.name}", f"pip install {error.name}") from error
    except Exception as error:
        raise CannotExport(name, f"can't be converted: {one_line(error)}", _INSTEAD[family]) from error
    return lambda asked: answer(_tensor(asked, image))


def _tensor(table: pd.DataFrame, image: Image | None) -> Array:
    rows: Array = table.to_numpy(dtype=np.float32)
    return rows.reshape(-1, *image[1]) if image else rows


def _torch(model: Any, rows: Array, path: Path) -> Callable[[Array], Array]:
    import onnxscript  # noqa: F401, PLC0415  named here where it is missing, and not somewhere within
    import torch  # noqa: PLC0415

    weights = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(0))

    def tensor(rows: Array) -> Any:
        return torch.from_numpy(rows).to(weights)

    def answer(rows: Array) -> Array:
        with _evaluating(model), torch.no_grad():
            said = model(tensor(rows))
        first = said if isinstance(said, torch.Tensor) else next(iter(said))
        return np.asarray(first.cpu())

    # Of one row the exporter would think that there is never more.
    example = np.resize(rows, (2, *rows.shape[1:]))
    answer(example)  # what it does not take it says better itself than its exporter
    with _evaluating(model):
        torch.onnx.export(
            model,
            (tensor(example),),
            str(path),
            input_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    return answer


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Have it answer as it will be served, without dropout and the like, and leave it as it was."""
    trains = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(trains)


def _keras(model: Any, rows: Array, path: Path) -> Callable[[Array], Array]:
    def answer(rows: Array) -> Array:
        return np.asarray(model.predict(rows, verbose=0))

    answer(rows[:2])  # its exporter takes no model that was never called
    model.export(str(path), format="onnx", verbose=False)
    return answer
