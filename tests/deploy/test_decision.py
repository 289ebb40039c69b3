"""What becomes of a model, by what its folder holds, what the gate says and what serves now."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import pytest

from serving.deploy.decision import ModelContents, decide
from serving.deploy.model_state import ModelState, Refusal
from serving.deploy.plan import Plan
from serving.engine.batching import Batching, Independence
from serving.engine.limits import Limits
from serving.engine.providers import Provider
from serving.gate.results import Parted
from serving.repository.model_settings import ModelSettings
from serving.repository.repository import ModelVersion, Problem
from serving.repository.traffic import Canary, Traffic

PROVED = Independence(proved=True)


def version(number: str) -> ModelVersion:
    return ModelVersion("m", number, Path("m") / number, f"content {number}")


def plan(traffic: Traffic, loaded: str, unloaded: str = "") -> Plan:
    together = {number: Batching(together=True, reason="") for number in loaded}
    return Plan("m", 1, traffic, tuple(map(version, loaded)), tuple(unloaded), together)


def at(generation: int, stable: str | None = None, **more: object) -> Traffic:
    return Traffic.model_validate({"generation": generation, "stable": stable, **more})


@dataclass(frozen=True)
class Case:
    """One row. Versions are digits: in the folder, damaged, refused by the gate, being examined, in quarantine."""

    promise: str
    asked: Traffic
    found: str = ""
    damaged: str = ""
    refused: str = ""
    examined: str = ""
    held: str = ""
    served: Plan | None = None
    refusal: Plan | None = None
    diverged: bool = False
    target: Collection[str] | None = None
    """Versions to load; None where nothing changes."""
    error: str = ""


ONE = plan(at(1, "1"), "1", "2")
CASES = [
    Case("the highest version of a new model serves", at(0), "12", target="12"),
    Case("what serves as asked is left alone", at(1, "1", keep=["1"]), "12",
         served=plan(at(1, "1", keep=["1"]), "1", "2")),
    Case("nothing of a new model serves before the gate has spoken", at(0), "1", examined="1"),
    Case("nor do some of its versions before it has spoken on all that are asked for", at(0), "12", examined="2"),
    Case("a version that is asked for and examined is no error yet", at(2, "2"), "12", examined="2", served=ONE),
    Case("what is unloaded on purpose may leave the folder", at(2, "1", unloaded=True), served=ONE, target=""),
    Case("a version that nobody names may come later than the others", at(0), "12", examined="2",
         served=plan(at(0), "1")),
    Case("of a new model the versions that pass serve without the refused", at(0), "12", refused="2", target="1"),
    Case("a version that is asked for and refused changes nothing", at(2, "2"), "12", refused="2", served=ONE,
         error="version 2: no good"),
    Case("what serves goes on while all files are damaged", at(1, "1"), damaged="1", served=ONE,
         error="version 1: damaged"),
    Case("what serves ends where its folder has vanished", at(1, "1"), served=ONE, target="", error="vanished"),
    Case("what is unloaded on purpose is no error", at(2, "1", unloaded=True), "12", served=ONE, target=""),
    Case("a canary that is not there is left out, and the rest serves",
         at(2, "1", keep=["1"], canary=Canary(version="3", percent=5)), "12", served=ONE, target="1"),
    Case("the version before answers for a stable one in quarantine", at(1, "2", previous="1", keep=["2"]), "12",
         held="2", served=plan(at(1, "2", previous="1", keep=["2"]), "2", "1"), target="1", error="in quarantine"),
    Case("what is in quarantine ends though nothing can take its place", at(1, "1"), "1", held="1",
         served=plan(at(1, "1"), "1"), target="", error="no good"),
    Case("a later generation that asks for what is in quarantine is refused", at(2, "2"), "12", held="2", served=ONE,
         error="stable is version 2"),
    Case("what could not be loaded is not tried again", at(2, "2"), "12", served=ONE, refusal=plan(at(2, "2"), "12"),
         error="it does not fit"),
    Case("what a worker that came could not load is tried again", at(1, "1"), "12", served=plan(at(1, "1"), "12"),
         diverged=True, target="12"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.promise.replace(" ", "-"))
def test_what_becomes_of_a_model(case: Case) -> None:
    """Each row says its own promise."""
    state = ModelState(served=case.served, diverged=case.diverged)
    if case.refusal is not None:
        state.refusal = Refusal(case.refusal, "it does not fit", invalid=True)
    damaged = tuple(Problem("m", number, "damaged") for number in case.damaged)
    found = tuple(map(version, case.found))
    contents = ModelContents("m", found, damaged, case.asked, ModelSettings(), frozenset(case.held))
    out = set(case.refused + case.examined + case.held)
    refused = [Problem("m", number, "no good") for number in sorted(case.refused + case.held)]
    results = Parted([item for item in found if item.version not in out], refused, bool(case.examined))

    decision = decide(state, contents, results, lambda _: Independence(proved=True))

    if case.target is None:
        assert decision.target is None
    else:
        assert decision.target is not None
        assert [item.version for item in decision.target.versions] == list(case.target)
    assert case.error in decision.error if case.error else not decision.error, decision.error
    assert not decision.error or decision.problems or not found, "what is wrong is listed too"


def test_a_provider_that_cannot_run_a_model_gives_way_to_the_processor() -> None:
    """Where a worker that starts can't have its providers, the processor runs it; no plan is tried twice."""
    settings = ModelSettings(own=Limits(providers=(Provider(name="CUDAExecutionProvider"),)))
    traffic = at(0)
    wanted = Plan("m", 1, traffic, (version("1"),), (), {"1": settings.decide(PROVED)})
    bare = Plan("m", 1, traffic, (version("1"),), (), {"1": Batching(together=True)})
    contents = ModelContents("m", (version("1"),), (), traffic, settings, frozenset())

    def decided(served: Plan, refused: Plan, *, diverged: bool) -> Plan | None:
        state = ModelState(served=served, diverged=diverged, refusal=Refusal(refused, "no driver", invalid=True))
        found = decide(state, contents, Parted([version("1")], [], False), lambda _: PROVED)
        assert found.error == "no driver"
        assert [problem.reason for problem in found.problems] == ["no driver"]
        return found.target

    starts = decided(wanted, wanted, diverged=True)
    assert starts is not None
    assert starts.same(bare)
    assert decided(bare, wanted, diverged=False) is None
    assert decided(wanted, bare, diverged=True) is None
