"""Publishing is cut off, or the disk fails, at every call that reaches it: the folder is as before, or as after."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx

from serving.deploy import publish
from serving.gate import gate
from serving.gate.gate import Gate
from serving.gate.report import Report as Verdict
from serving.repository import manifest, transitions
from serving.repository.manifest import MODEL_FILE
from serving.repository.repository import Contents, Repository
from serving.repository.traffic_store import TrafficStore
from tests.conftest import MODELS
from tests.drills.drill import Report, drill

FAULTS = Path(__file__).with_name("faults.c")
KINDS = ("kill", "full", "broken", "once")
"""The process ends; no space from this call on; EIO from this call on; this one call fails with EIO."""
REPOSITORY = Path(__file__).parents[2]


class Willing(Gate):
    """A gate that says yes at once: it has a drill of its own."""

    def examine(self, folder: Path, **_: object) -> Verdict:
        found = manifest.read(folder)
        assert found is not None
        return Verdict(ok=True, content=found.content, runtime=gate.runtime(), time=0)


class Publisher:
    """A process with faults.c preloaded that forks for each publication, and has it struck at a chosen call."""

    def __init__(self, folder: Path) -> None:
        library = folder / "faults.so"
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(FAULTS), "-ldl"], check=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.drills.publishing"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(REPOSITORY)},
            text=True,
        )

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def publish(self, root: Path, model: Path, *, apart: bool = False, **faults: str) -> int:
        """Return the exit status of one publication; negative where a signal ended it.

        apart: whether it is staged on another file system.
        """
        how = "publish apart" if apart else "publish"
        return self._do({"how": how, "root": str(root), "model": str(model), "faults": faults})

    def promote(self, root: Path, version: str, **faults: str) -> int:
        """Return the exit status of making a version of iris stable."""
        return self._do({"how": "promote", "root": str(root), "model": version, "faults": faults})

    def copy(self, root: Path, model: Path, **faults: str) -> int:
        """Copy plainly, as a script would."""
        return self._do({"how": "copy", "root": str(root), "model": str(model), "faults": faults})

    def _do(self, task: object) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def serve() -> None:
    """Be the publisher's process."""
    for line in sys.stdin:
        task = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.environ.update(task["faults"], FAULT_ROOT=str(Path(task["root"]).parent))
                _one(task["how"], Path(task["root"]), task["model"])
                status = 0
            finally:
                os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _one(how: str, root: Path, model: str) -> None:
    if how.startswith("publish"):
        state = _state(root, "apart" in how)
        publish.publish(root, "iris", Path(model), who="drill", examiner=Willing(), state_dir=state)
        return
    if how == "promote":
        step = transitions.promote(model, available=["1", "2", "3"])
        TrafficStore(root).change("iris", step, who="drill", what=f"promote {model}")
        return
    (root / "iris" / "1").mkdir(parents=True)
    content = Path(model).read_bytes()
    with (root / "iris" / "1" / MODEL_FILE).open("wb", buffering=0) as file:
        for at in range(0, len(content), 512):
            file.write(content[at : at + 512])


@drill("publishing", "cut off or out of space at any call to the disk, a publication is whole or not there")
def publishing(report: Report, *, strikes: int | None = None) -> None:
    """Strike at each call in turn, for a new model and for a new version; look at the folder, then publish again.

    strikes: how many, evenly chosen; None strikes at every call, in every way.
    """
    with tempfile.TemporaryDirectory(prefix="publishing-") as temporary, Publisher(Path(temporary)) as publisher:
        folder = Path(temporary)
        old, new = _models(folder)
        places = []
        for apart, before in itertools.product((False, True), (0, 1)):
            root = _root(folder / f"count-{apart}-{before}", old if before else None)
            assert publisher.publish(root, new, apart=apart, FAULT_COUNT=str(folder / "count")) == 0
            calls = int((folder / "count").read_text())
            what = f"{('a new model', 'a new version')[before]}{', staged on another file system' if apart else ''}"
            report.at_least(f"calls to the disk of publishing {what}", calls, 10)
            places += [(apart, before, at, kind) for at, kind in itertools.product(range(1, calls + 1), KINDS)]
        if strikes is not None:
            places = places[:: max(1, len(places) // strikes)]
        half = gone = stuck = left = struck = 0
        for apart, before, at, kind in places:
            root = _root(folder / f"{apart}-{before}-{at}-{kind}", old if before else None)
            struck += publisher.publish(root, new, apart=apart, FAULT_AT=str(at), FAULT_KIND=kind) != 0
            contents = _look(root)
            half += len(contents.problems)
            gone += len(contents.found) < before
            left += kind != "kill" and any((_state(root, apart) / "staging").glob("*"))
            # Whoever was told that it failed, or died, tries again: the same bytes become one version.
            publish.publish(root, "iris", new, examiner=Willing())
            after = _look(root)
            stuck += len(after.found) != before + 1 or bool(after.problems)
            shutil.rmtree(root.parent)
            shutil.rmtree(_state(root, apart), ignore_errors=True)
        report.at_least("strikes: kills, no space, one failure", len(places), 200 if strikes is None else strikes)
        report.at_least("publications that did not end well because of it", struck, len(places) // 2)
        report.exactly("half a version, or a model without one, in the folder", half, 0)
        report.exactly("times that the version before was gone", gone, 0)
        report.exactly("times that publishing again did not make it whole, once", stuck, 0)
        report.at_most("staging left behind by a process that lived and could write", left, 0)
        shutil.rmtree(f"/dev/shm{folder}", ignore_errors=True)
        plain = _root(folder / "plain", None)
        publisher.copy(plain, old, FAULT_AT="5", FAULT_KIND="kill")
        report.control("a plain copy, cut off, leaves half a version", bool(_look(plain).problems))


def _state(root: Path, apart: bool) -> Path:
    """Name a state folder; faults.c strikes at it too, as the path of what is struck is in its path."""
    return Path(f"/dev/shm{root.parent}/state") if apart else root.parent / "state"


def _models(folder: Path) -> list[Path]:
    paths = []
    for index in (0, 1):
        proto = onnx.load(str(MODELS / "iris" / "1" / MODEL_FILE))
        proto.doc_string = f"{index}"
        paths.append(folder / f"{index}.onnx")
        paths[-1].write_bytes(proto.SerializeToString())
    return paths


def _look(root: Path) -> Contents:
    return Repository(root, TrafficStore(root).read).scan()


def _root(folder: Path, before: Path | None) -> Path:
    root = folder / "models"
    root.mkdir(parents=True)
    if before is not None:
        (root / "iris" / "1").mkdir(parents=True)
        shutil.copy(before, root / "iris" / "1" / MODEL_FILE)
    return root


if __name__ == "__main__":
    serve()
