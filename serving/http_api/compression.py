"""Answers that are large and much alike, compressed for clients that accept it."""

from __future__ import annotations

import asyncio
import gzip

from fastapi import Request, Response

from serving.protocols.headers import accepted_coding, header


async def compressed(request: Request, body: bytes, content_type: str) -> Response:
    """Make an answer of this body, as gzip where the request accepts that."""
    headers = {"content-type": content_type, "vary": "accept-encoding"}
    if accepted_coding(header(request.scope["headers"], b"accept-encoding")) == b"gzip":
        body = await asyncio.to_thread(gzip.compress, body, 1, mtime=0)
        headers["content-encoding"] = "gzip"
    return Response(body, headers=headers)
