"""Publishing over HTTP: one ONNX file as the raw body of a PUT, streamed to the disk, examined, and put into place."""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from serving.deploy import publish
from serving.deploy.delete import delete
from serving.deploy.staging import Writing
from serving.errors import InvalidRequest, NotReady, UnsupportedMediaType, shown
from serving.gate.report import GateRefused
from serving.gate.settings_check import with_settings
from serving.http_api.openapi.deploy_documents import Deletion, Publication, PublicationRefused
from serving.http_api.openapi.documents import Error
from serving.http_api.own_route import OwnRoute
from serving.http_api.parameters import Parameters
from serving.http_api.security import Deployer
from serving.http_api.services import LiveFleet, LiveServices, Services
from serving.http_api.upload import received
from serving.repository.manifest import MODEL_FILE, Entry
from serving.repository.repository import VERSION
from serving.repository.state_directory import staging_folder, state_folder

log = logging.getLogger("serving.publish")

CHECKSUM = "x-checksum-sha256"

_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


class _Asked(Parameters):
    """How a version is to be published."""

    note: Annotated[str, Field(max_length=2000, description="What is new, for people.")] = ""
    allow_breaking: Annotated[bool, Field(description="Callers of the version before may break.")] = False


class _Why(Parameters):
    """Why a version goes."""

    why: Annotated[str, Field(max_length=2000, description="The reason, for the history.")] = ""


@dataclass(frozen=True, slots=True)
class _Upload:
    """A file that has arrived."""

    path: Path
    entry: Entry

    def stage(self, folder: Path) -> dict[str, Entry]:
        self.path.rename(folder / MODEL_FILE)
        return {MODEL_FILE: self.entry}


router = APIRouter(route_class=OwnRoute, tags=["deploy"])


@router.put(
    "/v1/repository/models/{model}/versions/{version}",
    summary="Publish a version: the ONNX file is the body",
    status_code=201,
    openapi_extra=_BODY,
    responses={
        200: {"model": Publication, "description": "The same bytes were published before"},
        409: {"model": Error, "description": "The version is there with other bytes"},
        422: {"model": PublicationRefused, "description": "The gate refuses it"},
        503: {"model": Error, "description": "It could not be written now, and nothing has changed"},
    },
)
async def publish_version(  # noqa: PLR0917  FastAPI passes them by name
    request: Request,
    response: Response,
    services: LiveServices,
    model: str,
    version: str,
    caller: Deployer,
    asked: Annotated[_Asked, Query()],
) -> Publication:
    """Take `version` or, for `next`, the number after the highest.

    It moves no traffic; `answers` is the version that callers get who name none. 201 with the gate's report; 200
    where the same bytes were published before; 409 where the version is there with others; 422 with the report
    where the gate refuses it. `X-Checksum-Sha256` (hexadecimal) is compared if given.
    """
    publish.check_name(model)
    number = None if version == "next" else version
    if number is not None and not VERSION.fullmatch(number):
        raise InvalidRequest("the version is a whole number from 1, or next")
    store = services.fleet.changes.store
    services.fleet.changes.check()
    if services.uploads.locked():
        raise NotReady("too many models are being published: try again in a minute")
    try:
        async with services.uploads, _received(request, services) as upload, services.one_gate:
            published = await asyncio.to_thread(
                publish.publish,
                store.root,
                model,
                upload,
                version=number,
                note=asked.note,
                who=caller.name,
                allow_breaking=asked.allow_breaking,
                state_dir=store.state_dir,
                extension_ops=services.extension_ops,
            )
    except GateRefused as refused:
        log.warning("%s by %s is not published: %s", model, shown(caller.name), refused.message)
        raise
    services.fleet.agent.rescan()
    report = await asyncio.to_thread(with_settings, published.report, store.root / model)
    response.status_code = 201 if published.new else 200
    # From where it was sent to, so that it holds behind a proxy with a path of its own.
    response.headers["location"] = f"../../../../models/{model}/versions/{published.version}"
    return Publication(
        name=model, version=published.version, new=published.new, answers=published.answers, report=report
    )


@router.delete(
    "/v1/repository/models/{model}/versions/{version}",
    summary="Remove a version that has no role",
    responses={409: {"model": Error, "description": "It is stable, canary, shadow, labelled or kept by name"}},
)
async def delete_version(
    fleet: LiveFleet, model: str, version: str, caller: Deployer, asked: Annotated[_Why, Query()]
) -> Deletion:
    """Servers that have it loaded let it go; the history has who and why."""
    fleet.changes.check()
    after = await asyncio.to_thread(delete, fleet.changes.store, model, version, who=caller.name, why=asked.why)
    fleet.agent.rescan()
    return Deletion(name=model, version=version, generation=after.generation)


@asynccontextmanager
async def _received(request: Request, services: Services) -> AsyncIterator[_Upload]:
    """Stream the body into a file that is gone afterwards."""
    checksum = request.headers.get(CHECKSUM, "").lower()
    if checksum and not re.fullmatch("[0-9a-f]{64}", checksum):
        raise InvalidRequest("X-Checksum-Sha256 is not 64 hexadecimal digits")
    if request.headers.get("content-type", "").startswith("multipart/"):
        raise UnsupportedMediaType("send the ONNX file itself as the body, not a form: curl -T model.onnx")
    content = received(request, "the ONNX file", services.max_model_bytes, "--max-model-bytes")
    folder, store = None, services.fleet.changes.store
    try:
        folder = await asyncio.to_thread(lambda: staging_folder(state_folder(store.root, store.state_dir)))
        with await asyncio.to_thread(Writing, folder / MODEL_FILE) as writing:
            async with aclosing(content):
                async for part in content:
                    await asyncio.to_thread(writing.write, part)
            entry = await asyncio.to_thread(writing.close)
        if checksum and checksum != entry.sha256:
            raise InvalidRequest(f"the body has SHA-256 {entry.sha256}, and X-Checksum-Sha256 says otherwise")
        yield _Upload(folder / MODEL_FILE, entry)
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise NotReady(f"the model could not be written, and nothing has changed: {reason}") from error
    finally:
        if folder is not None:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
