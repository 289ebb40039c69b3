"""A version is copied into the folder of a running server, slowly, by plain tools: it is loaded once, when whole."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import numpy as np
import onnx

from serving.engine.session import OnnxSession
from serving.errors import ModelInvalid
from serving.repository import manifest
from serving.repository.manifest import MODEL_FILE, Hashes
from serving.repository.state_directory import state_folder
from tests.conftest import MODELS, Server, running
from tests.drills.drill import Report, drill

ROW = {"instances": [[5.1, 3.5, 1.4, 0.2]]}


def with_a_file_beside(source: Path, to: Path) -> None:
    """Write a model to a folder with a tensor in another file, as large models have all of theirs."""
    to.mkdir(parents=True)
    proto = onnx.load(str(source))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((64, 64), np.float32), "beside"))
    onnx.save(
        proto,
        str(to / MODEL_FILE),
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location="weights.bin",
        size_threshold=0,
    )


def cp(source: Path, to: Path, seconds: float) -> None:
    """Copy as `cp` over a slow line does: under its own name, bit by bit."""
    content = source.read_bytes()
    step = max(1, len(content) // 20)
    with to.open("wb", buffering=0) as file:
        for at in range(0, len(content), step):
            file.write(content[at : at + step])
            time.sleep(seconds / 20)


def rsync(source: Path, to: Path, seconds: float) -> None:
    """Copy as rsync does: under a hidden name, then by rename, with the old time of modification."""
    hidden = to.with_name(f".{to.name}.aB3xYz")
    cp(source, hidden, seconds)
    shutil.copystat(source, hidden)
    hidden.replace(to)


@contextmanager
def asked(server: Server, seen: list[str]) -> Iterator[None]:
    """Ask all the time; note which version answered, or what went wrong."""
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=server.url, timeout=30) as client:
            while not stop.is_set():
                answer = client.post("/v1/models/iris:predict", json=ROW)
                seen.append(answer.json()["model_version"] if answer.status_code == 200 else answer.text)

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        yield
    finally:
        stop.set()
        asker.join()


@drill("slow_copies", "a version that is copied in slowly is loaded once, when whole, and no request fails")
def slow_copies(report: Report, *, copies: int = 10, seconds: float = 3.0) -> None:
    """Copy versions in, by turns as cp and as rsync do, file after file, the weights last."""
    with tempfile.TemporaryDirectory(prefix="slow-") as temporary:
        folder = Path(temporary)
        shutil.copytree(MODELS / "iris" / "1", folder / "models" / "iris" / "1")
        source = folder / "made"
        with_a_file_beside(MODELS / "iris" / "2" / MODEL_FILE, source)
        seen: list[str] = []
        late = examined = 0
        with running("--workers", "2", models=folder / "models") as server, asked(server, seen):
            for index in range(copies):
                version, copy = str(index + 2), (cp, rsync)[index % 2]
                # Each content is its own, so that each is examined.
                proto = onnx.load(str(source / MODEL_FILE), load_external_data=False)
                proto.doc_string = version
                (source / MODEL_FILE).write_bytes(proto.SerializeToString())
                target = folder / "models" / "iris" / version
                target.mkdir()
                for name in (MODEL_FILE, "weights.bin"):
                    copy(source / name, target / name, seconds / 2)
                until = time.monotonic() + 60
                while seen[-1:] != [version] and time.monotonic() < until:
                    time.sleep(0.05)
                late += seen[-1] != version
                due = manifest.of(target, Hashes()).content
                examined += (state_folder(folder / "models") / "reports" / f"{due}.json").exists()
        halves = _halves(source)
        reports = [json.loads(p.read_text()) for p in (state_folder(folder / "models") / "reports").glob("*.json")]
    known = {str(number) for number in range(1, copies + 2)}
    report.exactly("failed requests", sum(version not in known for version in seen), 0, f"of {len(seen)}")
    report.exactly("versions that did not come to serve", late, 0)
    report.exactly("whole versions that were examined", examined, copies)
    report.exactly("examinations of anything else", len(reports) - examined - 1, 0)
    report.exactly("refusals", sum(not found["ok"] for found in reports), 0)
    report.control("a copy that is taken as it lies, half-way, can't be loaded", halves)


def _halves(source: Path) -> bool:
    """Tell whether a model that is looked at half-way can't be loaded."""
    content = (source / MODEL_FILE).read_bytes()
    with tempfile.TemporaryDirectory() as half:
        (Path(half) / MODEL_FILE).write_bytes(content[: len(content) // 2])
        try:
            OnnxSession(Path(half) / MODEL_FILE)
        except ModelInvalid:
            return True
    return False
