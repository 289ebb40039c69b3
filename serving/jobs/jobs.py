"""The life of a job: asked for, found, cancelled, deleted."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import secrets
from collections.abc import AsyncIterator
from dataclasses import KW_ONLY, dataclass, field

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from serving.access.principal import Principal
from serving.deploy.fleet import Fleet
from serving.errors import Conflict, Forbidden, JobNotFound, QueueFull, ServingError, shown
from serving.jobs import leases, retention
from serving.jobs.database import Database
from serving.jobs.documents import Asked, Format, JobDocument, JobList, JobRequest
from serving.jobs.inputs import Locations
from serving.jobs.results import Results
from serving.jobs.tables import ACTIVE, SPLIT, Job, Piece, now
from serving.protocols import strict_json

log = logging.getLogger("serving.jobs")

UPLOADS = 8
"""Files that one worker is sent at a time."""
MOST_ACTIVE = 1000
"""Jobs of one key that may be queued or running at a time."""


@dataclass
class Jobs:
    """The jobs of a models folder, as their owners see them.

    locations: where inputs may be. max_upload_bytes: of a file. `asked` is set where there is a new job.
    """

    database: Database
    results: Results
    locations: Locations
    fleet: Fleet
    _: KW_ONLY
    max_upload_bytes: int
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    _uploads: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(UPLOADS))

    async def create(
        self, caller: Principal, asked: JobRequest, key: str | None, trace: str | None = None
    ) -> tuple[JobDocument, bool]:
        """Keep a job for rows, or for what is at a URL, so that workers find it; return it, and whether it is new.

        key: the same key gives the same job. trace: see `traceparent`. Raises ModelNotFound, NotReady, Forbidden,
        InvalidRequest, QueueFull, and Conflict where the key came with another request.
        """
        assert asked.format is not None  # noqa: S101  it was validated
        job = self._job(caller, asked, asked.format, key, trace)
        if asked.url is None:
            rows = asked.rows or ()
            lines = await asyncio.to_thread(lambda: b"".join([strict_json.dumps(row) + b"\n" for row in rows]))

            async def content() -> AsyncIterator[bytes]:
                yield lines

            return await self._receive(job, asked, content())
        found = await asyncio.to_thread(self.locations.open, asked.url)
        job.url, job.identity, job.size = asked.url, found.identity, found.size
        found.close()
        job.fingerprint = _fingerprint(asked, "")
        return await self._keep(job)

    async def receive(  # noqa: PLR0917
        self,
        caller: Principal,
        asked: Asked,
        kind: Format,
        content: AsyncIterator[bytes],
        key: str | None,
        trace: str | None = None,
    ) -> tuple[JobDocument, bool]:
        """Keep a job for a file that is sent; as `create`. Raises what `content` raises too: nothing is kept then."""
        if self._uploads.locked():
            raise QueueFull(f"{UPLOADS} files are being sent to this worker: come back in a minute", 60)
        async with self._uploads:
            return await self._receive(self._job(caller, asked, kind, key, trace), asked, content)

    async def _receive(self, job: Job, asked: Asked, content: AsyncIterator[bytes]) -> tuple[JobDocument, bool]:
        seen = hashlib.sha256()

        async def hashed() -> AsyncIterator[bytes]:
            async for part in content:
                seen.update(part)
                yield part

        path = f"{job.id}/input"
        await self.results.put(path, hashed())
        made: JobDocument | None = None
        try:
            job.size = await self.results.size(path)
            job.fingerprint = _fingerprint(asked, seen.hexdigest())
            made, new = await self._keep(job)
            return made, new
        finally:
            if made is None or made.id != job.id:
                await self._discard(job.id)

    async def _discard(self, job_id: str) -> None:
        try:
            await self.results.remove(job_id)
        except ServingError as error:  # what is left is swept
            log.warning("an input that is not needed could not be removed: %s", error.message)

    def _job(self, caller: Principal, asked: Asked, kind: Format, key: str | None, trace: str | None) -> Job:
        model = self.fleet.get(asked.model, asked.version, asked.label)
        callers = model.limits.callers
        if callers is not None and caller.name not in callers:
            raise Forbidden("this model's settings name others who may: ask who runs it")
        return Job(
            id=secrets.token_hex(16),  # nobody can guess it
            owner=caller.name,
            idempotency_key=key,
            model=model.name,
            version=model.version,
            input_format=kind,
            output_format=asked.output,
            traceparent=trace,
        )

    async def _keep(self, job: Job) -> tuple[JobDocument, bool]:
        async with self.database.transaction(alone=True) as session:
            found = await _repeated(session, job)
            if found is None:
                waiting = select(func.count()).where(Job.owner == job.owner, Job.state.in_(ACTIVE))
                if (await session.scalar(waiting) or 0) >= MOST_ACTIVE:
                    raise QueueFull(f"{MOST_ACTIVE} of your jobs are queued or running: come back when some ended", 60)
                session.add_all([job, Piece(job_id=job.id, number=0, kind=SPLIT)])
                await session.flush()
                await session.refresh(job)
            made = _described(found or job, await _time(session))
        self.asked.set()
        return made, found is None

    async def listed(
        self, session: AsyncSession, caller: Principal, state: str | None, skip: int, limit: int
    ) -> JobList:
        """Return `limit` of the caller's jobs, the latest first, and how many there are."""
        its = [Job.owner == caller.name] + ([Job.state == state] if state is not None else [])
        latest = select(Job).where(*its).order_by(Job.created_at.desc(), Job.id).offset(skip).limit(limit)
        total = await session.scalar(select(func.count()).select_from(Job).where(*its)) or 0
        time = await _time(session)
        return JobList(jobs=[_described(job, time) for job in await session.scalars(latest)], total=total)

    async def get(self, session: AsyncSession, caller: Principal, job_id: str) -> JobDocument:
        """Return one of the caller's jobs. Raises JobNotFound, also for those of others."""
        return _described(await _own(session, caller, job_id), await _time(session))

    async def cancel(self, session: AsyncSession, caller: Principal, job_id: str) -> JobDocument:
        """Stop a job; one that is cancelled stays so. Raises JobNotFound, Conflict where it has ended otherwise."""
        job = await _own(session, caller, job_id)
        if not await leases.end(session, job_id, "cancelled"):
            await session.refresh(job)
            if job.state != "cancelled":
                raise Conflict(f"the job has {job.state} already")
        await session.refresh(job)
        return _described(job, await _time(session))

    async def delete(self, caller: Principal, job_id: str) -> None:
        """Stop a job and remove it with its files. Raises JobNotFound, NotReady."""
        async with self.database.transaction() as session:
            await _own(session, caller, job_id)
            await leases.end(session, job_id, "cancelled")
        await retention.remove(self.database, self.results, job_id)


