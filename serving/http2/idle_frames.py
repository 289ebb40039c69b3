"""Frames that bring nothing: how many a peer may send. CVE-2019-9512 to 9518, 2023-44487 and 2025-8671 are floods."""

from __future__ import annotations

from serving.http2.frames import ErrorCode, ProtocolError

_CREDIT = 4
"""Frames that are forgiven for each response, and for each large DATA frame of one: clients ping as they read."""
_WINDOW_UPDATES = 2
"""What each request pays for: ordinary clients open its window and the connection's before they have read anything."""
_MAX_WINDOW_UPDATES = 2048


class IdleFrames:
    """Counts pings, settings, resets, empty data and the like, less what is forgiven, and raises beyond `limit`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._count = 0
        self._window_updates = 0  # that requests have paid for

    def add(self, frames: int = 1, *, ping: bool = False) -> None:
        """Count. Raises ProtocolError where there are too many."""
        self._count += frames
        if self._count > self._limit:
            # Of who reads "too_many_pings", as all clients of gRPC do, the next connection pings half as often.
            reason = "too_many_pings" if ping else "too many frames that bring nothing, or resets"
            raise ProtocolError(ErrorCode.ENHANCE_YOUR_CALM, reason, "flood")

    def add_window_update(self) -> None:
        """Count one, unless a request has paid for it."""
        if self._window_updates:
            self._window_updates -= 1
        else:
            self.add()

    def pay(self) -> None:
        """Take note of a request."""
        self._window_updates = min(self._window_updates + _WINDOW_UPDATES, _MAX_WINDOW_UPDATES)

    def credit(self, progress: int = 1) -> None:
        """Forgive for what the peer has got."""
        if self._count > 0:
            self._count -= _CREDIT * progress

    def forgive(self, frames: int) -> None:
        """Forget some, for time has passed."""
        self._count = max(0, self._count - frames)
