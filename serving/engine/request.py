"""What travels between the stations: a request that carries its own reply."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, TypeAlias

from serving.errors import InvalidRequest, ServingError
from serving.tensors import Tensors

Outcome: TypeAlias = Tensors | ServingError

HIGH, NORMAL, LOW = 0, 1, 2
"""Priorities, which are places in line too: a smaller one goes first."""


def priority_of(asked: int, at: str) -> int:
    """Return the priority for a protocol's number: 1 first, 2 as others, 3 last; 0 where none was asked for.

    Source: Triton's schedule policy extension, where a lower number goes first and 0 is the default.
    Raises InvalidRequest, which names the place `at`.
    """
    if not 0 <= asked <= 3:
        raise InvalidRequest(f"{at}: should be 1 (before others), 2 (as others) or 3 (after others)")
    return asked - 1 if asked else NORMAL


@dataclass(slots=True, eq=False)
class Run:
    """One run of a batch; times are monotonic seconds, requests: how many were in it.

    span: of this run, once somebody traces one of its requests.
    """

    started: float
    ended: float
    rows: int
    requests: int
    span: Any = None


class Request(ABC):
    """Rows on their way to a model; a transport derives its own, with a `reply` that writes the answer.

    inputs: arrays in the order of the signature's inputs. rows: how many (1 where the model has no batch dimension).
    deadline, queued_at: monotonic seconds. priority: HIGH, NORMAL or LOW. done: it is answered, or the caller has left;
    `reply` is never called any more, and the rows are not run if they still wait. cost: what it counts for in the
    queue, which the batcher sets: its rows, or one where it runs alone.
    """

    __slots__ = ("cost", "deadline", "done", "inputs", "priority", "queued_at", "ran", "rows")

    inputs: Tensors
    rows: int
    cost: int
    deadline: float
    queued_at: float
    priority: int
    done: bool
    ran: Run | None
    """The run of the batch that it was in, once that has ended."""

    made_up = False
    """Whether its rows are nobody's, so that nothing is to be learned of them."""

    @property
    def sender(self) -> Hashable:
        """Who sent it, as far as that is known: its connection. None is nobody in particular."""
        return None

    @property
    def caller(self) -> Hashable:
        """Whose credential it came with, ANYONE's where none was asked for. None: nobody knows, so nothing is shared.

        No answer of one caller is given to another.
        """
        return None

    @abstractmethod
    def reply(self, outcome: Outcome) -> None:
        """Take the outputs or the error; called exactly once, on the event loop."""

    def lend(self) -> None:  # noqa: B027  most have nothing to lend
        """Let the model's thread answer, if it may; called on the event loop when a request is about to run alone."""

    def answer_from_thread(self, outcome: Outcome) -> None:  # noqa: B027
        """Answer here and now, where that was lent; called on the model's thread, and `reply` on the loop after it."""
