"""Jobs over HTTP: more rows than one request should hold, predicted in the background by the workers of all servers."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import Field, ValidationError

from serving.access.principal import Principal
from serving.errors import Conflict, InvalidRequest, JobNotFound, PayloadTooLarge, UnsupportedMediaType
from serving.http_api.json_body import refusal
from serving.http_api.openapi.documents import Error
from serving.http_api.own_route import OwnRoute
from serving.http_api.parameters import NoParameters, Parameters
from serving.http_api.route import read_body
from serving.http_api.security import requires
from serving.http_api.services import LiveServices
from serving.http_api.upload import received
from serving.jobs.documents import TYPES, Asked, JobDocument, JobList, JobRequest, State
from serving.prediction.tracing import traceparent
from serving.protocols import strict_json

if TYPE_CHECKING:  # what needs the extra is imported where there are jobs
    from serving.jobs.jobs import Jobs

_JSON = ("application/json", "application/x-www-form-urlencoded")
"""What JSON is sent as: curl says the second of whatever it is given with -d."""
_MOST_JSON_BYTES = 1024 * 1024
"""It is read in one go, and nobody is served meanwhile; files are not."""


def live_jobs(services: LiveServices) -> Jobs:
    """Give the jobs of the application that got the request. Raises JobNotFound where it has none."""
    if services.jobs is None:
        raise JobNotFound("this server has no jobs: start it with --jobs-database-url sqlite, see /docs")
    return services.jobs


LiveJobs = Annotated[Any, Depends(live_jobs)]
_JOBS = requires("jobs")
User = Annotated[Principal, Depends(_JOBS)]
"""The caller of a route of jobs, who sees their own."""


async def found_job(job: str, jobs: LiveJobs, caller: User) -> JobDocument:
    """Give the job that the path names, if it is the caller's; the database is free again by then."""
    async with jobs.database.transaction() as opened:
        found: JobDocument = await jobs.get(opened, caller, job)
        return found


Found = Annotated[JobDocument, Depends(found_job)]

router = APIRouter(route_class=OwnRoute, prefix="/v1/jobs", tags=["jobs"], dependencies=[Depends(_JOBS)])


class _Upload(Parameters, Asked):
    """What is to be done with a file that is sent as the body; with JSON, the body says it."""

    model: Annotated[str, Field(max_length=256, description="Name of the model; required with a file.")] = ""


class _Listed(Parameters):
    """Which jobs are wanted."""

    state: State | None = None
    skip: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    limit: Annotated[int, Field(ge=1, le=1000)] = 100


def _file_of(*kinds: str) -> dict[int | str, dict[str, Any]]:
    binary = {"schema": {"type": "string", "format": "binary"}}
    no_result = {"model": Error, "description": "The job has none: it is active, or ended otherwise"}
    return {200: {"content": dict.fromkeys(kinds, binary)}, 409: no_result}


_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": JobRequest.model_json_schema()},
            **{kind: {"schema": {"type": "string", "format": "binary"}} for kind in TYPES},
        },
    }
}


