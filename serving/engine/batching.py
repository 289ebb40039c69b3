"""Whether requests of different callers may run together in one version, and how all of its requests run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pydantic import BaseModel, ConfigDict

from serving.engine.limits import Limits

RULES = 5
"""Counts the rules by which independence is proved: a proof by others is made anew."""

NOTHING_OF_ITS_OWN = Limits()


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
    """How the requests of one version run.

    together: requests of different callers may be rows of one batch. reason: why not. own: what its model's settings
    say beside that.
    """

    together: bool
    reason: str = ""
    own: Limits = NOTHING_OF_ITS_OWN

    def without_providers(self) -> Batching:
        """Return the same on the processor alone."""
        return replace(self, own=self.own.model_copy(update={"providers": ()}))
