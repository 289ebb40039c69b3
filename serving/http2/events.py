"""What a connection reports of the bytes that it received."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeAlias, TypeVar

from serving.http2.frames import ProtocolError

R = TypeVar("R")


class RequestReceived(NamedTuple, Generic[R]):
    """A stream was opened. request: what its headers mean; None where they are larger than is taken."""

    stream_id: int
    request: R | None
    end_stream: bool


class DataReceived(NamedTuple):
    """A piece of a request's body. end_stream: it was the last; trailers say no more than that."""

    stream_id: int
    data: bytes | memoryview
    end_stream: bool


class StreamReset(NamedTuple):
    """A stream ended before its response: the peer reset it, or did what it is reset for."""

    stream_id: int
    code: int


class ConnectionEnded(NamedTuple):
    """The peer broke the protocol or a bound; what to tell it is in the output."""

    error: ProtocolError


Event: TypeAlias = RequestReceived[R] | DataReceived | StreamReset | ConnectionEnded
