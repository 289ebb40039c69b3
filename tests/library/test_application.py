"""serving.lifespan, serving.router and serving.create_app in applications of others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Request
from fastapi.testclient import TestClient
from pydantic import BaseModel, ValidationError
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

import serving
from serving import library
from serving.settings import Settings
from tests.library.conftest import ROWS

BODY = {"instances": ROWS}
PATHS = ("v1/models/iris:predict", "v1/models/iris/versions/1:predict", "v1/models/iris/labels/stable:predict")


def current_user(authorization: Annotated[str, Header()] = "") -> str:
    if authorization != "Bearer good":
        raise HTTPException(401, "who are you?")
    return "ada"


class Thing(BaseModel):
    size: int


class Guard:
    """A middleware of somebody's that lets nobody in who has no token."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (b"authorization", b"Bearer good") not in scope["headers"]:
            await PlainTextResponse("who are you?", 401)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def by_include(models: Path) -> FastAPI:
    app = FastAPI(lifespan=serving.lifespan(models))
    app.include_router(serving.router, prefix="/ml", dependencies=[Depends(current_user)])
    return app


def by_application(models: Path) -> FastAPI:
    app = FastAPI(lifespan=serving.lifespan(models), dependencies=[Depends(current_user)])
    app.include_router(serving.router, prefix="/ml")
    return app


def by_router(models: Path) -> FastAPI:
    around = APIRouter(prefix="/ml", dependencies=[Depends(current_user)])
    around.include_router(serving.router)
    app = FastAPI(lifespan=serving.lifespan(models))
    app.include_router(around)
    return app


def by_middleware(models: Path) -> FastAPI:
    app = FastAPI(lifespan=serving.lifespan(models))
    app.include_router(serving.router, prefix="/ml")
    app.add_middleware(Guard)
    return app


def by_earlier_route(models: Path) -> FastAPI:
    app = FastAPI(lifespan=serving.lifespan(models))

    @app.post("/ml/v1/models/iris:predict")
    @app.post("/ml/v1/models/iris/{rest:path}")
    @app.get("/ml/v1/models/{rest:path}")
    async def mine(request: Request) -> Any:
        current_user(request.headers.get("authorization", ""))
        return {"predictions": "mine"}

    app.include_router(serving.router, prefix="/ml")
    return app


@pytest.mark.parametrize("guarded", [by_include, by_application, by_router, by_middleware])
def test_what_an_application_asks_is_asked_of_predictions(models: Path, guarded: Any) -> None:
    """Dependencies and middleware of the application stand before each prediction, and no short way passes them."""
    with TestClient(guarded(models)) as client:
        for path in PATHS:
            assert client.post(f"/ml/{path}", json=BODY).status_code == 401
            allowed = client.post(f"/ml/{path}", json=BODY, headers={"authorization": "Bearer good"})
            assert (allowed.status_code, len(allowed.json()["predictions"])) == (200, 2)
        assert client.get("/ml/v1/models").status_code == 401
        assert client.app.state.serving.shared.paths == {}  # type: ignore[attr-defined]


def test_a_route_in_front_gets_the_request(models: Path) -> None:
    """Where the application has a route of its own for a path of predictions, that route answers."""
    with TestClient(by_earlier_route(models)) as client:
        for path in PATHS:
            assert client.post(f"/ml/{path}", json=BODY).status_code == 401


team = APIRouter(prefix="/team")


@team.post("/things")
async def make(thing: Thing) -> Thing:
    return thing


@team.get("/things/{number}")
async def find(number: int) -> None:
    raise HTTPException(404, "no such thing")


def plain(models: Path) -> FastAPI:
    app = FastAPI(lifespan=serving.lifespan(models, cors_origins=("https://app.example",)))
    app.include_router(team)
    app.include_router(serving.router, prefix="/ml")
    return app


@pytest.fixture(scope="module")
def client(models: Path) -> Any:
    with TestClient(plain(models)) as made:
        yield made


