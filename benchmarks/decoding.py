"""The decoder of a model, without a server around it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from serving.engine.model import Limits
from serving.fleet.fleet import Fleet
from serving.http_api.open_inference import Codec


def forest_codec(models: Path) -> Codec:
    """Return the v2 codec of the forest."""

    async def made() -> Codec:
        fleet = Fleet(models, limits=Limits(), metrics=None)
        await fleet.start()
        codec = Codec(fleet.models["forest"].default)
        await fleet.close()
        return codec

    return asyncio.run(made())