@router.post(
    "",
    summary="Ask for a job",
    status_code=201,
    openapi_extra=_BODY,
    responses={
        200: {"model": JobDocument, "description": "It was asked for before, with the same Idempotency-Key"},
        409: {"model": Error, "description": "Another job was asked for with the same Idempotency-Key"},
        429: {"model": Error, "description": "Too many of your jobs are queued or running"},
    },
)
async def create_job(  # noqa: PLR0917  FastAPI passes them by name
    request: Request,
    response: Response,
    jobs: LiveJobs,
    caller: User,
    asked: Annotated[_Upload, Query()],
    idempotency_key: Annotated[
        str | None, Header(min_length=1, max_length=255, description="Makes repeating safe.")
    ] = None,
) -> JobDocument:
    """Predict many rows in the background: those of a JSON body, of a file that is the body, or at a URL.

    With a file as the body (`text/csv`, `application/x-ndjson`, `application/vnd.apache.parquet`) the query says what
    to do with it. The version is chosen now, and is the same for all rows.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    trace = traceparent(request.scope["headers"])
    made: JobDocument
    if kind in _JSON:
        try:
            body = await read_body(request.scope["headers"], request.receive, _MOST_JSON_BYTES)
        except PayloadTooLarge as error:
            raise PayloadTooLarge(f"{error.message}: send the rows as a file, such as text/csv") from None
        wanted = await asyncio.to_thread(read_request, bytes(body))
        made, new = await jobs.create(caller, wanted, idempotency_key, trace)
    elif kind in TYPES:
        if not asked.model:
            raise InvalidRequest("model: is missing in the query, as in /v1/jobs?model=iris&output=csv")
        async with aclosing(received(request, "the file", jobs.max_upload_bytes, "--jobs-max-upload-bytes")) as content:
            made, new = await jobs.receive(caller, asked, TYPES[kind], content, idempotency_key, trace)
    else:
        raise UnsupportedMediaType(
            f"Content-Type: should be application/json or, for a file that is the body itself, {', '.join(TYPES)}"
        )
    response.status_code = 201 if new else 200
    response.headers["location"] = f"jobs/{made.id}"
    return made


@router.get("", summary="Your jobs, the latest first")
async def list_jobs(jobs: LiveJobs, caller: User, asked: Annotated[_Listed, Query()]) -> JobList:
    """Answer with `limit` jobs, and how many there are."""
    async with jobs.database.transaction() as session:
        found: JobList = await jobs.listed(session, caller, asked.state, asked.skip, asked.limit)
        return found


@router.get("/{job}", summary="How a job goes")
async def get_job(job: Found) -> JobDocument:
    """Answer with its state, rows done and bad, rate, and time left."""
    return job


@router.post(
    "/{job}/cancel",
    summary="Stop a job",
    responses={409: {"model": Error, "description": "It has ended otherwise"}},
)
async def cancel_job(job: str, jobs: LiveJobs, caller: User, _: NoParameters) -> JobDocument:
    """Stop it for good; a job that is cancelled stays so, and one that has ended otherwise is a conflict."""
    async with jobs.database.transaction() as session:
        cancelled: JobDocument = await jobs.cancel(session, caller, job)
        return cancelled


@router.delete("/{job}", summary="Remove a job and its result", status_code=204)
async def delete_job(job: str, jobs: LiveJobs, caller: User, _: NoParameters) -> Response:
    """Stop it where it is active, and remove all that is kept of it."""
    await jobs.delete(caller, job)
    return Response(status_code=204)


@router.get(
    "/{job}/result", summary="The result of a job", responses=_file_of(*TYPES), response_class=StreamingResponse
)
async def job_result(job: Found, jobs: LiveJobs) -> Response:
    """Answer with the predictions, in the order of the rows, in the format that was asked for."""
    media = next(kind for kind, name in TYPES.items() if name == job.output)
    return await _file(jobs, job, f"result.{job.output}", media)


@router.get(
    "/{job}/errors",
    summary="The bad rows of a job",
    responses=_file_of("application/x-ndjson"),
    response_class=StreamingResponse,
)
async def job_errors(job: Found, jobs: LiveJobs) -> Response:
    """Answer with a JSON document a line for each row that was not predicted: its line, a JSON pointer, and why."""
    return await _file(jobs, job, "errors.ndjson", "application/x-ndjson")


async def _file(jobs: Jobs, job: JobDocument, name: str, media: str) -> Response:
    if job.state != "succeeded":
        raise Conflict(f"the job has no result: it is {job.state}{': ' * bool(job.error)}{job.error}")
    path = f"{job.id}/{name}"
    try:
        size = await jobs.results.size(path)
    except InvalidRequest:  # retention, or another request, removes it right now
        raise JobNotFound("the result of this job has gone: ask for a new job") from None
    headers = {"content-length": str(size), "content-disposition": f'attachment; filename="{job.id}-{name}"'}
    return StreamingResponse(jobs.results.read(path), media_type=media, headers=headers)


def read_request(body: bytes) -> JobRequest:
    """Read what is asked for in JSON. Raises InvalidRequest, which names what is wrong."""
    try:
        return JobRequest.model_validate(strict_json.loads(body))
    except ValidationError as error:
        raise refusal(error) from None
