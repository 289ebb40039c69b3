"""More requests than can be answered: short forms of the drills, without the clock."""

from __future__ import annotations

from tests.drills import fairness, limits, overload
from tests.drills.drill import Report


def test_overload_is_refused_at_once() -> None:
    """Beyond the capacity the excess is told when to come back, and nothing is run that was not answered."""
    report = Report()
    overload.run(report, seconds=1.0, timed=False)
    assert report.kept, report.broken()


def test_overload_of_models_does_not_starve_another() -> None:
    """With five models at twice their capacity on one core, a sixth with little load is still answered."""
    report = Report()
    fairness.run(report, seconds=1.0, timed=False)
    assert report.kept, report.broken()


def test_the_adaptive_limit_lets_in_what_a_fast_and_a_slow_model_can_answer() -> None:
    """Whether a batch takes milliseconds or a fifth of the deadline, requests are answered at twice the capacity."""
    report = Report()
    limits.run(report, seconds=0.4, fixed=(), timed=False)
    assert not report.broken()
