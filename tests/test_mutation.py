"""The short form of the drill `mutation`."""

from __future__ import annotations

from tests.drills.drill import Report
from tests.drills.mutation import run


def test_broken_requests_are_refused_and_valid_ones_answered() -> None:
    """Whatever is broken in a request, it is refused with a reason or answered as what it still says."""
    report = Report()
    run(report, requests=300, timed=False)
    assert report.kept, report.broken()
