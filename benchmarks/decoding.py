"""Loaded models, without a server around them, and the decoder of one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from serving.deploy.fleet import Fleet
from serving.http_api.app import create_app
from serving.protocols.open_inference import Codec
from serving.settings import Settings


@asynccontextmanager
async def loaded(models: Path) -> AsyncIterator[Fleet]:
    """Load a folder as the application does."""
    app = create_app(Settings(models=models, metrics=False))
    async with app.router.lifespan_context(app):
        yield app.state.serving.fleet


def forest_codec(models: Path) -> Codec:
    """Return the v2 codec of the forest."""

    async def made() -> Codec:
        async with loaded(models) as fleet:
            return Codec(fleet.models["forest"].default.described)

    return asyncio.run(made())
