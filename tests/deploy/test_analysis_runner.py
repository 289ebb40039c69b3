"""The runner of analyses: what becomes of a version that is tried, through restarts, deaths and other files."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import orjson
import pytest

from serving.deploy.analysis import analysis_of
from serving.deploy.analysis_runner import AnalysisRunner
from serving.deploy.plan import Plan
from serving.deploy.unservable_reason import content_of
from serving.metrics.totals import VersionTotals
from serving.repository import transitions as to
from serving.repository.repository import ModelVersion
from serving.repository.traffic import Judge, Traffic
from serving.repository.traffic_store import TrafficStore
from tests.conftest import MODELS
from tests.deploy.test_analysis import did

HERE = ("1", "2", "3")


class Server:
    """One server's runner, with totals that a test sets; `tick` looks `later` seconds after the last time.

    found: a server that has ended, and whose file this one finds.
    """

    def __init__(self, root: Path, found: Server | None = None) -> None:
        self.store = TrafficStore(root)
        self.did: dict[tuple[str, str], VersionTotals] = {}
        self.runner = AnalysisRunner(self.store, lambda wanted: {w: self.did.get(w, did()) for w in wanted})
        self.root, self.now = root, 100.0
        if found is not None:
            self.runner.server_died(orjson.loads(orjson.dumps(found.runner.tried)))
        self.without: set[str] = set()
        """Versions that it does not serve."""

    def change(self, step: to.Transition) -> Traffic:
        return self.store.change("iris", step, who="ann", what="try")

    def plan(self) -> Plan:
        versions = [v for v in HERE if (self.root / "iris" / v).is_dir() and v not in self.without]
        folders = [(v, self.root / "iris" / v) for v in versions]
        found = tuple(ModelVersion("iris", v, folder / "model.onnx", content_of(folder)) for v, folder in folders)
        return Plan("iris", 1, self.store.read("iris"), found, (), {})

    def tick(self, later: float = 0, *, two: float = 0, failed: float = 0, plan: Plan | None = None) -> bool:
        """Look, after version 2 did `two` more predictions, and `failed` more."""
        before = self.did.get(("iris", "2"), did())
        self.did["iris", "2"] = did(before.ok + two, before.failed + failed)
        self.now += later
        return self.runner.tick({"iris": plan or self.plan()}, self.now) == ["iris"]

    def watch(self, seconds: int) -> bool:
        """Look once a second, with ten predictions of version 2 each time, until that many seconds or a decision."""
        return any(self.tick(1, two=10) for _ in range(seconds))

    def last(self) -> tuple[str, str, str]:
        (entry,) = self.store.history("iris", 1)
        return entry["who"], entry["what"], entry["why"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for version in HERE:
        shutil.copytree(MODELS / "iris" / "1", tmp_path / "iris" / version)
    return tmp_path


@pytest.fixture
def server(root: Path) -> Server:
    """A server on whose folder version 2 is a canary beside 1, for a minute."""
    server = Server(root)
    server.change(to.promote("1", available=HERE))
    server.change(to.canary("2", 10, available=HERE, judge=Judge(after_s=60)))
    server.tick()
    return server


def test_a_good_canary_is_promoted(server: Server) -> None:
    """After its time within bounds the canary is stable, by the judge's hand, with the figures as the reason."""
    assert not server.watch(59)
    assert server.runner.lines["iris"] == [
        "canary 2: 590 predictions, 0 failed, 1 ms each",
        "stable 1: 0 predictions, 0 failed",
        "judgement of version 2: 1 s to go; 590 predictions in 59 s, 0 of 590 failed",
    ]
    assert server.watch(1)
    after = server.store.read("iris")
    assert (after.stable, after.previous, after.canary, after.judge) == ("2", "1", None, None)
    assert server.last() == ("judge", "promote 2", "600 predictions in 60 s, 0 of 600 failed")
    assert not server.watch(3)


def test_a_bad_canary_is_ended(server: Server) -> None:
    """A canary that fails is ended before its time; stable answers all again, and the reason is in the history."""
    assert server.tick(3, two=40, failed=10)
    after = server.store.read("iris")
    assert (after.stable, after.canary, after.judge) == ("1", None, None)
    assert server.last() == (
        "judge",
        "end the canary of 2",
        "10 of 50 (20 %) predictions failed, and 1 % is the most",
    )


