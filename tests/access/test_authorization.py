"""Who may: every route and gRPC method with every kind of credential, against one table.

Routes come from the application, methods from the gRPC descriptors: what is new and not in the table fails the test.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx2 as httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from serving.access.key_store import KeyStore
from serving.protocols.messages import REFLECTION, SERVICE, pool
from tests.access import issuer
from tests.conftest import MODELS, with_grpc

OPEN, PREDICT, DEPLOY, METRICS, JOBS = None, "predict", "deploy", "metrics", "jobs"

HTTP: dict[str, dict[str, str | None]] = {
    # predictions
    "/v1/models/{model}:predict": {"POST": PREDICT},
    "/v1/models/{model}/versions/{version}:predict": {"POST": PREDICT},
    "/v1/models/{model}/labels/{label}:predict": {"POST": PREDICT},
    "/v2/models/{model}/infer": {"POST": PREDICT},
    "/v2/models/{model}/versions/{version}/infer": {"POST": PREDICT},
    # what can be read of models
    "/v1/models": {"GET": PREDICT},
    "/v1/models/{model}": {"GET": PREDICT},
    "/v1/models/{model}/versions/{version}": {"GET": PREDICT},
    "/v1/models/{model}/metadata": {"GET": PREDICT},
    "/v1/models/{model}/labels/{label}": {"GET": PREDICT},
    "/v1/models/{model}/labels/{label}/metadata": {"GET": PREDICT},
    "/v1/models/{model}/drift": {"GET": PREDICT},
    "/v1/models/{model}/versions/{version}/drift": {"GET": PREDICT},
    "/v1/models/{model}/feedback": {"GET": PREDICT},
    "/v1/models/{model}:feedback": {"POST": PREDICT},
    "/v1/models/{model}/versions/{version}/metadata": {"GET": PREDICT},
    "/v2": {"GET": PREDICT},
    "/v2/models/{model}": {"GET": PREDICT},
    "/v2/models/{model}/versions/{version}": {"GET": PREDICT},
    "/v2/models/{model}/ready": {"GET": PREDICT},
    "/v2/models/{model}/versions/{version}/ready": {"GET": PREDICT},
    "/v2/models/stats": {"GET": PREDICT},
    "/v2/models/{model}/stats": {"GET": PREDICT},
    "/v2/models/{model}/versions/{version}/stats": {"GET": PREDICT},
    "/v2/models/{model}/config": {"GET": PREDICT},
    "/v2/models/{model}/versions/{version}/config": {"GET": PREDICT},
    "/v2/repository/index": {"POST": PREDICT},
    # changes
    "/v2/repository/models/{model}/load": {"POST": DEPLOY},
    "/v2/repository/models/{model}/unload": {"POST": DEPLOY},
    "/v1/repository/models/{model}": {"GET": PREDICT},
    "/v1/repository/models/{model}/report/{version}": {"GET": PREDICT},
    "/v1/repository/models/{model}/versions/{version}": {"PUT": DEPLOY, "DELETE": DEPLOY},
    "/v1/repository/models/{model}/history": {"GET": DEPLOY},
    **{
        f"/v1/repository/models/{{model}}/{verb}": {"POST": DEPLOY}
        for verb in ("promote", "canary", "shadow", "label", "rollback", "unload", "load", "keep")
    },
    # what Triton has and this server refuses to all
    "/v2/systemsharedmemory/{rest:path}": {"GET": PREDICT, "POST": PREDICT},
    "/v2/cudasharedmemory/{rest:path}": {"GET": PREDICT, "POST": PREDICT},
    "/v2/logging": {"GET": PREDICT, "POST": PREDICT},
    "/v2/trace/setting": {"GET": PREDICT, "POST": PREDICT},
    "/v2/models/{model}/trace/setting": {"GET": PREDICT, "POST": PREDICT},
    # jobs
    "/v1/jobs": {"GET": JOBS, "POST": JOBS},
    "/v1/jobs/{job}": {"GET": JOBS, "DELETE": JOBS},
    "/v1/jobs/{job}/result": {"GET": JOBS},
    "/v1/jobs/{job}/errors": {"GET": JOBS},
    "/v1/jobs/{job}/cancel": {"POST": JOBS},
    # operations
    "/metrics": {"GET": METRICS},
    "/v2/health/live": {"GET": OPEN, "HEAD": OPEN},
    "/v2/health/ready": {"GET": OPEN, "HEAD": OPEN},
    # the page that asks for a key; its document names models to who may predict only
    "/docs": {"GET": OPEN},
    "/redoc": {"GET": OPEN},
    "/docs/assets": {"GET": OPEN, "HEAD": OPEN},
    "/openapi.json": {"GET": OPEN},
}
GRPC: dict[str, str | None] = {
    f"{SERVICE}/ServerLive": OPEN,
    f"{SERVICE}/ServerReady": OPEN,
    f"{SERVICE}/ServerMetadata": PREDICT,
    f"{SERVICE}/ModelReady": PREDICT,
    f"{SERVICE}/ModelMetadata": PREDICT,
    f"{SERVICE}/ModelConfig": PREDICT,
    f"{SERVICE}/ModelStatistics": PREDICT,
    f"{SERVICE}/ModelInfer": PREDICT,
    f"{SERVICE}/ModelStreamInfer": PREDICT,
    f"{SERVICE}/RepositoryIndex": PREDICT,
    f"{SERVICE}/RepositoryModelLoad": DEPLOY,
    f"{SERVICE}/RepositoryModelUnload": DEPLOY,
    "grpc.health.v1.Health/Check": OPEN,
    "grpc.health.v1.Health/Watch": OPEN,
    "grpc.reflection.v1.ServerReflection/ServerReflectionInfo": OPEN,
    "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": OPEN,
}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
ROW = {"instances": [[5.1, 3.5, 1.4, 0.2]]}


@dataclass
class Credential:
    """An Authorization header, and the scopes that it is good for; None: it is not good at all."""

    name: str
    header: str | None
    scopes: frozenset[str] | None


def credentials(store: KeyStore) -> Iterator[Credential]:
    """Make keys in the store and give every kind of credential."""
    yield Credential("none", None, None)
    for scopes in ({PREDICT}, {DEPLOY}, {METRICS}, {JOBS}, {PREDICT, DEPLOY, METRICS, JOBS}):
        key = store.create("-".join(sorted(scopes)), frozenset(scopes), expires=time.time() + 600)
        yield Credential(f"key {scopes}", f"Bearer {key}", frozenset(scopes))
        yield Credential(f"small letters {scopes}", f"bearer {key}", frozenset(scopes))
        joined = " ".join(scopes)
        yield Credential(f"scope {scopes}", f"Bearer {issuer.token(scope=joined)}", frozenset(scopes))
        yield Credential(f"scp {scopes}", f"Bearer {issuer.token('ec', 'ES256', scp=[*scopes])}", frozenset(scopes))
        yield Credential(f"shared {scopes}", f"Bearer {issuer.token('shared', 'HS256', scp=joined)}", frozenset(scopes))
    yield Credential("token without scopes", f"Bearer {issuer.token()}", frozenset())
    yield Credential("token of odd scopes", f"Bearer {issuer.token(scope='Deploy *', scp=[1, {}, None])}", frozenset())
    everything = frozenset({PREDICT, DEPLOY, METRICS, JOBS})
    hashed = store.read()[-1].digest.hex()
    for name, header in {
        "empty": "",
        "scheme alone": "Bearer",
        "no scheme": key,
        "another scheme": f"Token {key}",
        "basic": "Basic YTpi",
        "unknown key": "Bearer serving_unknown",
        "cut key": f"Bearer {key[:-1]}",
        "longer key": f"Bearer {key}x",
        "two keys": f"Bearer {key}, Bearer {key}",
        "the hash": f"Bearer {hashed}",
        "very long": f"Bearer {'a' * 9000}",
        "expired": f"Bearer {store.create('old', everything, expires=time.time() - 1)}",
        "revoked": f"Bearer {store.create('gone', everything)}",
        **{name: f"Bearer {forged}" for name, forged in issuer.forged(" ".join(everything)).items()},
    }.items():
        yield Credential(name, header, None)
    store.revoke("gone")


def application(folder: Path, **settings: Any) -> FastAPI:
    """Make the application over models of its own, with gRPC beside it on a free port."""
    for name in ("iris", "diabetes"):  # one is unloaded and loaded, the other stays
        shutil.copytree(MODELS / name, folder / "models" / name)
    return with_grpc(models=folder / "models", **settings, drain_s=0.2, max_body_bytes=1 << 20)


@dataclass
class Closed:
    """A server where everything needs a credential."""

    client: TestClient
    credentials: list[Credential]
    store: KeyStore


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Closed]:
    folder = tmp_path_factory.mktemp("access")
    store = KeyStore(folder / "serving.keys")
    made = list(credentials(store))
    (folder / "jwks.json").write_text(issuer.jwks())
    app = application(
        folder,
        keys=str(folder / "serving.keys"),
        jwks=folder / "jwks.json",
        jwt_audience=issuer.AUDIENCE,
        jwt_issuer=issuer.ISSUER,
    )
    with TestClient(app, follow_redirects=False) as client:
        yield Closed(client, made, store)


def routes(app: FastAPI) -> dict[str, set[str]]:
    """Return the application's own table: methods by path template."""
    found: dict[str, set[str]] = {}
    for route in iter_route_contexts(app.routes):
        # A mount has no methods of its own: StaticFiles answers GET and HEAD. A prediction route answers all other
        # methods than POST with 405, whoever asks.
        predicts = str(route.path).endswith((":predict", ":feedback", "/infer"))
        found.setdefault(str(route.path), set()).update({"POST"} if predicts else route.methods or {"GET", "HEAD"})
    return found


