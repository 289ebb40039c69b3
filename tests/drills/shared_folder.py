"""Several servers on one models folder, as on machines whose clocks disagree and whose mounts tell of no changes."""

from __future__ import annotations

import shutil
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import httpx2 as httpx

from serving.repository import servers, transitions
from serving.repository.traffic_store import TrafficStore
from tests.conftest import MODELS, Server, faulty
from tests.drills.drill import Report, drill
from tests.drills.steady import PATH, ROW, until

MACHINES: tuple[dict[str, object], ...] = (
    {"boot": "here"},
    {"boot": "there", "clock": 60, "off": ["events"]},
    {"boot": "elsewhere", "clock": -60, "off": ["events"]},
)


@drill("shared-folder", "servers of one folder adopt each change within 3 s, and who waits for all waits no longer")
def shared_folder(report: Report, *, times: int = 20) -> None:
    """Promote one version and the other in turn; each time ask every server until all answer with it."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ending:
        root, state = Path(folder) / "models", Path(folder) / "state"
        shutil.copytree(MODELS / "iris", root / "iris")
        running = [ending.enter_context(faulty(m, "--state-dir", str(state), models=root)) for m in MACHINES]
        until(lambda: len(servers.ServerMonitor(root, state).servers()) == len(MACHINES))
        store, adopted, waited = TrafficStore(root, state), [], 0
        for turn in range(times):
            time.sleep(turn % 4 * 0.6)  # at other moments between two looks at the folder
            version, began = str(turn % 2 + 1), time.monotonic()
            step = transitions.promote(version, available=("1", "2"))
            after = store.change("iris", step, who="drill", what=f"promote {version}")
            found = servers.Waiting(root, "iris", after.generation, seconds=30, state_dir=state).wait()
            waited += found.serving == len(MACHINES) and all(_version(server) == version for server in running)
            adopted.append(time.monotonic() - began)
        report.exactly("changes that all served once the wait was over", waited, times)
        report.at_most("slowest", max(adopted), 3.0, "s")
        deaf = ending.enter_context(faulty({"off": ["looks"]}, "--state-dir", str(state), models=root))
        after = store.change("iris", transitions.promote("1", available=("1", "2")), who="drill", what="promote 1")
        found = servers.Waiting(root, "iris", after.generation, seconds=6, state_dir=state).wait()
        report.control("one that does not look at the folder is missed", bool(found.problems or found.unknown))
        assert _version(deaf)


def _version(server: Server) -> str:
    return str(httpx.post(server.url + PATH, content=ROW, timeout=30).json()["model_version"])