def test_a_bad_promotion_is_rolled_back(root: Path) -> None:
    """A promoted version is compared with what the one before it did; where it is slower, that one is back."""
    server = Server(root)
    server.change(to.promote("1", available=HERE))
    server.did = {("iris", "1"): did(5000)}
    server.change(to.promote("2", available=HERE, judge=Judge(rows=10_000, latency_ratio=2)))
    server.tick()
    for second in range(1, 30):
        server.now += 1
        server.did["iris", "2"] = did(second * 10, seconds=0.005)
        if server.runner.tick({"iris": server.plan()}, server.now):
            break
    assert server.store.read("iris").stable == "1"
    assert server.last()[:2] == ("judge", "rollback from 2")
    assert server.last()[2].startswith("it took more than 2 times as long as the other version in")


def test_a_good_promotion_stays(root: Path) -> None:
    """What held its bounds is stable for good: nothing is judged any more."""
    server = Server(root)
    server.change(to.promote("2", available=HERE, judge=Judge(rows=50)))
    server.tick()
    assert server.tick(1, two=200)
    after = server.store.read("iris")
    assert (after.stable, analysis_of(after)) == ("2", None)
    assert server.last()[1] == "keep 2"


def test_a_person_overrules_the_judge(server: Server) -> None:
    """A decision about a document that somebody has changed meanwhile is dropped."""
    old = server.plan()
    server.watch(59)
    server.change(to.withdraw)
    assert not server.tick(5, two=500, plan=old)
    assert server.store.read("iris").stable == "1"
    assert server.last()[0] == "ann"


@pytest.mark.parametrize("percent", [10, 30])
def test_begun_again_it_has_a_new_clock(server: Server, percent: float) -> None:
    """Ended and begun again within a second, or begun with another share, it counts anew; a label changes nothing."""
    server.watch(59)
    if percent == 10:
        server.change(to.withdraw)
    server.change(to.canary("2", percent, available=HERE, judge=Judge(after_s=60)))
    assert not server.watch(50)
    server.change(to.label("blue", "3", available=HERE))
    assert server.watch(20)
    assert server.last()[2].startswith("600 predictions in 60 s")


def test_time_without_requests_does_not_count(server: Server) -> None:
    """A quiet night proves nothing: time counts from the first request on, and a minute after the last one."""
    for _ in range(100):
        server.tick(2)
    assert not server.tick(1, two=200)
    for _ in range(60):
        server.tick(5)
    assert "4 s to go" in server.runner.lines["iris"][-1], server.runner.lines
    assert not server.tick(3, two=1)
    assert server.tick(1)


def test_a_server_that_is_killed_speaks_against_it(server: Server, root: Path) -> None:
    """After a kill it begins again, and the history says so; after the second one it is taken back."""
    server.watch(59)
    second = Server(root, found=server)
    assert not second.tick(600)
    assert second.watch(1)
    assert second.last() == ("judge", "begin again with version 2", "a server died while it tried version 2")
    assert not second.watch(59)
    third = Server(root, found=second)
    third.tick(600)
    assert third.watch(1)
    assert third.last() == ("judge", "end the canary of 2", "2 workers or servers died while it was tried")


def test_a_server_that_is_killed_as_it_begins_again(server: Server, root: Path) -> None:
    """Where it dies before it serves the generation that began again, that is the second death."""
    server.runner.died([("iris", "2")])
    assert server.watch(1)
    second = Server(root, found=server)
    second.tick()
    assert second.watch(1)
    assert second.last()[1] == "end the canary of 2"


def test_a_server_that_is_killed_as_other_files_begin_again(server: Server, root: Path) -> None:
    """Where it has loaded other files, and dies before it serves the generation that says so, that is their first."""
    server.watch(5)
    replace_two(root)
    server.tick(1, two=10)
    assert server.last()[2] == "the files of one of its versions were replaced"
    second = Server(root, found=server)
    second.tick()
    assert second.watch(1)
    assert second.last()[2] == "a server died while it tried version 2"


def test_a_server_that_starts_begins_anew(server: Server, root: Path) -> None:
    """Neither what was seen before a restart counts, nor the downtime; a clean end speaks against nothing."""
    server.watch(40)
    server.runner.close()
    second = Server(root, found=server)
    second.tick(600)
    assert not second.watch(59)
    assert second.watch(1)
    assert second.last() == ("judge", "promote 2", "600 predictions in 60 s, 0 of 600 failed")


