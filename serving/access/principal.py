"""Who asks, and what they may do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from serving.access.rate_limits import RateLimit

Scope: TypeAlias = Literal["predict", "deploy", "metrics", "jobs"]
"""What a key allows: predictions and what can be read of models; changes of what is served; the metrics; jobs."""

SCOPES: frozenset[Scope] = frozenset(get_args(Scope))


@dataclass(frozen=True, slots=True)
class Principal:
    """Somebody whose credential was verified, or ANYONE. `name` is fit for logs: `ci`, or `jwt:<sub>`.

    limit: how much they may ask for; None: as much as they like.
    """

    name: str
    scopes: frozenset[Scope]
    limit: RateLimit | None = field(default=None, compare=False, repr=False)


ANYONE = Principal("anyone", frozenset())


class AccessInvalid(Exception):
    """Keys or tokens can't be judged as configured; the text is for whoever runs the server, and holds no secret."""
