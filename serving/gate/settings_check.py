"""A model's own settings as a line of the gate's report: they are no part of a version, and change while it serves."""

from __future__ import annotations

from pathlib import Path

from serving.errors import ServingError
from serving.gate.report import Check, Report
from serving.repository import model_settings
from serving.repository.model_settings import in_words


def with_settings(report: Report, home: Path) -> Report:
    """Return a report with what the settings in a model's folder say now; what is wrong with them refuses nothing."""
    try:
        said = in_words(model_settings.read(home).shown())
        check = Check(name="settings", outcome="passed" if said else "skipped", detail=said or "the server's")
    except ServingError as error:
        check = Check(name="settings", outcome="warned", detail=error.message)
    return report.model_copy(update={"checks": (*report.checks, check)})
