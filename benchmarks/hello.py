"""Bare uvicorn: an ASGI application that reads nothing and says hello, the floor of every Python framework."""

from typing import Any

START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/plain"), (b"content-length", b"5")],
}
BODY = {"type": "http.response.body", "body": b"hello"}


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Say hello."""
    await send(START)
    await send(BODY)
