"""Many deployers at once, as processes of their own: one change after the other, and none lost or invented."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from serving.errors import GenerationConflict
from serving.repository import history as history_module
from serving.repository import servers, transitions
from serving.repository.traffic import Latest, Traffic
from serving.repository.traffic_store import TrafficStore
from serving.repository.transitions import Transition
from tests.drills.drill import Report, drill

VERSIONS = ("1", "2", "3", "4")

Done = dict[str, Any]
"""What one deployer saw: `won` (generation and what), `lost` races, `spurious` errors."""


@drill("deployers", "32 deployers at once: every change is in the history, in one order, and the last one is served")
def deployers(report: Report, *, processes: int = 32, operations: int = 100, live: bool = True) -> None:
    """Change one model from many processes while two workers follow; then the same without the lock, as a control."""
    from tests.conftest import running  # not at the top: each deployer would load what tests of HTTP need

    with _folder() as root:
        if live:
            with running("--workers", "2", models=root):
                _judge(report, root, _run(root, processes, operations, locked=True), processes * operations)
                final = TrafficStore(root).read("iris")
                waited = servers.Waiting(root, "iris", final.generation, seconds=60).wait()
                late = len(waited.problems) + len(waited.unknown)
                report.exactly("servers that do not serve the last winner's state", late, 0)
        else:
            _judge(report, root, _run(root, processes, operations, locked=True), processes * operations)
    # Few deployers may miss each other by chance, so the control gets some tries to meet a race.
    report.control("without the lock", any(_races(min(processes, 8), min(operations, 20)) for _ in range(20)))


def _races(processes: int, operations: int) -> bool:
    """Tell whether deployers without the lock got in each other's way."""
    with _folder() as root:
        done = _run(root, processes, operations, locked=False)
        wins = [won[0] for one in done for won in one["won"]]
        return len(set(wins)) < len(wins) or _breaks(TrafficStore(root).history("iris", 10_000)) > 0


def _judge(report: Report, root: Path, done: list[Done], operations: int) -> None:
    store = TrafficStore(root)
    history = store.history("iris", 1_000_000)
    won = {generation: (who, what) for who, one in enumerate(done) for generation, what in one["won"]}
    noted = {entry["generation"]: (int(entry["who"]), entry["what"]) for entry in history}
    report.exactly("changes that deployers were told are made", sum(len(one["won"]) for one in done), operations)
    report.exactly(
        "of them in the history, by who and what", sum(noted.get(g) == w for g, w in won.items()), operations
    )
    report.exactly("lines in the history", len(history), operations)
    report.exactly("lines whose `before` is not the `after` above", _breaks(history), 0)
    report.exactly("errors without a cause", sum(len(one["spurious"]) for one in done), 0)
    # Few changes may well meet no other; many that never do would not be at once.
    report.at_least("races lost, and run again", sum(one["lost"] for one in done), operations // 1000)
    final = history[-1]["after"] == store.read("iris").document()
    report.exactly("final state is the last winner's", float(final), 1)


def _breaks(history: list[dict[str, Any]]) -> int:
    first = int(history[0]["before"] != Traffic().document()) if history else 1
    return first + sum(two["before"] != one["after"] for one, two in itertools.pairwise(history))


@contextmanager
def _folder() -> Iterator[Path]:
    from tests.conftest import MODELS

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for version in VERSIONS:
            shutil.copytree(MODELS / "iris" / "1", root / "iris" / version)
        yield root


def _run(root: Path, processes: int, operations: int, *, locked: bool) -> list[Done]:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes)
    started = [
        context.Process(target=_deploy, args=(root, number, operations, locked, barrier)) for number in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    return [json.loads((root / f".deployer-{number}.json").read_bytes()) for number in range(processes)]


def _deploy(root: Path, number: int, operations: int, locked: bool, barrier: Barrier) -> None:
    """Be one deployer: half of the changes are for the generation that was seen, and tried again when it has passed."""
    if not locked:
        history_module.try_lock = lambda opened: True  # type: ignore[attr-defined]
    store, chance = TrafficStore(root), random.Random(number)
    done: Done = {"won": [], "lost": 0, "spurious": []}
    barrier.wait(300)
    for turn in range(operations):
        what, step = _order(chance, number)
        while True:
            seen = None
            try:
                seen = store.read("iris").generation if turn % 2 else None
                after = store.change("iris", _slow(step, locked), who=str(number), what=what, if_generation=seen)
            except GenerationConflict as conflict:
                done["lost"] += 1
                if conflict.current["generation"] == seen:
                    done["spurious"].append(conflict.message)
                continue
            except Exception as error:  # whatever it is, no deployer should see it
                done["spurious"].append(repr(error))
                break
            done["won"].append((after.generation, what))
            break
    (root / f".deployer-{number}.json").write_text(json.dumps(done))


def _order(chance: random.Random, number: int) -> tuple[str, Transition]:
    version = chance.choice(VERSIONS)
    kind = chance.random()
    if kind < 0.6:
        return f"promote {version}", transitions.promote(version, available=VERSIONS)
    if kind < 0.9:
        return f"label {version}", transitions.label(f"by-{number}", version, available=VERSIONS)
    return f"keep {version}", transitions.keep(Latest(latest=int(version)), available=VERSIONS)


def _slow(step: Transition, locked: bool) -> Transition:
    if locked:
        return step

    def slow(traffic: Traffic) -> Traffic:
        time.sleep(0.005)
        return step(traffic)

    return slow
