"""The short form of the drill `differential`."""

from __future__ import annotations

from tests.drills.differential import run
from tests.drills.drill import Report


def test_every_form_of_a_request_is_answered_as_onnxruntime_answers() -> None:
    """The same tensors in any form give what onnxruntime gives, to the bit, whatever the model."""
    report = Report()
    run(report, comparisons=600)
    assert report.kept, report.broken()
