"""Answers that are large and much alike, compressed for clients that accept it."""

from __future__ import annotations

import asyncio
import gzip

from fastapi import Request, Response

_NEVER = frozenset({"q=0", "q=0.", "q=0.0", "q=0.00", "q=0.000"})


async def compressed(request: Request, body: bytes, content_type: str) -> Response:
    """Make an answer of this body, as gzip where the request accepts that."""
    headers = {"content-type": content_type, "vary": "accept-encoding"}
    if accepts_gzip(request.headers.get("accept-encoding", "")):
        body = await asyncio.to_thread(gzip.compress, body, 1, mtime=0)
        headers["content-encoding"] = "gzip"
    return Response(body, headers=headers)


def accepts_gzip(accepted: str) -> bool:
    """Tell whether an Accept-Encoding field takes gzip; what it says of gzip itself weighs more than of all."""
    said = {}
    for item in accepted.split(","):
        coding, _, weight = item.partition(";")
        said[coding.strip().lower()] = weight.strip().lower().replace(" ", "") not in _NEVER
    return said.get("gzip", said.get("*", False))
