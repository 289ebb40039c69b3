"""How many bytes of bodies, and of answers that wait, a process holds at once."""

from __future__ import annotations

from serving.errors import QueueFull


class ByteBudget:
    """Counts the bytes of bodies that one process holds, from their announcement to their answer.

    Bodies of up to FREE bytes are not counted: connections and queued rows bound them already.
    """

    FREE = 64 * 1024

    __slots__ = ("held", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def fits(self, size: int) -> bool:
        """Tell whether so many bytes more may be held."""
        return self.held + size <= self.limit

    def hold(self, size: int) -> None:
        """Count bytes in. Raises QueueFull where they are too many."""
        if not self.fits(size):
            raise QueueFull("this server holds all the bytes of requests that it takes: come back later")
        self.held += size
