"""Who gets traffic: every step from one document to the next, and what each document means."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import InvalidRequest, ModelNotFound, NotReady, ServingError
from serving.repository import transitions as to
from serving.repository.traffic import NOTHING, Judge, Latest, Sticky, Traffic, choose, parse, plan

HERE = ("1", "2", "3")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "is not JSON"),
        ("[]", "should be an object"),
        ('{"stable": 3}', "stable: should be a version"),
        ('{"stable": "0"}', "stable: should be a version"),
        ('{"colour": "blue"}', "colour: there is no such field"),
        ('{"generation": -1}', "generation: should be"),
        ('{"unloaded": "yes"}', "unloaded: should be"),
        ('{"stable": "1", "canary": {"version": "2", "percent": 101}}', "canary.percent: should be"),
        ('{"stable": "1", "canary": {"version": "2"}}', "canary.percent: is missing"),
        ('{"stable": "1", "canary": {"version": "2", "percent": 5, "sticky": {}}}', "canary.sticky: should be"),
        ('{"canary": {"version": "2", "percent": 5}}', "canary: stable must name"),
        ('{"stable": "2", "canary": {"version": "2", "percent": 5}}', "canary.version: is stable's"),
        ('{"stable": "2", "shadow": {"version": "2"}}', "shadow.version: is stable's"),
        ('{"labels": {"stable": "1"}}', "labels.stable: 'stable' follows the role"),
        ('{"labels": {"a b": "1"}}', "labels.a b: a label is letters"),
        ('{"labels": {"blue": "x"}}', "labels.blue: should be a version"),
        ('{"keep": {"latest": 0}}', "keep: should be"),
        ('{"keep": "some"}', "keep: should be"),
        ('{"keep": []}', "keep: should be"),
        ('{"judge": {}}', "judge: after_s or rows"),
        ('{"judge": {"after_s": 5, "error_rate": 2}}', "judge.error_rate: should be"),
    ],
)
def test_a_bad_document_names_the_field(text: str, named: str) -> None:
    """Whatever is wrong in a traffic.json that a person wrote is said by the field's name."""
    with pytest.raises(InvalidRequest) as caught:
        parse(text)
    assert named in caught.value.message


def test_a_document_survives_its_file() -> None:
    """What is written is what is read back, sticky rule, judgement and all."""
    judge = Judge(after_s=60, latency_ratio=1.5)
    traffic = to.canary("2", 12.5, Sticky(header="X-User"), available=HERE, judge=judge)(Traffic())
    again = parse(Traffic.model_validate(traffic).model_dump_json(exclude_none=True))
    assert again == traffic
    assert again.canary is not None
    assert again.canary.sticky == Sticky(header="x-user")


def test_promote_ends_the_canary_and_remembers() -> None:
    """The promoted version is stable, the old one is where a rollback goes, and the trial is over."""
    traffic = to.promote("1", available=HERE)(Traffic())
    assert (traffic.stable, traffic.previous) == ("1", "3")
    traffic = to.canary("2", 10, available=HERE)(traffic)
    traffic = to.promote("2", available=HERE)(traffic)
    assert (traffic.stable, traffic.previous, traffic.canary) == ("2", "1", None)
    again = to.promote("2", available=HERE)(traffic)
    assert again.same(traffic), "promoting what is stable changes nothing"


def test_canary_pins_stable() -> None:
    """A canary beside a stable that nobody named pins it: a version that comes later must not take its place."""
    traffic = to.canary("2", 10, available=HERE)(Traffic())
    roles = plan(traffic, (*HERE, "4"))
    assert (roles.stable, roles.canary and roles.canary.version) == ("3", "2")
    assert to.canary(None, available=HERE)(traffic).canary is None


@pytest.mark.parametrize(
    ("step", "error", "sentence"),
    [
        (to.promote("9", available=HERE), ModelNotFound, "no version '9'"),
        (to.canary("9", 5, available=HERE), ModelNotFound, "versions: 1, 2, 3"),
        (to.keep(("1", "9"), available=HERE), ModelNotFound, "no version '9'"),
        (to.canary("3", 5, available=HERE), InvalidRequest, "already is stable"),
        (to.canary("1", 0, available=HERE), InvalidRequest, "canary.percent: should be greater than 0"),
        (to.canary(None, available=HERE), InvalidRequest, "no canary to end"),
        (to.shadow("3", available=HERE), InvalidRequest, "already is stable"),
        (to.shadow(None, available=HERE), InvalidRequest, "no shadow to end"),
        (to.label("latest", "1", available=HERE), InvalidRequest, "labels.latest: 'latest' follows"),
        (to.label("blue", None, available=HERE), InvalidRequest, "no label 'blue' to remove"),
        (to.rollback(available=("3",)), InvalidRequest, "no earlier version"),
    ],
)
def test_steps_that_make_no_sense_say_why(step: to.Transition, error: type[ServingError], sentence: str) -> None:
    """A change that can't be made is refused with a sentence, and nothing is changed."""
    with pytest.raises(error) as caught:
        step(Traffic())
    assert sentence in caught.value.message


