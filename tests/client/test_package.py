"""`import serving` costs nothing, and what it names is there when it is asked for."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from contextlib import nullcontext

import pytest
from fastapi.testclient import TestClient

import serving
from serving.access.keys import digest
from serving.http_api.app import create_app
from serving.settings import Settings
from tests.conftest import MODELS


def test_the_package_is_light_and_the_client_without_a_server() -> None:
    """The package itself imports nothing; the client no onnxruntime, no FastAPI, no gRPC, no frames."""
    script = """
        import sys, serving
        heavy = {"numpy", "pydantic", "httpx2", "fastapi", "onnxruntime", "typer"}
        assert heavy.isdisjoint(sys.modules), heavy & set(sys.modules)
        assert "Client" in dir(serving)
        serving.Client
        heavy = {"fastapi", "uvicorn", "onnxruntime", "onnx", "typer", "grpc", "google.protobuf", "pandas", "polars"}
        assert heavy.isdisjoint(sys.modules), heavy & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


def test_every_public_name_is_there() -> None:
    """All that `__all__` names can be imported, and what it does not name is an AttributeError."""
    for name in serving.__all__:
        assert getattr(getattr(serving, name), "__name__", name) == name
    with pytest.raises(AttributeError, match="Clinet"):
        _ = serving.Clinet  # type: ignore[attr-defined]


def test_an_application_is_asked_in_its_own_process() -> None:
    """`http=` takes FastAPI's TestClient, so that tests need no socket; a wrong key is an error of its type."""
    keys = f"caller predict {digest(b'right').hex()}"
    row = {"sepal_length": 5.1, "sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2}
    with TestClient(create_app(Settings(models=MODELS, keys=keys))) as http:
        for key, error in (("right", None), ("wrong", serving.Unauthenticated), (None, serving.Unauthenticated)):
            client = serving.Client("http://testserver", api_key=key, http=http)
            with nullcontext() if error is None else pytest.raises(error):
                assert client.predict("iris", row)["label"] == "setosa"
