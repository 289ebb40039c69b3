"""Threads that let all others have the processor first."""

from __future__ import annotations

import contextlib
import os
import threading


def lowest_priority() -> None:
    """Put the calling thread behind all others; there is no way back."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
