"""What platforms expect of the container that they start: told by the environment, as settings and as paths.

One image serves all: each platform says by the environment that it is there, and nothing here is on without that or
the setting `platform`. Sources, by name:
mlflow: https://mlflow.org/docs/latest/ml/deployment/deploy-model-locally
databricks: https://docs.databricks.com/machine-learning/model-serving/score-custom-model-endpoints.html
sagemaker: https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-inference-code.html,
  https://docs.aws.amazon.com/sagemaker/latest/dg/mms-container-apis.html
vertex: https://cloud.google.com/vertex-ai/docs/predictions/custom-container-requirements
azureml: https://learn.microsoft.com/azure/machine-learning/how-to-inference-server-http
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

Name: TypeAlias = Literal["mlflow", "databricks", "sagemaker", "vertex", "azureml"]

_TOLD_BY: dict[str, Name] = {
    "AIP_HTTP_PORT": "vertex",
    "AZUREML_MODEL_DIR": "azureml",
    "SAGEMAKER_BIND_TO_PORT": "sagemaker",
}
"""Variables that one platform alone sets."""


class Platform(NamedTuple):
    """Paths that a platform asks.

    predict: for a prediction by the one model. healthy: whether requests may come. named: the template for a prediction
    by a model that is named. version: whether /version is asked for. many: whether models are loaded by requests.
    """

    predict: str
    healthy: tuple[str, ...]
    named: str = "/serving-endpoints/{model}/invocations"
    version: bool = False
    many: bool = False


def settings(chosen: str | None, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings that a platform's environment stands for, by name; none where there is no platform."""
    name = chosen or next((name for variable, name in _TOLD_BY.items() if variable in environment), None)
    get = environment.get
    made: dict[str, Any] = {}
    if name == "sagemaker":
        folder = "/opt/ml/models" if _many(environment) else "/opt/ml/model"
        made = {"models": folder, "port": get("SAGEMAKER_BIND_TO_PORT", "8080")}
    elif name == "vertex":
        made = {"port": get("AIP_HTTP_PORT", "8080")}
        storage = get("AIP_STORAGE_URI", "").removeprefix("file://")
        if storage.startswith("/"):  # of a bucket, others make a folder
            made["models"] = storage
    elif name == "azureml":
        made = {"port": "5001"}
        if "AZUREML_MODEL_DIR" in environment:
            made["models"] = environment["AZUREML_MODEL_DIR"]
    if made:
        made["host"] = "0.0.0.0"  # noqa: S104  a container's own loopback can't be reached by its platform
    return {"platform": name} | made if name else {}


def platform(name: str | None, environment: Mapping[str, str]) -> Platform | None:
    """Return the paths of a platform."""
    if name == "sagemaker":
        return Platform("/invocations", ("/ping",), "/models/{model}/invoke", many=_many(environment))
    if name == "vertex":
        predict, health = environment.get("AIP_PREDICT_ROUTE"), environment.get("AIP_HEALTH_ROUTE")
        return Platform("/" + (predict or "predict").lstrip("/"), ("/" + (health or "health").lstrip("/"),))
    if name == "azureml":
        return Platform("/score", ("/",))
    return Platform("/invocations", ("/ping", "/health"), version=True) if name else None


def _many(environment: Mapping[str, str]) -> bool:
    return environment.get("SAGEMAKER_MULTI_MODEL", "").lower() == "true"
