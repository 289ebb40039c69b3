"""What travels between the stations: a request that carries its own reply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from serving.errors import ServingError
from serving.tensors import Tensors

Outcome: TypeAlias = Tensors | ServingError
Reply: TypeAlias = Callable[[Outcome], None]


@dataclass(slots=True, eq=False)
class Request:
    """Rows on their way to a model.

    inputs: arrays in the order of the signature's inputs. rows: how many (1 where the model has no batch dimension).
    deadline: monotonic seconds. reply: called exactly once, on the event loop, unless `gone`.
    """

    inputs: Tensors
    rows: int
    deadline: float
    reply: Reply
    gone: bool = False
    """The caller has left: the reply is never called, and the rows are not run if they still wait."""
    queued_at: float = 0.0
