"""One plain request on a connection: answered by the event loop, or by the model's thread itself."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from serving.errors import ServingError
from serving.http_api.answer import refusal
from serving.metrics.recorders import RouteMetrics
from serving.prediction.direct import DirectPrediction
from serving.prediction.request_log import Ended, server_timing
from serving.prediction.socket_loan import SocketLoan
from serving.protocols.codec import Blobs
from serving.protocols.headers import JSON, HeaderList
from serving.protocols.http_codec import Encoded

if TYPE_CHECKING:
    from serving.http_api.fast_path.protocol import FastPath


class FastPathPrediction(DirectPrediction):
    """A plain request. identity: of the request, which its answer repeats. route: where it is counted."""

    __slots__ = ("_heads", "connection", "identity", "route")

    def __init__(self, connection: FastPath, identity: bytes, route: RouteMetrics | None) -> None:
        self.connection = connection
        self.identity = identity
        self.route = route
        if route is not None:
            route.in_flight += 1

    @property
    def sender(self) -> int:  # noqa: D102
        return id(self.connection)  # no reference: who is remembered may have gone

    def request_id(self) -> bytes:  # noqa: D102
        return self.identity

    def answer(self, response: Encoded) -> None:  # noqa: D102
        body, headers, kind = response
        self.count(200)
        if self.endpoint.told:
            headers = self._told(body, headers)
        self.connection.write_answer(self.identity, 200, headers, body, kind)

    def refuse(self, error: ServingError) -> None:  # noqa: D102
        status, headers, body = refusal(error, self.endpoint.protocol)
        self.count(status)
        self.connection.write_answer(self.identity, status, headers, body, JSON)

    def _told(self, body: bytes | Blobs, headers: HeaderList) -> HeaderList:
        """Note the size of an answer for the log, and return its headers."""
        self.size = len(body) if isinstance(body, bytes) else body.size
        return [*headers, server_timing(self)] if self.endpoint.timing else headers

    def ended(self, error: ServingError | None, *, gone: bool) -> Ended:  # noqa: D102
        route = self.endpoint.route
        if error is not None:
            status, _, body = refusal(error, self.endpoint.protocol)
            return Ended(self.identity, route, status, len(body))
        return Ended(self.identity, route, 499 if gone else 200, 0 if gone else self.size)

    def count(self, status: int) -> None:
        """Count it among the requests of its route."""
        if self.route is not None:
            self.route.in_flight -= 1
            self.route.finished(status, time.monotonic() - self.began)

    def lend_socket(self) -> SocketLoan | None:  # noqa: D102
        loan = self.connection.lend()
        if loan is not None:
            self._heads = self.connection.heads()
        return loan

    def render(self, response: Encoded) -> bytes | None:  # noqa: D102
        body, headers, kind = response
        if not isinstance(body, bytes):
            return None
        if self.endpoint.told:
            headers = self._told(body, headers)
        lines = b"".join([b"%b: %b\r\n" % pair for pair in headers]) if headers else b""
        head = b"%b%bcontent-length: %d\r\nx-request-id: %b\r\n\r\n"
        return head % (self._heads[200, kind], lines, len(body), self.identity) + body

    def recovered(self, rest: bytes | None) -> None:  # noqa: D102
        if rest is not None:
            self.count(200)
            self.connection.end_answer(rest)
