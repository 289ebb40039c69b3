"""What travels between the stations: a request that carries its own reply."""

from __future__ import annotations

from typing import TypeAlias

from serving.errors import ServingError
from serving.tensors import Tensors

Outcome: TypeAlias = Tensors | ServingError


class Request:
    """Rows on their way to a model; a transport derives its own, with a `reply` that writes the answer.

    inputs: arrays in the order of the signature's inputs. rows: how many (1 where the model has no batch dimension).
    deadline, queued_at: monotonic seconds. gone: the caller has left; `reply` is never called any more, and the rows
    are not run if they still wait.
    """

    __slots__ = ("deadline", "gone", "inputs", "queued_at", "rows")

    inputs: Tensors
    rows: int
    deadline: float
    queued_at: float
    gone: bool

    def reply(self, outcome: Outcome) -> None:
        """Take the outputs or the error; called exactly once, on the event loop."""
        raise NotImplementedError
