"""MLflow's own code on both sides: `python -P mlflow_client.py save FOLDER` and `... ask FOLDER PORT`.

Runs where mlflow is installed. It logs models, and then has MLflow's scoring client and the requests that MLflow writes
beside a model ask a server of them; what MLflow itself predicts is what should come.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import requests
from mlflow.models import ModelSignature
from mlflow.pyfunc.scoring_server.client import ScoringServerClient, dump_input_data
from mlflow.types import ColSpec, Schema, TensorSpec
from onnx import TensorProto, helper, numpy_helper

FRAME = pd.DataFrame({"width": [1.5, 2.5, 0.0], "height": [2.0, -3.0, 1.0], "doors": [4, 5, 2]})
TENSOR = np.arange(12, dtype=np.float32).reshape(4, 3)


def graph() -> Any:
    """A weighted sum of three columns."""
    return helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            "sum",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 1])],
            [numpy_helper.from_array(np.array([[1], [10], [100]], np.float32), "w")],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )


def save(folder: Path) -> None:
    """Log the model with columns, with a tensor, and with nothing said."""
    tensor = ModelSignature(Schema([TensorSpec(np.dtype(np.float32), (-1, 3))]))
    columns = ModelSignature(
        Schema([ColSpec("double", "width"), ColSpec("double", "height"), ColSpec("long", "doors")])
    )
    mlflow.onnx.save_model(graph(), str(folder / "frame"), signature=columns, input_example=FRAME)
    mlflow.onnx.save_model(graph(), str(folder / "tensor"), signature=tensor, input_example=TENSOR)
    mlflow.onnx.save_model(graph(), str(folder / "bare"))


def values(predicted: Any) -> np.ndarray[Any, Any]:
    """Lay predictions out as numbers, one a row, whatever MLflow has put around them."""
    if isinstance(predicted, dict):
        predicted = next(iter(predicted.values()))
    return np.asarray(predicted, dtype=np.float64).reshape(-1)


def ask(folder: Path, port: str) -> None:
    """Print a line for each point."""
    client = ScoringServerClient("127.0.0.1", port)
    url = f"http://127.0.0.1:{port}"

    def point(name: str, holds: Callable[[], bool]) -> None:
        try:
            said = "yes" if holds() else "no"
        except Exception as error:
            said = f"no: {type(error).__name__}: {error}"[:300]
        print(f"{said}: {name}", flush=True)

    def same(model: str, data: Any) -> Callable[[], bool]:
        def holds() -> bool:
            wanted = mlflow.pyfunc.load_model(str(folder / model)).predict(data)
            answered = posted(dump_input_data(data), model=model)
            answered.raise_for_status()
            return np.allclose(values(answered.json()["predictions"]), values(wanted), rtol=1e-6)

        return holds

    def posted(body: Any, kind: str = "application/json", model: str = "frame") -> Any:
        path = f"{url}/serving-endpoints/{model}/invocations"
        return requests.post(path, data=body, headers={"Content-Type": kind}, timeout=20)

    def by_client() -> bool:
        wanted = mlflow.pyfunc.load_model(str(folder / "frame")).predict(FRAME)
        got = client.invoke(FRAME, params={"unknown": 1}).get_predictions()
        return np.allclose(values(got), values(wanted), rtol=1e-6)

    point("the client's ping", lambda: client.ping() is None)
    point("the client's version", lambda: bool(client.get_version()))
    point("the client's invoke of a frame, as MLflow predicts", by_client)
    point("a frame with more columns, as MLflow predicts", same("frame", FRAME.assign(note="x")[["note", *FRAME]]))
    point("a tensor, as MLflow predicts", same("tensor", TENSOR))
    point("a tensor without a signature, as MLflow predicts", same("bare", TENSOR))
    for model in ("frame", "tensor"):
        example = (folder / model / "serving_input_example.json").read_text()
        data = FRAME if model == "frame" else TENSOR
        wanted = values(mlflow.pyfunc.load_model(str(folder / model)).predict(data))
        point(
            f"the request that MLflow writes beside the {model} ({next(iter(json.loads(example)))})",
            lambda example=example, model=model, wanted=wanted: np.allclose(
                values(posted(example, model=model).json()["predictions"]), wanted
            ),
        )
    point("CSV of a frame", lambda: len(posted(FRAME.to_csv(index=False), "text/csv").json()["predictions"]) == 3)
    wrong = posted('{"dataframe_records": [{"width": 1}]}')
    point("an error has error_code and message", lambda: {"error_code", "message"} <= wrong.json().keys())
    point("another type is refused with 415", lambda: posted("x", "text/plain").status_code == 415)


if __name__ == "__main__":
    if sys.argv[1] == "save":
        save(Path(sys.argv[2]))
    else:
        ask(Path(sys.argv[2]), sys.argv[3])
