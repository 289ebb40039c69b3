"""The first request that is no prediction costs no more than the next one: live predictions would wait for it."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from serving.http_api.app import create_app
from serving.settings import Settings
from tests.conftest import MODELS


def test_routes_are_built_before_the_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """What FastAPI makes of a route is made when the server starts, not on the event loop that serves."""
    with TestClient(create_app(Settings(models=MODELS))) as client:
        monkeypatch.setattr("fastapi.routing.get_dependant", lambda *_, **__: pytest.fail("a route was built"))
        assert client.get("/nothing").status_code == 404
        assert client.get("/v2/health/ready").status_code == 200
