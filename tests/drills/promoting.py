"""A change of traffic is cut off, or the disk fails, at every call that reaches it: it is made, or it is not."""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from pathlib import Path

from serving.errors import InvalidRequest
from serving.repository.traffic import TRAFFIC_FILE
from serving.repository.traffic_store import TrafficStore
from tests.drills.drill import Report, drill
from tests.drills.publishing import KINDS, Publisher


@drill("promoting", "cut off or out of space at any call to the disk, a promotion is made and noted or not made")
def promoting(report: Report, *, strikes: int | None = None) -> None:
    """Strike at each call in turn, at the first promotion of a model and at the next one; look, then promote again.

    strikes: how many, evenly chosen; None strikes at every call, in every way.
    """
    with tempfile.TemporaryDirectory(prefix="promoting-") as temporary, Publisher(Path(temporary)) as publisher:
        folder = Path(temporary)
        places = []
        for before in (0, 1):
            root = _root(folder / f"count-{before}", publisher, before)
            assert publisher.promote(root, "2", FAULT_COUNT=str(folder / "count")) == 0
            calls = int((folder / "count").read_text())
            report.at_least(f"calls to the disk of the {('first', 'next')[before]} promotion", calls, 8)
            places += [(before, at, kind) for at, kind in itertools.product(range(1, calls + 1), KINDS)]
        if strikes is not None:
            places = places[:: max(1, len(places) // strikes)]
        other = lied = broken = stuck = struck = 0
        for before, at, kind in places:
            root = _root(folder / f"{before}-{at}-{kind}", publisher, before)
            status = publisher.promote(root, "2", FAULT_AT=str(at), FAULT_KIND=kind)
            struck += status != 0
            stable = TrafficStore(root).read("iris").stable
            other += stable not in ("2", "1" if before else None)
            # Who was told that it is done must find it done; who was told that it failed, not done.
            lied += (status == 0 and stable != "2") or (status > 0 and stable == "2")
            broken += not _chained(TrafficStore(root))
            stuck += publisher.promote(root, "3") != 0 or TrafficStore(root).read("iris").stable != "3"
            broken += not _chained(TrafficStore(root))
            shutil.rmtree(root.parent)
        report.at_least("strikes: kills, no space, one failure", len(places), 100 if strikes is None else strikes)
        report.at_least("promotions that did not end well because of it", struck, len(places) // 2)
        report.exactly("states that are neither the one before nor the one after", other, 0)
        report.exactly("answers that say otherwise than the folder", lied, 0)
        report.exactly("histories with a gap", broken, 0)
        report.exactly("times that the next promotion was not made", stuck, 0)
        report.control("a document that is written in place, cut off, can't be read", _torn(folder / "torn", publisher))


def _root(folder: Path, publisher: Publisher, before: int) -> Path:
    """Make a model with three versions, the first of them stable already where `before` says so."""
    root = folder / "models"
    for version in ("1", "2", "3"):
        (root / "iris" / version).mkdir(parents=True)
    if before:
        assert publisher.promote(root, "1") == 0
    return root


def _chained(store: TrafficStore) -> bool:
    """Tell whether each line of the history goes on where the one above ended, and the last is what holds now."""
    entries = store.history("iris", 100)
    now = store.read("iris")
    whole = all(two["before"] == one["after"] for one, two in itertools.pairwise(entries))
    return whole and (entries[-1]["after"] == now.document() if entries else now.stable is None)


def _torn(folder: Path, publisher: Publisher) -> bool:
    root = _root(folder, publisher, 1)
    document = json.dumps(TrafficStore(root).read("iris").document()).encode()
    (root / "iris" / TRAFFIC_FILE).write_bytes(document[: len(document) // 2])
    try:
        TrafficStore(root).read("iris")
    except InvalidRequest:
        return True
    return False