def _fingerprint(asked: Asked, sha256: str) -> str:
    """Return what tells a request from another one: what is asked for, and the SHA-256 of what was sent."""
    facts = [asked.model_dump(exclude={"rows"}), sha256]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


async def _own(session: AsyncSession, caller: Principal, job_id: str) -> Job:
    # What is no id is not asked for: PostgreSQL refuses a NUL.
    job = await session.get(Job, job_id) if len(job_id) <= 32 and job_id.isalnum() else None
    if job is None or job.owner != caller.name:
        raise JobNotFound(f"you have no job '{shown(job_id)}': it may have been deleted")
    return job


async def _repeated(session: AsyncSession, job: Job) -> Job | None:
    if job.idempotency_key is None:
        return None
    same = select(Job).where(Job.owner == job.owner, Job.idempotency_key == job.idempotency_key)
    found = (await session.scalars(same)).first()
    if found is not None and found.fingerprint != job.fingerprint:
        raise Conflict("Idempotency-Key: another job was asked for with the same key: take a new one for this one")
    return found


async def _time(session: AsyncSession) -> float:
    return await session.scalar(select(now())) or 0.0


def _described(job: Job, time: float) -> JobDocument:
    elapsed = (job.finished_at or time) - job.started_at if job.started_at is not None else 0.0
    rows = job.rows_good + job.rows_bad
    progress = 1.0 if job.state == "succeeded" else min(1.0, job.done / job.size) if job.size else 0.0
    left = elapsed * (1 / progress - 1) if progress and job.state in ACTIVE else None
    facts = {column.key: getattr(job, column.key) for column in Job.__table__.columns} | {
        "input": job.input_format,
        "output": job.output_format,
        "progress": round(progress, 4),
        "rows_per_s": round(rows / elapsed, 1) if rows and elapsed > 0 else None,
        "seconds_left": round(left, 1) if left is not None else None,
        "result_bytes": job.result_bytes if job.state == "succeeded" else None,
    }
    return JobDocument.model_validate(facts)
