"""A predictor for the tests of an application: it answers what it was told, and remembers what it was asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Unpack

from serving.client.conversation import Answer
from serving.in_process.predictor import Asking, Predictor


class Asked(NamedTuple):
    """One call of a fake predictor."""

    rows: Any
    version: str | None = None
    label: str | None = None
    timeout: float | None = None
    headers: Mapping[str, str] | None = None


class FakePredictor(Predictor):
    """Stands for a Predictor where no model is loaded.

    answer: the prediction for a row, given for each row of several; an exception, which is raised; or a function of the
    rows, which returns all predictions. `asked` has the calls so far.

        app.dependency_overrides[serving.predictor("credit")] = lambda: serving.FakePredictor({"label": "good"})
    """

    def __init__(self, answer: Any, *, model: str = "fake", version: str = "1") -> None:
        self.model = model
        self.asked: list[Asked] = []
        self._answer = answer
        self._version = version

    async def answer(self, rows: Any, **asking: Unpack[Asking]) -> Answer:  # noqa: D102
        self.asked.append(Asked(rows, **asking))
        if isinstance(self._answer, Exception):
            raise self._answer
        if callable(self._answer):
            predictions = self._answer(rows)
        elif isinstance(rows, Sequence):
            predictions = [self._answer for _ in rows]
        else:
            predictions = self._answer
        return Answer(predictions, self.model, asking.get("version") or self._version)