@pytest.mark.parametrize(
    ("fields", "here", "earlier", "back"),
    [
        ({"stable": "3", "previous": "1"}, HERE, (), "1"),
        ({"stable": "3", "previous": "1"}, ("2", "3"), (), "2"),  # gone from the disk: the next lower one
        ({"stable": "3"}, HERE, ("1",), "1"),
        ({"stable": "3", "previous": "9"}, HERE, ("8", "1"), "1"),
        ({}, HERE, (), "2"),
        ({"stable": "3", "previous": "2", "canary": {"version": "2", "percent": 5}}, HERE, (), "3"),  # served before
        ({"stable": "9", "canary": {"version": "3", "percent": 5}}, ("1", "3"), ("1",), "1"),
        ({"stable": "1", "shadow": {"version": "2"}}, HERE, (), "1"),  # nothing lower: ends the shadow
        ({"stable": "9"}, HERE, (), "3"),  # stable itself is gone
        ({"stable": "3", "unloaded": True}, HERE, (), "2"),
        ({"stable": "2", "previous": "3", "judge": {"rows": 5}}, HERE, (), "3"),
    ],
)
def test_rollback_from_any_state(
    fields: dict[str, Any], here: tuple[str, ...], earlier: tuple[str, ...], back: str
) -> None:
    """One step back from anywhere: to the version before that is still there, with every trial ended."""
    after = to.rollback(available=here, earlier=earlier)(Traffic.model_validate(fields))
    assert after.stable == back
    assert after.canary is after.shadow is after.judge is None
    assert plan(after, here).stable == back


@pytest.mark.parametrize(
    ("fields", "loaded"),
    [
        ({}, ("9", "10")),
        ({"keep": {"latest": 1}}, ("10",)),
        ({"keep": {"latest": 1}, "stable": "2"}, ("2", "10")),
        ({"keep": "all"}, ("1", "2", "9", "10")),
        ({"keep": ("1",), "stable": "2"}, ("1", "2")),
        ({"keep": ("1",), "labels": {"blue": "9"}}, ("1", "9", "10")),
        (
            {
                "keep": {"latest": 1},
                "stable": "10",
                "canary": {"version": "1", "percent": 5},
                "shadow": {"version": "2"},
            },
            ("1", "2", "10"),
        ),
    ],
)
def test_version_policy(fields: dict[str, Any], loaded: tuple[str, ...]) -> None:
    """The latest N by number, all, or the named ones are loaded, and whatever has a role."""
    assert plan(Traffic.model_validate(fields), ("1", "10", "2", "9")).loaded == loaded


def test_what_is_missing() -> None:
    """A missing canary, shadow or label is named and left out; a missing stable is never answered for by another."""
    traffic = Traffic.model_validate(
        {
            "stable": "1",
            "canary": {"version": "7", "percent": 5},
            "shadow": {"version": "8"},
            "labels": {"blue": "9", "red": "2"},
            "keep": ("1", "6"),
        }
    )
    roles = plan(traffic, HERE)
    assert (roles.stable, roles.canary, roles.shadow) == ("1", None, None)
    assert roles.labels == {"red": "2", "stable": "1", "latest": "2"}
    assert [problem.split(" is version")[0] for problem in roles.problems] == [
        "canary",
        "shadow",
        "label blue",
        "a version to keep",
    ]
    with pytest.raises(NotReady, match="stable is version 9"):
        plan(Traffic(stable="9"), HERE)
    with pytest.raises(NotReady, match="no version"):
        plan(Traffic(), ())
    assert plan(Traffic(unloaded=True, stable="9"), HERE) == NOTHING


versions = st.sampled_from(("1", "2", "3", "4", "9"))
steps = st.one_of(
    st.builds(lambda v: to.promote(v, available=HERE), versions),
    st.builds(lambda v, p: to.canary(v, p, available=HERE), st.none() | versions, st.floats(-1, 120)),
    st.builds(lambda v: to.shadow(v, available=HERE), st.none() | versions),
    st.builds(
        lambda n, v: to.label(n, v, available=HERE), st.sampled_from(("a", "b", "stable", "")), st.none() | versions
    ),
    st.builds(lambda: to.rollback(available=HERE)),
    st.builds(lambda k: to.keep(k, available=HERE), st.sampled_from(("all", Latest(latest=1), ("1", "2"), ("9",), ()))),
    st.sampled_from((to.withdraw, to.settle, to.unload, to.load)),
)


@given(st.lists(steps, max_size=12))
def test_any_sequence_leaves_a_servable_document(sequence: list[to.Transition]) -> None:
    """Whatever is asked for, in any order: the document is valid, its roles are there, and distinct."""
    traffic = Traffic()
    for step in sequence:
        with contextlib.suppress(ServingError):
            traffic = step(traffic)
        assert parse(traffic.model_dump_json()) == traffic
        roles = plan(traffic, HERE)
        if traffic.unloaded:
            assert roles == NOTHING
            continue
        assert roles.stable in HERE
        used = [roles.stable, *(r.version for r in (roles.canary, roles.shadow) if r is not None)]
        assert len(set(used)) == len(used)
        assert {*used, *roles.labels.values()} <= set(roles.loaded) <= set(HERE)
        assert not roles.problems


@given(st.binary(max_size=40), st.floats(0, 100), st.floats(0, 100))
def test_raising_the_share_only_moves_callers_one_way(key: bytes, one: float, other: float) -> None:
    """A caller in a share of 10 % is in every greater one, and gets the same answer each time."""
    low, high = sorted((one, other))
    assert choose(key, low) <= choose(key, high)
    assert choose(key, low) == choose(key, low)


@pytest.mark.parametrize("percent", [0.5, 10, 33.3, 90])
def test_the_share_is_met(percent: float) -> None:
    """Of 10,000 requests, and of 10,000 callers, the share goes to the candidate; without a key, to a request."""
    spread = sum(choose(None, percent) for _ in range(10_000))
    assert abs(spread - percent * 100) <= 4
    callers = sum(choose(b"user-%d" % i, percent) for i in range(10_000))
    assert abs(callers - percent * 100) <= 200
