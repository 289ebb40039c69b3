"""Whether a request that was not answered is sent again, and when."""

from __future__ import annotations

import random
from typing import NamedTuple

from serving.client.refusals import ConnectionFailed, Refused
from serving.errors import NotReady, QueueFull

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0


class Retries(NamedTuple):
    """most: how often a request is sent again. repeat: also where it may have run already."""

    most: int = 2
    repeat: bool = False

    def pause(self, refused: Refused, attempt: int, left: float) -> float | None:
        """Return the seconds to wait before the next attempt, None to give up.

        attempt: how many there were, from 1. left: seconds until the deadline. A pause that the server asks for is
        kept; others grow, and are spread so that clients do not come back in step.
        """
        busy = isinstance(refused.error, ConnectionFailed | QueueFull | NotReady)
        again = self.repeat if refused.ran else busy
        if not again or attempt > self.most:
            return None
        pause = refused.retry_after
        if pause is None:
            longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (attempt - 1))
            pause = random.uniform(longest / 2, longest)  # noqa: S311  no secret
        return pause if pause < left else None
