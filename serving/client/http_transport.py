"""HTTP, by httpx2: its only owner. Nothing is read from an answer here but whether it is one."""

from __future__ import annotations

import contextlib
import time

import httpx2 as httpx

from serving.client.conversation import Received, Request
from serving.client.refusals import AnswerLost, ConnectionFailed, Refused, refusal
from serving.errors import DeadlineExceeded, InvalidRequest

# Shorter than servers and proxies keep theirs: a request that meets a closing connection may be lost.
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=15)
FAULTS = (httpx.HTTPError, httpx.InvalidURL, TimeoutError)
"""What is raised where there is no answer."""
_UNSENT = (httpx.ConnectError, httpx.ProxyError, httpx.UnsupportedProtocol)


def built(http: httpx.Client | httpx.AsyncClient, request: Request, url: str, api_key: str | None) -> httpx.Request:
    """Make a request as httpx2 sends it."""
    # Not compressed: what is large are numbers, which cost more to compress than to send.
    headers = {"accept-encoding": "identity", **request.headers}
    if api_key:
        headers["authorization"] = f"Bearer {api_key}"
    return http.build_request(
        request.method,
        url.rstrip("/") + request.path,
        headers=headers,
        content=request.body or None,
        timeout=request.seconds,
    )


def sent(http: httpx.Client, request: httpx.Request, seconds: float) -> httpx.Response:
    """Send a request and read its answer; httpx2 alone bounds each piece, and not the whole."""
    end = time.monotonic() + seconds
    response = http.send(request, stream=True)
    with contextlib.closing(response):
        pieces = []
        for piece in response.iter_raw():
            pieces.append(piece)
            if time.monotonic() > end:
                raise httpx.ReadTimeout("the answer is too slow")
    return httpx.Response(response.status_code, headers=response.headers, content=b"".join(pieces))


def received(response: httpx.Response) -> Received:
    """Read an answer. Raises Refused where it is an error."""
    if response.is_success:
        return Received(response.headers, response.content)
    raise refusal(response.status_code, response.headers, response.content)


def refused(error: httpx.HTTPError | httpx.InvalidURL | TimeoutError) -> Refused:
    """Say what has gone wrong without an answer."""
    if isinstance(error, _UNSENT):
        return Refused(ConnectionFailed(f"the server can't be reached: {error}"))
    if isinstance(error, httpx.TimeoutException | TimeoutError):
        return Refused(DeadlineExceeded("no answer came in the time for this call"))
    if isinstance(error, httpx.LocalProtocolError | httpx.InvalidURL):
        return Refused(InvalidRequest(f"the request can't be sent: {error}"))
    return Refused(AnswerLost(f"the connection broke before the answer was there: {error}"), ran=True)
