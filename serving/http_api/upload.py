"""Files that are the body of a request: taken as they come, within bounds on their size and on silence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from starlette.requests import Request

from serving.errors import InvalidRequest, PayloadTooLarge, UnsupportedMediaType

SILENCE_S = 60.0
"""Seconds without a byte after which an upload is given up."""
_BUFFER = 1 << 20


class ClientLeft(Exception):
    """The client closed the connection before its request was whole."""


async def received(request: Request, what: str, limit: int, setting: str) -> AsyncGenerator[bytes]:
    """Give the body by the megabyte, so that whoever writes it asks a thread for each, and never the loop.

    what: its name in errors. limit: bytes, which `setting` says. Raises InvalidRequest, PayloadTooLarge,
    UnsupportedMediaType, and ClientLeft where it is cut.
    """
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType(f"send {what} as it is, without a Content-Encoding")
    declared = request.headers.get("content-length", "")
    too_large = PayloadTooLarge(f"{what} has over {limit} bytes, which is the limit: see {setting}")
    if declared.isdigit() and int(declared) > limit:
        raise too_large
    buffer, size, more = bytearray(), 0, True
    while more:
        try:
            async with asyncio.timeout(SILENCE_S):
                message = await request.receive()
        except TimeoutError:
            raise InvalidRequest(f"nothing of the body came for {SILENCE_S:g} s") from None
        if message["type"] == "http.disconnect":
            raise ClientLeft
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise too_large
        buffer += part
        more = message.get("more_body", False)
        if len(buffer) >= _BUFFER or not more:
            yield bytes(buffer)
            buffer.clear()
    if not size:
        raise InvalidRequest(f"the body is empty: send {what}")
