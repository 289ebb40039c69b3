"""`/docs`, `/redoc` and `/openapi.json`: each loaded model with its own features, and no asset from the internet."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_redoc_html
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles

from serving.http_api.compression import compressed
from serving.http_api.openapi.document import document
from serving.http_api.security import may
from serving.http_api.services import LiveServices
from serving.protocols.strict_json import dumps

# Redoc would fetch a logo from its maker.
_OFFLINE = {"content-security-policy": "default-src 'self' 'unsafe-inline' data: blob:"}

# Made here and not by FastAPI, for the key: the document names the models only to who may predict, so that the page
# fetches it again once it has been given one.
_PAGE = Path(__file__).with_name("docs.html").read_text()

# To be read; it asks without a key, and shows what anyone may know of.
_READING_PAGE = get_redoc_html(
    openapi_url="openapi.json",
    title="serving",
    redoc_js_url="docs/assets/redoc.standalone.js",
    redoc_favicon_url="docs/assets/favicon.png",
    with_google_fonts=False,
).body


def add(app: FastAPI) -> None:
    """Add the documentation routes and their assets to the application; all they name is relative but the server."""
    app.mount("/docs/assets", StaticFiles(packages=[("fastapi_offline", "static")]), name="docs-assets")

    made: dict[bool, tuple[object, bytes]] = {}

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi(request: Request, services: LiveServices) -> Response:
        whole = may(request, "predict")
        # Swaps by number: holding the models themselves would keep those alive that have gone.
        state = (id(services), services.fleet.swaps, services.access.closed)
        if whole not in made or made[whole][0] != state:
            # On a thread: it takes as long as hundreds of predictions.
            made[whole] = state, await asyncio.to_thread(lambda: dumps(document(app, services, models=whole)))
        body = made[whole][1]
        if path := services.public.of(request):
            body = b'{"servers":[{"url":"%b"}],' % path.encode() + body[1:]
        return await compressed(request, body, "application/json")

    @app.get("/docs", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(_PAGE, headers=_OFFLINE)

    @app.get("/redoc", include_in_schema=False)
    async def reading_page() -> Response:
        return HTMLResponse(_READING_PAGE, headers=_OFFLINE)
