"""Behind a proxy that serves this server under a path of its own, and in pages of other origins."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError

from serving.http_api.app import create_app
from serving.settings import Settings
from tests.conftest import Server, running

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")

CONFIGURATION = """
daemon off; worker_processes 1; pid {folder}/pid; error_log stderr;
events {{ }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port};
    location /ml/ {{ proxy_pass http://127.0.0.1:{behind}/; {more} }}
  }}
}}
"""


@contextmanager
def nginx(server: Server, folder: Path, more: str, eventually: Callable[[Callable[[], bool]], None]) -> Iterator[str]:
    """Run nginx before a server, which it serves under /ml/; yield its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    text = CONFIGURATION.format(folder=folder, port=port, behind=server.port, more=more)
    (folder / "nginx.conf").write_text(text)
    assert NGINX is not None
    process = subprocess.Popen([NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf")], stderr=subprocess.DEVNULL)

    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        eventually(answers)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
@pytest.mark.parametrize("told_by", ["header", "setting"])
def test_the_documentation_works_under_a_path_of_a_proxy(
    told_by: str, tmp_path: Path, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    """Behind nginx at /ml/ the pages, what they load, where they send a trial and where redirects lead are there."""
    header = "proxy_set_header X-Forwarded-Prefix /ml;" if told_by == "header" else ""
    flags = ("--root-path", "/ml") if told_by == "setting" else ()
    with running(*flags) as server, nginx(server, tmp_path, header, eventually) as url, httpx.Client() as client:
        for page in ("/ml/docs", "/ml/redoc"):
            text = client.get(url + page).text
            for named in [part.split('"')[0] for part in text.split('src="')[1:] + text.split('href="')[1:]]:
                assert client.get(f"{url}/ml/{named}").status_code == 200
        document = client.get(f"{url}/ml/openapi.json").json()
        path = "/v1/models/iris:predict"
        example = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["example"]
        assert client.post(url + document["servers"][0]["url"] + path, json=example).status_code == 200
        moved = client.get(f"{url}/ml/docs/?a=b")
        assert moved.status_code == 307
        assert moved.next_request is not None
        assert str(moved.next_request.url) == f"{url}/ml/docs?a=b"
        moved = client.post(f"{url}/ml{path}/", json=example, follow_redirects=True)
        assert moved.status_code == 200


@pytest.mark.parametrize(
    ("changes", "due"),
    [
        (
            {},
            {"/ml": "/ml", "/a/b/": "/a/b", "//evil.example": None, "https://evil.example": None, '/"}],"x":[{"': None},
        ),
        ({"trusted_proxies": ("10.0.0.0/8",)}, {"/ml": None}),
        ({"trusted_proxies": (), "root_path": "/set"}, {"/ml": "/set"}),
    ],
)
def test_only_a_trusted_proxy_says_where_this_server_is(
    changes: dict[str, Any], due: dict[str, str | None], tmp_path: Path
) -> None:
    """X-Forwarded-Prefix counts from trusted proxies, and where it is a path: a page never sends to another host."""
    app = create_app(Settings(models=tmp_path, **changes))
    with TestClient(app, client=("127.0.0.1", 50000)) as client:
        for given, path in due.items():
            headers = {"X-Forwarded-Prefix": given, "X-Forwarded-For": "10.0.0.1"}
            servers = client.get("/openapi.json", headers=headers).json().get("servers")
            assert servers == (None if path is None else [{"url": path}])


@pytest.mark.parametrize(
    "origin", ["https://a.example/", "a.example", "https://A.example", "https://a.example:443", "null"]
)
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    """`--cors-origins` is compared as text: what could never match is an error, and not a page that is locked out."""
    with pytest.raises(ValidationError, match="write scheme and host"):
        Settings(cors_origins=(origin,))
    for good in ("https://a.example", "http://localhost:3000", "capacitor://localhost", "*"):
        assert Settings(cors_origins=(good,)).cors_origins == (good,)


def test_pages_of_other_origins_may_read_what_binary_answers_need() -> None:
    """`--cors-origins` takes a JSON list, and a page of such an origin may read the headers that tensors come with."""
    body = json.dumps(
        {
            "inputs": [{"name": "features", "datatype": "FP32", "shape": [1, 4], "data": [5.1, 3.5, 1.4, 0.2]}],
            "parameters": {"binary_data_output": True},
        }
    )
    with running("--cors-origins", '["https://a.example"]') as server:
        answer = httpx.post(f"{server.url}/v2/models/iris/infer", content=body, headers={"Origin": "https://a.example"})
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        exposed = {name.strip() for name in answer.headers["access-control-expose-headers"].split(",")}
        assert "inference-header-content-length" in answer.headers
        assert {"inference-header-content-length", "x-request-id", "x-model-version", "retry-after"} <= exposed
        asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "DELETE"}
        assert httpx.options(f"{server.url}/v1/jobs/1", headers=asked).status_code == 200
