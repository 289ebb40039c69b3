"""What Ray's state becomes for a load balancer, and the files that deploy: all that needs no Ray."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from serving.command_line import app
from serving.scale import upstreams
from serving.settings import Settings
from tests.conftest import MODELS, ROOT


def test_each_change_is_told_and_what_is_known_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that Ray names are told once; neither none at all nor a Ray that fails takes the last ones away."""
    script: list[list[str] | None] = [
        ["10.0.0.2:80", "10.0.0.1:80"],
        [],
        None,
        ["10.0.0.1:80", "10.0.0.2:80"],
        ["10.0.0.3:80"],
    ]

    class Ray(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            said = script.pop(0)
            self.send_response(500 if said is None else 200)
            self.end_headers()
            self.wfile.write(json.dumps({"servers": said}).encode())

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setattr(upstreams, "EVERY_S", 0.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Ray) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        told = upstreams.changes(["http://127.0.0.1:9/", f"http://127.0.0.1:{server.server_port}/"])
        assert next(told) == ["10.0.0.1:80", "10.0.0.2:80"]
        assert next(told) == ["10.0.0.3:80"]
        server.shutdown()
    assert script == []


def test_nginx_is_told_of_each_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is whole before nginx is told, each time; that it could not be told ends nothing."""
    monkeypatch.setattr(upstreams, "changes", lambda urls: iter([["10.0.0.1:80"], ["10.0.0.1:80", "10.0.0.2:80"]]))
    out = tmp_path / "upstreams.conf"
    upstreams.follow([], out, ["sh", "-c", f"cat {out} >>{tmp_path}/seen; false"])
    first, second = upstreams.nginx(["10.0.0.1:80"]), upstreams.nginx(["10.0.0.1:80", "10.0.0.2:80"])
    assert (tmp_path / "seen").read_text() == first + second


def test_without_ray_its_extra_is_named(tmp_path: Path) -> None:
    """Whoever asks for it without the extra is told how to get it."""
    with pytest.raises(ModuleNotFoundError, match="pip install 'serving\\[ray\\]'"):
        import serving.scale.ray  # noqa: F401
    rows = tmp_path / "rows.csv"
    rows.write_text("sepal_length\n1\n")
    ended = CliRunner().invoke(app, ["score", str(rows), "-m", "iris", "--models", str(MODELS), "--engine", "ray"])
    assert "pip install 'serving[ray]'" in ended.stderr


def test_what_kuberay_deploys_is_what_serve_deploy_does(tmp_path: Path) -> None:
    """The manifests carry the configurations beside them, but for what a pod's port needs; all names in them exist."""
    assert CliRunner().invoke(app, ["ray", "export", str(tmp_path)]).exit_code == 0
    for config, manifest in (("serve.yaml", "rayservice.yaml"), ("servers.yaml", "rayservice-servers.yaml")):
        alone = yaml.safe_load((tmp_path / config).read_text())
        (service, *_) = yaml.safe_load_all((tmp_path / manifest).read_text())
        carried = yaml.safe_load(service["spec"]["serveConfigV2"])
        (application,), (inside,) = alone["applications"], carried["applications"]
        if config == "servers.yaml":
            assert inside["args"].pop("host") == "0.0.0.0"
            assert inside["deployments"][0].pop("max_replicas_per_node") == 1
            (container,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["containers"]
            assert container["ports"][0]["containerPort"] == inside["args"].pop("port")
        assert carried == alone
        Settings(**application["args"])
        module, _, name = application["import_path"].partition(":")
        assert f"def {name}(" in (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