def test_each_of_several_servers_judges_by_what_it_saw(server: Server, root: Path) -> None:
    """The first decision counts, and the other server has none to make any more."""
    other = Server(root)
    other.tick()
    server.watch(59)
    old = other.plan()
    assert server.watch(1)
    assert not other.tick(1, failed=40, plan=old)
    assert server.last()[1] == "promote 2"


def test_a_worker_that_dies_speaks_against_it(server: Server) -> None:
    """The first worker that dies while it runs the version begins again, the second one ends it."""
    server.watch(50)
    server.runner.died([("iris", "1"), ("other", "2")])
    assert not server.watch(1)
    server.runner.died([("iris", "2")])
    assert server.watch(1)
    assert server.last()[1:] == ("begin again with version 2", "a worker died while it ran version 2")
    assert not server.watch(59)
    server.without = {"2"}  # it is in quarantine by then
    server.runner.died([("iris", "2")])
    assert server.watch(1)
    assert server.last()[1] == "end the canary of 2"


def replace_two(root: Path) -> None:
    """Put another model into version 2."""
    shutil.rmtree(root / "iris" / "2")
    shutil.copytree(MODELS / "iris" / "2", root / "iris" / "2")


def test_other_files_begin_again(server: Server, root: Path) -> None:
    """A verdict covers the files that were tried: without them nothing counts, with others it begins again, noted."""
    other = Server(root)
    other.watch(1)
    server.watch(58)
    shutil.move(root / "iris" / "2", root / "away")
    assert not server.watch(5)
    assert server.runner.lines["iris"][-1].endswith("it is not served now, and nothing counts until it is")
    (root / "iris" / "2").mkdir()
    replace_two(root)
    assert not server.tick(1)
    assert not other.tick(1)
    assert server.last()[1:] == ("begin again with version 2", "the files of one of its versions were replaced")
    assert not server.watch(59)
    assert server.watch(2)
    began = [e for e in server.store.history("iris") if e["what"].startswith("begin again")]
    assert len(began) == 1


def test_files_that_nobody_has_looked_at_are_not_promoted(server: Server, root: Path) -> None:
    """Replaced within the last moment, before the server has looked at the folder again, it is not promoted."""
    server.watch(59)
    old = server.plan()
    replace_two(root)
    assert not server.tick(5, two=10, plan=old)
    assert server.runner.lines["iris"][-1].endswith("its files on disk are not those that were tried")


@pytest.mark.parametrize("other", ["files", "analysis"])
def test_the_death_of_a_server_that_tried_something_else(server: Server, root: Path, other: str) -> None:
    """That a server died over other files, or in an analysis that somebody has ended, says nothing against these."""
    server.watch(59)
    if other == "files":
        replace_two(root)
    else:
        server.change(to.withdraw)
        server.change(to.canary("2", 10, available=HERE, judge=Judge(after_s=60)))
    second = Server(root, found=server)
    second.tick()
    assert not second.watch(59)
    assert second.watch(1)
    assert second.last()[1] == "promote 2"


def test_time_that_the_server_stood_still_does_not_count(server: Server) -> None:
    """A machine that was suspended has watched nothing meanwhile."""
    server.watch(30)
    assert not server.tick(600, two=10)


def test_the_same_files_back_go_on(server: Server, root: Path) -> None:
    """A folder that was away for a while, and is the same again, has lost nothing."""
    server.watch(50)
    shutil.move(root / "iris" / "2", root / "away")
    server.watch(5)
    shutil.move(root / "away", root / "iris" / "2")
    assert server.watch(12)
    assert server.last()[1] == "promote 2"


def test_what_cant_be_done_is_logged_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A decision that can't be carried out is tried again each second, and complained of once."""
    server = Server(root)
    server.change(to.promote("1", available=("1",), judge=Judge(after_s=60)))
    for version in ("2", "3"):
        shutil.rmtree(root / "iris" / version)
    with caplog.at_level(logging.ERROR):
        for _ in range(5):
            server.did = {("iris", "1"): did(0, len(server.did) * 20 + 20)}
            server.now += 1
            server.runner.tick({"iris": server.plan()}, server.now)
            server.did["again", ""] = did()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["iris"], caplog.text
    assert "there is no earlier version" in caplog.text


def test_where_nothing_is_counted_nothing_is_judged(server: Server) -> None:
    """A server whose metrics are off says so, and leaves the decision to others."""
    blind = AnalysisRunner(server.store, None)
    assert blind.tick({"iris": server.plan()}, 0) == []
    assert blind.lines == {"iris": ["nothing is judged here: metrics are off"]}
