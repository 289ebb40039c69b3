"""Other servers as subjects, on the same models: each in its own environment, from PyPI."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import onnxruntime

from serving.tensors import ONNX
from tests.conformance import probes
from tests.conformance.environments import environment
from tests.conformance.subject import Subject
from tests.conftest import MODELS

RUNTIMES = Path(__file__).parent / "runtimes"


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in held]
    for sock in held:
        sock.close()
    return ports


def _models(root: Path) -> Iterator[tuple[str, str, Path, dict[str, Any]]]:
    """Name, version, file and tensors of the newest version of every model."""
    shutil.copytree(MODELS, root)
    probes.write(root)
    for folder in sorted(root.iterdir()):
        if (folder / "1").is_dir():
            version = max((p.name for p in folder.iterdir() if p.name.isdigit()), key=int)
            path = folder / version / "model.onnx"
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            tensors = {
                side: [
                    {
                        "name": port.name,
                        "datatype": ONNX.get(port.type, "FP32"),
                        "shape": [d if isinstance(d, int) else -1 for d in port.shape],
                    }
                    for port in ports
                ]
                for side, ports in (("inputs", session.get_inputs()), ("outputs", session.get_outputs()))
            }
            yield folder.name, version, path, tensors


@contextmanager
def mlserver() -> Iterator[Subject]:
    """MLServer with a small runtime of onnxruntime, written as its documentation says."""
    python = environment("mlserver") / "bin"
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "served"
        root.mkdir()
        http, grpc, metrics = _free_ports(3)
        settings = {
            "host": "127.0.0.1",
            "http_port": http,
            "grpc_port": grpc,
            "metrics_port": metrics,
            "parallel_workers": 0,
        }
        (root / "settings.json").write_text(json.dumps(settings))
        shutil.copy(RUNTIMES / "mlserver_onnx.py", root)
        for name, version, path, tensors in _models(Path(temporary) / "models"):
            (root / name).mkdir()
            model = {
                "name": name,
                "implementation": "mlserver_onnx.OnnxRuntime",
                "parameters": {"uri": str(path), "version": version},
                "platform": "onnx",
                **tensors,
            }
            (root / name / "model-settings.json").write_text(json.dumps(model))
        with _running([str(python / "mlserver"), "start", str(root)], root) as process:
            yield from _subject(process, f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}", "/v2/health/ready")


@contextmanager
def kserve() -> Iterator[Subject]:
    """KServe's Python model server, with a small model class, written as its documentation says."""
    python = environment("kserve") / "bin" / "python"
    with tempfile.TemporaryDirectory() as temporary:
        http, grpc = _free_ports(2)
        models = [
            {"name": name, "version": version, "path": str(path), **tensors}
            for name, version, path, tensors in _models(Path(temporary) / "models")
        ]
        described = Path(temporary) / "models.json"
        described.write_text(json.dumps(models))
        environment("kserve")
        line = [str(python), str(RUNTIMES / "kserve_onnx.py"), str(described), "--http_port", str(http)]
        with _running([*line, "--grpc_port", str(grpc)], Path(temporary)) as process:
            yield from _subject(process, f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}", "/v2/health/ready")


def _subject(process: subprocess.Popen[bytes], url: str, grpc: str, ready: str) -> Iterator[Subject]:
    subject = Subject(url, grpc)
    try:
        until = time.monotonic() + 120
        while True:
            try:
                if subject.client.get(ready).status_code == 200:
                    break
            except Exception:  # not yet listening
                time.sleep(0.2)
            assert process.poll() is None, "the server has ended: see its log"
            assert time.monotonic() < until, "the server does not become ready"
        yield subject
    finally:
        subject.close()


@contextmanager
def _running(line: list[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(line, cwd=folder, stdout=log, stderr=log)
        try:
            yield process
        except BaseException:
            print((folder / "log").read_text()[-3000:])
            raise
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


PEERS: dict[str, Callable[[], AbstractContextManager[Subject]]] = {"mlserver": mlserver, "kserve": kserve}
