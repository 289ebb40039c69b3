"""How long clients are waited for, whatever protocol they speak."""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class Timeouts:
    """How long a connection is waited for, in seconds, and how much it may take.

    head_s: from the first byte of a head to its last, and from connecting to the end of the first; a body's rate counts
    after it. Over gRPC a head is the first settings, a frame, or a block of headers, and a body is a message. body_s:
    all of a body, unless it has more than body_bytes: that is a model on its way, and only its rate counts. write_s: a
    client that takes nothing of its answer. idle_s: between requests. min_rate: bytes a second, of a body and of an
    answer. head_bytes: of one head over HTTP/1. connections: of one worker.
    """

    head_s: float = 5.0
    body_s: float = 120.0
    body_bytes: int = sys.maxsize
    write_s: float = 30.0
    idle_s: float = 75.0
    min_rate: int = 500
    head_bytes: int = 16 * 1024
    connections: int = 4096
