"""Whether requests of different callers may run together in one version, and how all of its requests run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

RULES = 3
"""Counts the rules by which independence is proved: a proof by others is made anew."""


class Independence(BaseModel):
    """Whether each row of a version's answer depends on its own input row alone, as far as that was proved."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    proved: bool
    quantised: bool = False
    """Not proved for one reason only: a scale that is taken over all rows of a batch when it runs."""
    reason: str = ""
    """Why it is not proved."""
    rules: int = RULES


@dataclass(frozen=True, slots=True)
class Batching:
    """How the requests of one version run. None: as the server's settings say.

    together: requests of different callers may be rows of one batch. reason: why not.
    """

    together: bool
    reason: str = ""
    max_rows: int | None = None
    max_delay_s: float | None = None
    instances: int | None = None
    memory_bytes: int | None = None

    def dump(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)
