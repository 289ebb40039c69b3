"""The peers: what each is installed from, how its documentation advises to run it on one core, and where it says so."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.contestants import Contestant, free_port

HERE = Path(__file__).parent
RUNTIMES = HERE.parents[1] / "tests" / "conformance" / "runtimes"


@dataclass(frozen=True)
class Peer:
    """packages: from PyPI, the peer's own first. command: {bin} is its environment's, {port} where it listens.

    form: of `FORMS`. setting: what `page` advises.
    """

    name: str
    packages: tuple[str, ...]
    command: tuple[str, ...]
    form: str
    path: str
    ready: str
    setting: str
    page: str
    env: dict[str, str] = field(default_factory=dict)

    def contestant(self, programs: Path, model: Path) -> Contestant:
        """Say how it is started. programs: of its environment. model: the file."""
        command = tuple(part.replace("{bin}", str(programs)) for part in self.command)
        path = f"{programs}:{os.environ['PATH']}"
        env = {"MODEL": str(model), "PATH": path, "PYTHONPATH": "", **self.env}
        return Contestant(self.name, command, {self.form: self.path}, self.ready, env)


def peers(scratch: Path, model: Path) -> list[Peer]:
    """Make the table. scratch: for what some of them want to read."""
    served = [{"name": "forest", "version": "1", "path": str(model), "inputs": [], "outputs": []}]
    served[0]["outputs"] = [
        {"name": "label", "datatype": "INT64", "shape": [-1]},
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, 2]},
    ]
    (scratch / "kserve.json").write_text(json.dumps(served))
    quiet = {"version": 1, "loggers": {name: {"level": "ERROR"} for name in ("kserve", "uvicorn")}}
    (scratch / "quiet.json").write_text(json.dumps(quiet))
    (scratch / "mlserver").mkdir()
    return [
        Peer(
            "typical FastAPI",
            ("fastapi", "uvicorn[standard]", "numpy", "onnxruntime"),
            (
                "{bin}/uvicorn",
                "--port",
                "{port}",
                "--log-level",
                "error",
                "--no-access-log",
                "benchmarks.typical_fastapi:app",
            ),
            "v2",
            "/infer",
            "/ready",
            "uvicorn with uvloop and httptools, one process a core; the model runs in threads",
            "https://fastapi.tiangolo.com/deployment/server-workers/",
            {"PYTHONPATH": str(HERE.parents[1])},
        ),
        Peer(
            "MLServer",
            ("mlserver", "onnxruntime"),
            (
                "env",
                "MLSERVER_HTTP_PORT={port}",
                f"MLSERVER_GRPC_PORT={free_port()}",
                f"MLSERVER_METRICS_PORT={free_port()}",
                "{bin}/mlserver",
                "start",
                str(scratch / "mlserver"),
            ),
            "v2",
            "/v2/models/forest/infer",
            "/v2/models/forest/ready",
            "a custom runtime; no pool of processes, since there is one core",
            "https://docs.seldon.ai/mlserver/user-guide/parallel-inference",
            {
                "PYTHONPATH": str(RUNTIMES),
                "MLSERVER_HOST": "127.0.0.1",
                "MLSERVER_DEBUG": "false",
                "MLSERVER_PARALLEL_WORKERS": "0",
                "MLSERVER_MODEL_NAME": "forest",
                "MLSERVER_MODEL_IMPLEMENTATION": "mlserver_onnx.OnnxRuntime",
                "MLSERVER_MODEL_URI": str(model),
            },
        ),
        Peer(
            "KServe",
            ("kserve", "onnxruntime"),
            (
                "{bin}/python",
                str(RUNTIMES / "kserve_onnx.py"),
                str(scratch / "kserve.json"),
                "--http_port",
                "{port}",
                "--enable_grpc",
                "false",
                "--enable_latency_logging",
                "false",
                "--log_config_file",
                str(scratch / "quiet.json"),
            ),
            "v2",
            "/v2/models/forest/infer",
            "/v2/models/forest/ready",
            "a custom model, one worker, no line of the log for each request",
            "https://kserve.github.io/website/docs/reference/python-runtime-sdk/python-runtime-sdk-api",
        ),
        Peer(
            "BentoML",
            ("bentoml", "numpy", "onnxruntime"),
            (
                "{bin}/bentoml",
                "serve",
                "bentoml_service:Forest",
                "--working-dir",
                str(HERE),
                "--host",
                "127.0.0.1",
                "--port",
                "{port}",
            ),
            "rows",
            "/predict",
            "/readyz",
            "one worker, adaptive batching",
            "https://docs.bentoml.com/en/latest/get-started/adaptive-batching.html",
            {"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": str(scratch / "bentoml")},
        ),
        Peer(
            "LitServe",
            ("litserve", "pyzmq", "numpy", "onnxruntime"),
            ("{bin}/python", str(HERE / "litserve_service.py"), "{port}"),
            "rows",
            "/predict",
            "/health",
            "one worker and one API server, the fast queue; its batches made it slower",
            "https://lightning.ai/docs/litserve/api-reference/litserver",
        ),
        Peer(
            "Ray Serve",
            ("ray[serve,haproxy]", "numpy", "onnxruntime"),
            ("{bin}/python", str(HERE / "ray_service.py"), "{port}"),
            "rows",
            "/",
            "/-/healthz",
            "one replica, HAProxy before it, its throughput-optimized flags, batches of up to 32 requests",
            "https://docs.ray.io/en/latest/serve/advanced-guides/performance.html",
            {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_USAGE_STATS_ENABLED": "0"},
        ),
        Peer(
            "MLflow",
            ("mlflow", "onnx", "onnxruntime"),
            ("{bin}/python", str(HERE / "mlflow_service.py"), str(scratch / "mlflow"), "{port}"),
            "mlflow",
            "/invocations",
            "/ping",
            "`mlflow models serve` of the ONNX flavour, one worker",
            "https://mlflow.org/docs/latest/ml/deployment/deploy-model-locally",
        ),
        Peer(
            "mosec",
            ("mosec", "numpy", "onnxruntime"),
            (
                "{bin}/python",
                str(HERE / "mosec_service.py"),
                "--address",
                "127.0.0.1",
                "--port",
                "{port}",
                "--log-level",
                "error",
            ),
            "rows",
            "/inference",
            "/",
            "one worker, batches of up to 32 requests, waited for no longer than a batch takes",
            "https://github.com/mosecorg/mosec#performance-tuning",
        ),
    ]
