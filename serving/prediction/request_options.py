"""What a request asks of the queue besides its rows: a priority, and a time to be answered in."""

from __future__ import annotations

import math
from typing import NamedTuple

from serving.engine.request import NORMAL, priority_of
from serving.errors import InvalidRequest
from serving.protocols.headers import Headers

PRIORITY, TIMEOUT = b"x-request-priority", b"x-request-timeout"


class RequestOptions(NamedTuple):
    """priority: HIGH, NORMAL or LOW. timeout: seconds from arrival; None leaves it to the server."""

    priority: int = NORMAL
    timeout: float | None = None


DEFAULTS = RequestOptions()


def request_options(headers: Headers) -> RequestOptions:
    """Read the two headers of HTTP. Raises InvalidRequest, which names the bad one."""
    priority, timeout = NORMAL, None
    for name, value in headers:
        if name == PRIORITY:
            number = int(value) if value.isdigit() and len(value) < 4 else -1
            priority = priority_of(number, "X-Request-Priority")
        elif name == TIMEOUT:
            try:
                timeout = float(value)
            except ValueError:
                timeout = math.nan
            if not 0 < timeout < math.inf:
                raise InvalidRequest("X-Request-Timeout: should be a number of seconds above 0, such as 0.25")
    return RequestOptions(priority, timeout) if priority != NORMAL or timeout is not None else DEFAULTS
