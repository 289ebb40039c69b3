"""The paths that ask for a prediction over HTTP, and their dialects."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from serving.bulk.whole import read_parquet
from serving.prediction.endpoints import Routes
from serving.protocols import mlflow, open_inference, predict_v1
from serving.protocols.codec import Codec

ROUTES = {
    ("v1", "name"): "/v1/models/{model}:predict",
    ("v1", "version"): "/v1/models/{model}/versions/{version}:predict",
    ("v1", "label"): "/v1/models/{model}/labels/{label}:predict",
    ("v2", "name"): "/v2/models/{model}/infer",
    ("v2", "version"): "/v2/models/{model}/versions/{version}/infer",
}
CODECS: dict[str, Callable[[Any], Codec]] = {"v1": predict_v1.Codec, "v2": open_inference.Codec}


def prediction_paths(mlflow_path: str | None) -> tuple[Routes, dict[str, Callable[[Any], Codec]]]:
    """Return the paths and codecs of an application; of MLflow's dialect too where a path for it is given."""
    if mlflow_path is None:
        return ROUTES, CODECS
    routes = ROUTES | {(mlflow.PROTOCOL, "name"): mlflow_path}
    return routes, CODECS | {mlflow.PROTOCOL: partial(mlflow.Codec, read_parquet=read_parquet)}
