"""What can go wrong with a request, as exceptions: the server's own errors, and those that only a client meets."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import orjson

from serving.errors import (
    DeadlineExceeded,
    Detail,
    Forbidden,
    InferenceFailed,
    InvalidRequest,
    ModelNotFound,
    NotReady,
    PayloadTooLarge,
    QueueFull,
    ServingError,
    SignatureMismatch,
    Unauthenticated,
    UnsupportedMediaType,
)


class ConnectionFailed(ServingError):
    """The server could not be reached: nothing was sent."""


class AnswerLost(ServingError):
    """The connection broke after the request was sent: it may have run."""


class ServerFailed(ServingError):
    """The server, or a proxy before it, failed, or gave an answer that is none of this protocol."""


STATUS: dict[int, type[ServingError]] = {
    400: InvalidRequest,
    401: Unauthenticated,
    403: Forbidden,
    404: ModelNotFound,
    413: PayloadTooLarge,
    415: UnsupportedMediaType,
    422: SignatureMismatch,
    429: QueueFull,
    503: NotReady,
    504: DeadlineExceeded,
}
_LONGEST_WAIT_S = 3600.0


class Refused(Exception):
    """No answer to one attempt: `error` is for the caller. retry_after: seconds that the server asks to wait.

    ran: whether the prediction may have been computed.
    """

    def __init__(self, error: ServingError, *, retry_after: float | None = None, ran: bool = False) -> None:
        super().__init__(error)
        self.error = error
        self.retry_after = retry_after
        self.ran = ran


def refusal(status: int, headers: Mapping[str, str], body: bytes) -> Refused:
    """Read an answer that is no 2xx. headers: by lower-case name."""
    try:
        document = orjson.loads(body)
        message = str(document["error"])
        details = [Detail(str(one["path"]), str(one["message"])) for one in document.get("details", ())]
    except (ValueError, TypeError, KeyError, AttributeError):
        message, details = f"the answer has status {status}, and is not from this server", []
    kind = STATUS.get(status, InvalidRequest if status < 500 else ServerFailed)
    if kind is SignatureMismatch and not details:
        kind = InferenceFailed
    retry_after = _seconds(headers.get("retry-after"))
    error = QueueFull(message, int(retry_after or 1)) if kind is QueueFull else kind(message)
    error.details = tuple(details)
    if identity := headers.get("x-request-id"):
        error.add_note(f"request id: {identity}")
    # A server says 504 where a request waited for too long, and a proxy where the answer did not come.
    return Refused(error, retry_after=retry_after, ran=status >= 500 and status != 503)


def _seconds(text: str | None) -> float | None:
    """Read Retry-After: seconds or a date (RFC 9110, 10.2.3); None where it is neither."""
    if text is None:
        return None
    if text.strip().isdigit():
        return min(float(text), _LONGEST_WAIT_S)
    try:
        at = parsedate_to_datetime(text)
    except ValueError:
        return None
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return min(max(0.0, (at - datetime.now(UTC)).total_seconds()), _LONGEST_WAIT_S)
