"""`/docs`, `/redoc` and `/openapi.json`: each loaded model with its own features, and no asset from the internet."""

from __future__ import annotations

import asyncio

from fastapi import FastAPI, Request
from starlette.responses import Response
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
_PAGE = b"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>serving</title>
<link rel="stylesheet" href="docs/assets/swagger-ui.css">
<link rel="icon" href="docs/assets/favicon.png">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/assets/swagger-ui-bundle.js"></script>
<script>
let key = null;
const anew = (change) => (original, system) => (given) => {
  const done = original(given);
  key = change(given);
  system.specActions.download();
  return done;
};
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  presets: [SwaggerUIBundle.presets.apis],
  layout: "BaseLayout",
  deepLinking: true,
  tryItOutEnabled: true,
  defaultModelsExpandDepth: -1,
  requestInterceptor: (request) => {
    if (request.loadSpec && key) request.headers.Authorization = "Bearer " + key;
    return request;
  },
  plugins: [{statePlugins: {auth: {wrapActions: {
    authorize: anew((given) => given.bearer ? given.bearer.value : null),
    logout: anew(() => null),
  }}}}],
});
</script>
</body>
</html>
"""

# To be read; it asks without a key, and shows what anyone may know of.
_READING_PAGE = b"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>serving</title>
<link rel="icon" href="docs/assets/favicon.png">
<style>body { margin: 0; }</style>
</head>
<body>
<div id="redoc"></div>
<script src="docs/assets/redoc.standalone.js"></script>
<script>Redoc.init("openapi.json", {disableSearch: false, hideLogo: true}, document.getElementById("redoc"));</script>
</body>
</html>
"""


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
        return Response(_PAGE, headers=_OFFLINE, media_type="text/html; charset=utf-8")

    @app.get("/redoc", include_in_schema=False)
    async def reading_page() -> Response:
        return Response(_READING_PAGE, headers=_OFFLINE, media_type="text/html; charset=utf-8")
