"""The engine within an application of somebody's own: its lifespan, a whole application, and predictors to depend on.

An application makes what it serves with when it starts. Under `serving run` the command has made it before.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fastapi import FastAPI
from starlette.requests import HTTPConnection

from serving import platforms
from serving.deploy.mirror import located
from serving.http_api.app import application, serve
from serving.http_api.services import Services, make_services, services_of
from serving.in_process.predictor import Predictor
from serving.settings import Settings

log = logging.getLogger("serving.library")


class Unfit(Exception):
    """An application can't be served as it is; the text is one line for who wrote it."""


class _Hosted(NamedTuple):
    settings: Settings
    services: Services


_hosted: _Hosted | None = None
"""What `serving run` gives the one application of this process."""


def create_app(models: str | Path | None = None, **settings: Any) -> FastAPI:
    """Make an application that serves a models folder, with documentation, to add routes to.

    models, settings: as the flags of `serving run` are called (`max_batch_rows=64`); what is not given comes from
    `SERVING_*`, or is the default. Raises pydantic.ValidationError for what is no setting. Under `serving run` the
    command's settings are taken, and an application that says otherwise does not start.
    """
    given = _checked(models, settings)
    platform = (
        platforms.platform(Settings(**given).platform, os.environ) if _hosted is None else _hosted.services.platform
    )
    return application(lambda: _services(given), platform)


def lifespan(
    models: str | Path | None = None, **settings: Any
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """Make the lifespan of an application that serves a models folder, for `FastAPI(lifespan=...)`.

    An application with a lifespan of its own enters it there: `async with serving.lifespan("models")(app): ...`. For
    the arguments see `create_app`.
    """
    given = _checked(models, settings)

    @asynccontextmanager
    async def run(app: FastAPI) -> AsyncIterator[None]:
        async with serve(app, _services(given)):
            yield

    return run


@functools.cache
def predictor(model: str) -> Callable[[HTTPConnection], Awaitable[Predictor]]:
    """Return the dependency that gives a route the Predictor of a model: `Depends(serving.predictor("credit"))`.

    The same object for the same name: `app.dependency_overrides[serving.predictor("credit")]` replaces it.
    """

    async def dependency(connection: HTTPConnection) -> Predictor:
        return Predictor(model, services_of(connection).in_process)

    return dependency


def _checked(models: str | Path | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(settings) if models is None else {"models": Path(models), **settings}
    Settings(**given)
    return given


def _services(given: Mapping[str, Any]) -> Services:
    """Return what the command has made, or make it. Raises Unfit where the command says otherwise than `given`."""
    if _hosted is None:
        return make_services(Settings(**given))
    settings, services = _hosted
    asked = Settings(**given)
    # Both as folders: of a repository in an object store the one that mirrors it here.
    asked = asked.model_copy(update={"models": located(asked.models, settings.state_dir)[0]})
    for name in given:
        ours, theirs = (getattr(each, name) for each in (settings, asked))
        same = ours.resolve() == theirs.resolve() if isinstance(theirs, Path) and ours is not None else ours == theirs
        if not same:
            flag = name.replace("_", "-")
            raise _unfit(
                f"the application is written for {name} {theirs}, and `serving run` was told {ours}: under the command "
                f"its own settings count, so start it with --{flag} {theirs}, or leave {name} out of the application"
            )
    return services


def host(settings: Settings, services: Services) -> FastAPI:
    """Return the application that `serving run` is to serve in this process with `services`. Raises Unfit."""
    global _hosted  # noqa: PLW0603  a module that is imported by its name finds it no other way
    _hosted = _Hosted(settings, services)
    if settings.app is None:
        return create_app()
    module, _, name = settings.app.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` and uvicorn have it
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
            raise
        raise _unfit(f"--app {settings.app}: there is no module {module} here") from None
    app = getattr(found, name or "app", None)
    if not isinstance(app, FastAPI):
        what = "nothing" if app is None else type(app).__name__
        raise _unfit(f"--app {settings.app}: should name a FastAPI application, and {name or 'app'} there is {what}")
    return app


def _unfit(why: str) -> Unfit:
    log.error(why)
    return Unfit(why)