def test_everything_is_there_below_the_prefix(client: TestClient) -> None:
    """Health, metadata, Triton's paths, deploying and metrics answer below the prefix, in this server's form."""
    assert client.get("/ml/v2/health/ready").json()["ready"] is True
    assert client.get("/ml/v1/models/iris").json()["name"] == "iris"
    assert client.get("/ml/v2/models/iris/stats").json()["model_stats"][0]["name"] == "iris"
    assert client.get("/ml/v1/repository/models/iris").json()["traffic"]["stable"] == "1"
    refused = client.post("/ml/v1/repository/models/iris/promote")
    assert (refused.status_code, list(refused.json())) == (403, ["error"])
    missing = client.get("/ml/v2/models/rose")
    assert missing.status_code == 404
    assert "no model is called 'rose'" in missing.json()["error"]
    wrong = client.post("/ml/v1/models/iris:predict", json={"instances": [{}]})
    assert (wrong.status_code, len(wrong.json()["details"])) == (422, 4)
    for path in ("/ml/v1/models/iris:predict", "/ml/v2/repository/index"):
        refused = client.get(path)
        assert (refused.status_code, refused.headers["allow"], list(refused.json())) == (405, "POST", ["error"])


def test_errors_of_other_routes_stay_as_fastapi_has_them(client: TestClient, models: Path) -> None:
    """Validation and HTTPException of the application's own routes are FastAPI's, also where create_app made it."""
    whole = serving.create_app(models)
    whole.include_router(team)
    with TestClient(whole) as made:
        for each in (client, made):
            assert each.get("/team/things/3").json() == {"detail": "no such thing"}
            refused = each.post("/team/things", json={"size": "x"})
            assert (refused.status_code, list(refused.json())) == (422, ["detail"])
        document = made.get("/openapi.json").json()
        assert "HTTPValidationError" in document["components"]["schemas"]
        assert "422" in document["paths"]["/team/things"]["post"]["responses"]
        assert "/v1/models/iris:predict" in document["paths"]
        assert made.get("/nothing").json()["error"].startswith("there is nothing at this path")


def test_own_routes_are_counted_by_their_whole_template(client: TestClient) -> None:
    """Each route of the application is counted, under the prefixes of its routers, and never by a caller's path."""
    client.post("/team/things", json={"size": 1})
    client.get("/team/things/1")
    client.get("/team/things/2")
    client.post("/ml/v1/models/iris:predict", json=BODY)
    text = client.get("/ml/metrics").text
    for method, route, status in (
        ("POST", "/team/things", "2xx"),
        ("GET", "/team/things/{number}", "4xx"),
        ("POST", "/ml/v1/models/{model}:predict", "2xx"),
    ):
        assert f'serving_http_requests_total{{method="{method}",route="{route}",status="{status}"}}' in text
    assert "/team/things/1" not in text


def test_cors_is_the_whole_applications(client: TestClient) -> None:
    """A page of an origin in `cors_origins` may call every route."""
    asked = {"origin": "https://app.example", "access-control-request-method": "POST"}
    for path in ("/team/things", "/ml/v1/models/iris:predict"):
        allowed = client.options(path, headers=asked)
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"


def test_an_application_can_start_again(models: Path) -> None:
    """Each start loads the models anew, as one `with TestClient(app)` a test does."""
    for app, prefix in ((serving.create_app(models), ""), (plain(models), "/ml")):
        for _ in range(2):
            with TestClient(app) as client:
                answer = client.post(f"{prefix}/v1/models/iris:predict", json=BODY)
                assert answer.status_code == 200


def test_what_is_no_setting_is_refused_at_once() -> None:
    """A misspelt setting is an error where it is written, and not when the first request comes."""
    for make in (serving.create_app, serving.lifespan):
        with pytest.raises(ValidationError, match="max_batch_row"):
            make("models", max_batch_row=3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"models": "elsewhere"}, "written for models .*elsewhere, and `serving run` was told .*here"),
        ({"max_batch_rows": 7}, "written for max_batch_rows 7, and `serving run` was told 512"),
    ],
)
def test_the_commands_settings_count(monkeypatch: pytest.MonkeyPatch, given: Any, said: str) -> None:
    """Under `serving run` an application that is written for other settings does not start, and says which."""
    services: Any = SimpleNamespace(platform=None)
    monkeypatch.setattr(library, "_hosted", library._Hosted(Settings(models=Path("here")), services))
    app = serving.create_app(**given)
    with pytest.raises(library.Unfit, match=said), TestClient(app):
        pass


def test_a_predictor_without_a_server_says_what_is_missing() -> None:
    """An application that was never started, or has no lifespan of serving's, is told so by its first request."""
    app = FastAPI()

    @app.get("/")
    async def ask(iris: serving.Predictor = Depends(serving.predictor("iris"))) -> None: ...  # noqa: B008

    with TestClient(app) as client, pytest.raises(RuntimeError, match=r"serving\.lifespan"):
        client.get("/")