def url(template: str) -> str:
    """Return a path of a template that is there."""
    path = template.replace("{rest:path}", "status").replace("{model}", "iris").replace("{version}", "1")
    return f"{path}/swagger-ui.css" if template == "/docs/assets" else path.replace("{label}", "latest")


def ask(client: Any, method: str, template: str, header: str | None) -> Any:
    """Send a request, by an asynchronous client too, with a body that predictions by rows take."""
    headers = {} if header is None else {"authorization": header}
    body = {"json": ROW} if template.endswith(":predict") else {}
    return client.request(method, url(template), headers=headers, **body)


def due(scope: str | None, credential: Credential) -> int | None:
    """Return the status of a refusal, or None where the caller may."""
    if scope is OPEN or (credential.scopes is not None and scope in credential.scopes):
        return None
    return 401 if credential.scopes is None else 403


def test_every_route_is_in_the_table(closed: Closed) -> None:
    """A route or method that the table of who may does not name fails here."""
    # A route for GET may answer HEAD as well, with the same rights.
    assert {p: set(m) for p, m in HTTP.items()} == routes(closed.client.app)  # type: ignore[arg-type]


def test_every_route_with_every_credential(closed: Closed) -> None:
    """Where all is closed each route lets in exactly whom the table names, and says 401 or 403 to the others."""
    wrong = []

    async def ask_all() -> None:
        # In the application's own loop: thousands of requests, each through a thread, would take half a minute.
        transport = httpx.ASGITransport(closed.client.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
            for template, method, scope in ((t, m, s) for t, scopes in HTTP.items() for m, s in scopes.items()):
                for credential in closed.credentials:
                    answer = await ask(client, method, template, credential.header)
                    refused = answer.status_code if answer.status_code in (401, 403) else None
                    if refused != due(scope, credential) or answer.status_code in (405, 500):
                        wrong.append((method, template, credential.name, answer.status_code))
                    if refused is not None:
                        assert answer.headers["www-authenticate"].startswith('Bearer realm="serving"')
                        assert set(answer.json()) == {"error"}
                        secret = (credential.header or "").removeprefix("Bearer ")
                        assert len(secret) < 16 or secret not in answer.text

    assert closed.client.portal is not None
    closed.client.portal.call(ask_all)
    assert not wrong


def test_no_route_takes_another_method(closed: Closed) -> None:
    """A method that a route does not have does nothing, whoever asks, and Allow names all that it has."""
    everything = next(c for c in closed.credentials if c.scopes is not None and len(c.scopes) == 4)
    for template, scopes in HTTP.items():
        for method in set(METHODS) - set(scopes):
            for credential in (closed.credentials[0], everything):
                answer = ask(closed.client, method, template, credential.header)
                assert answer.status_code in (401, 404, 405), (method, template)
                if "allow" in answer.headers and method != "TRACE":
                    assert set(answer.headers["allow"].split(", ")) == set(scopes), (method, template)


@pytest.mark.parametrize("keys", ["none", "deploy"])
def test_without_a_key_for_it_prediction_is_open_and_deploying_is_not(keys: str, tmp_path: Path) -> None:
    """Only deploying needs a key where no key names another scope; with no key the refusal says how to make one."""
    store = KeyStore(tmp_path / "serving.keys")
    key = store.create("ci", frozenset({DEPLOY})) if keys == "deploy" else "serving_none"
    given = {"keys": str(tmp_path / "serving.keys")} if keys == "deploy" else {}
    with TestClient(application(tmp_path, **given)) as client:
        for template, scopes in HTTP.items():
            for method, scope in scopes.items():
                status = ask(client, method, template, None).status_code
                refused = {"none": 403, "deploy": 401}[keys]
                assert (status == refused) == (scope == DEPLOY), (method, template, status)
                status = ask(client, method, template, f"Bearer {key}").status_code
                assert (status in (401, 403)) == (scope == DEPLOY and keys == "none"), (method, template, status)
        told = client.post("/v2/repository/models/iris/load").json()["error"]
        assert ("serving keys create --name NAME --scope deploy" in told) == (keys == "none")
        with channel(client) as grpc_channel:
            for method, scope in GRPC.items():
                code, told = call(grpc_channel, method, None)
                refused_code = {"none": "PERMISSION_DENIED", "deploy": "UNAUTHENTICATED"}[keys]
                assert (code == refused_code) == (scope == DEPLOY), (method, code)
                if scope == DEPLOY and keys == "none":
                    assert "serving keys create" in told


def channel(client: TestClient) -> grpc.Channel:
    return grpc.insecure_channel(f"127.0.0.1:{client.app.state.serving.companion.port}")  # type: ignore[attr-defined]


def call(to: grpc.Channel, method: str, header: str | None) -> tuple[str, str]:
    """Call a method with an empty message and return code and text."""
    metadata = () if header is None else (("authorization", header),)
    kinds = to.stream_stream if method.endswith(("StreamInfer", "ReflectionInfo")) else to.unary_stream
    try:
        waiting = kinds(f"/{method}")(iter([b""]) if kinds == to.stream_stream else b"", metadata=metadata, timeout=10)
        for _ in waiting:
            waiting.cancel()
    except grpc.RpcError as error:
        code = error.code().name
        return ("OK" if code == "CANCELLED" else code), error.details()
    return "OK", ""


def test_every_grpc_method_is_in_the_table() -> None:
    """A gRPC method that the table of who may does not name fails here."""
    services = [
        pool.FindServiceByName(SERVICE),
        *health_pb2.DESCRIPTOR.services_by_name.values(),
        *reflection_pb2.DESCRIPTOR.services_by_name.values(),
        pool.FindServiceByName(REFLECTION),
    ]
    assert set(GRPC) == {f"{service.full_name}/{method.name}" for service in services for method in service.methods}


def test_every_grpc_method_with_every_credential(closed: Closed) -> None:
    """gRPC lets in exactly whom the table names, as HTTP does."""
    wrong = []
    codes = {None: "", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED"}
    with channel(closed.client) as to:
        for method, scope in GRPC.items():
            for credential in closed.credentials:
                if credential.name in ("empty", "very long"):  # gRPC itself sends or takes no such header
                    continue
                code, told = call(to, method, credential.header)
                expected = codes[due(scope, credential)]
                if (code if code in codes.values() else "") != expected:
                    wrong.append((method, credential.name, code, told))
        code, _ = call(to, f"{SERVICE}/NewMethod", None)
        assert code == "UNIMPLEMENTED"
    assert not wrong


def test_two_credentials_are_none(closed: Closed) -> None:
    """Two Authorization headers are refused, whichever of them is good: a proxy may have judged the other."""
    good = next(c.header for c in closed.credentials if c.scopes is not None and len(c.scopes) == 4) or ""
    for pair in ((good, "Bearer x"), ("Bearer x", good), (good, good)):
        headers = [("authorization", one) for one in pair]
        assert closed.client.post("/v1/models/iris:predict", headers=headers, json=ROW).status_code == 400
        assert closed.client.post("/v2/repository/models/iris/load", headers=headers).status_code == 400
        with channel(closed.client) as to, pytest.raises(grpc.RpcError) as refused:
            to.unary_unary(f"/{SERVICE}/RepositoryIndex")(b"", metadata=headers, timeout=10)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_stranger_learns_no_model(closed: Closed) -> None:
    """Where predicting needs a key, no answer without one names a model, or tells whether there is one."""
    client = closed.client
    assert "iris" not in client.get("/openapi.json").text
    assert client.get("/v2/health/ready").json() == {"ready": True}
    for path in ("/v1/models/{}:predict", "/v2/models/{}/infer", "/v1/models/{}/versions/9:predict"):
        there, missing = (client.post(path.format(name), json=ROW) for name in ("iris", "no-such-model"))
        assert there.status_code == missing.status_code == 401
        assert there.content == missing.content
    key = next(c.header for c in closed.credentials if c.scopes == {PREDICT}) or ""
    assert "/v1/models/diabetes:predict" in client.get("/openapi.json", headers={"authorization": key}).json()["paths"]
    assert client.get("/v2/health/ready", headers={"authorization": key}).json()["not_served"] == []
