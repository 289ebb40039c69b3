"""What is done of a job, piece by piece: the input is cut, each piece predicted, and one result made of them."""

from __future__ import annotations

import asyncio
import io
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import islice
from typing import BinaryIO, cast

import numpy as np
from pyarrow import parquet
from sqlalchemy.ext.asyncio import AsyncSession

from serving.bulk import formats
from serving.bulk.answers import CsvWriter, Writer
from serving.bulk.batch import BEGIN, Batch, Position
from serving.bulk.lines import BLOCK_BYTES, Splitter
from serving.deploy.fleet import Fleet
from serving.engine.signature import Described
from serving.errors import Conflict, InvalidRequest, ModelNotFound, NotReady
from serving.in_process.codec import PROTOCOL
from serving.jobs import assembly, leases
from serving.jobs.database import Database, DatabaseAway
from serving.jobs.inputs import CHANGED, Input, InputFile, Locations
from serving.jobs.leases import Claim
from serving.jobs.results import Results
from serving.jobs.tables import PUBLISH, SCORE, SPLIT, Job
from serving.prediction.bulk import BulkPrediction
from serving.prediction.endpoint import Endpoint
from serving.prediction.endpoints import EndpointTable
from serving.prediction.request_options import DEFAULTS
from serving.protocols import strict_json

PIECE_BYTES = 4 << 20
"""Of text in one piece: what a worker that dies has done in vain, at most."""
PIECE_ROWS = 1 << 17
"""Of Parquet, and lines of text from which on a piece ends with the next megabyte."""
_AT_A_TIME = 32
"""Cuts that are made before they are noted."""
_CHUNK = 1 << 20
_MOST_WAIT_S = 15.0


class Pieces:
    """Does pieces, with the models of `fleet`; endpoints: those of this process's own code."""

    def __init__(
        self,
        database: Database,
        results: Results,
        locations: Locations,
        fleet: Fleet,
        endpoints: EndpointTable,
    ) -> None:
        self._database = database
        self._results = results
        self._locations = locations
        self._fleet = fleet
        self._endpoints = endpoints
        self.rows: Counter[str] = Counter()
        """Rows that this worker has predicted, by outcome."""
        self.piece_bytes = PIECE_BYTES
        self.piece_rows = PIECE_ROWS

    async def do(self, claimed: Claim) -> None:
        """Do a piece and have it count. Raises LeaseLost, and ServingError: of a kind that passes, or not."""
        await {SPLIT: self._split, SCORE: self._score, PUBLISH: self._publish}[claimed.piece.kind](claimed)

    async def _split(self, claimed: Claim) -> None:
        """Cut the input, and see that it fits the model at all."""
        job, piece = claimed.job, claimed.piece
        described = (await self._endpoint(job)).model.described
        start = Position(piece.start, piece.line)
        async with self._input(job) as source:
            if not start.offset:
                await asyncio.to_thread(next, _reader(job, InputFile(source), described), None)
            size = source.size
            cuts = self._cuts(source, start, quotes=job.input_format == "csv")
            if job.input_format == "parquet":
                size = (await asyncio.to_thread(parquet.read_metadata, InputFile(source))).num_rows
                cuts = _row_cuts(size, start.offset, self.piece_rows)
            last = False
            while not last:
                some = [start, *await asyncio.to_thread(lambda: list(islice(cuts, _AT_A_TIME)))]
                start, last = some[-1], len(some) <= _AT_A_TIME
                await self._database.run(partial(leases.commit_split, claimed=claimed, cuts=some, size=size, last=last))

    def _cuts(self, source: Input, start: Position, *, quotes: bool) -> Iterator[Position]:
        """Cut text where lines end; the last cut is its end."""
        file = InputFile(source)
        file.seek(start.offset)
        splitter = Splitter(file.read, start, quotes=quotes, block_bytes=min(BLOCK_BYTES, self.piece_bytes))
        for _ in splitter.blocks():
            here = splitter.position
            if here.offset - start.offset >= self.piece_bytes or here.line - start.line >= self.piece_rows:
                start = here
                yield here
        if splitter.position.offset > start.offset:
            yield splitter.position

    async def _score(self, claimed: Claim) -> None:
        """Predict the rows of a piece."""
        job = claimed.job
        endpoint = await self._endpoint(job)
        made = _Predicted(endpoint)
        name = partial(part, job.id, claimed.piece.number, claimed.token)
        async with self._input(job) as source:
            batches = _batches(claimed, source, endpoint.model.described)
            await self._results.put(name(job.output_format), made.written(claimed, batches))
        if made.bad:
            await self._results.put(name("errors"), made.errors.getvalue())
        good, bad = made.good, made.bad
        await self._commit(partial(leases.commit_scored, claimed=claimed, good=good, bad=bad))
        self.rows.update(good=good, bad=bad)

    async def _publish(self, claimed: Claim) -> None:
        """Make one result of the parts that count: of each piece the one with its last token."""
        job, kind = claimed.job, cast(formats.Format, claimed.job.output_format)
        pieces = await self._database.run(partial(leases.scored, job_id=job.id))
        parts = [part(job.id, piece.number, piece.token, kind) for piece in pieces]
        errors = [part(job.id, piece.number, piece.token, "errors") for piece in pieces if piece.bad]
        if not parts and kind != "ndjson":
            described = (await self._endpoint(job)).model.described
            await self._results.put(empty := f"{job.id}/parts/empty", assembly.empty(kind, described))
            parts = [empty]
        put = assembly.tables if kind == "parquet" else assembly.joined
        await self._results.put(f"{job.id}/errors.ndjson", assembly.joined(self._results, errors))
        await self._results.put(f"{job.id}/result.{kind}", self._while_held(claimed, put(self._results, parts)))
        size = await self._results.size(f"{job.id}/result.{kind}")
        await self._commit(partial(leases.commit_published, claimed=claimed, result_bytes=size))

    async def _while_held(self, claimed: Claim, content: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Give content whose end is reached only if the piece is still this worker's then. Raises LeaseLost."""
        async for chunk in content:
            yield chunk
        await self._database.run(partial(leases.renew, claimed=claimed))

    async def _commit(self, change: Callable[[AsyncSession], Awaitable[None]]) -> None:
        """Note what is done, however long the database is away: it is not done twice for that. Raises LeaseLost."""
        wait = 0.5
        while True:
            try:
                await self._database.run(change)
                return
            except DatabaseAway:
                await asyncio.sleep(wait)
                wait = min(2 * wait, _MOST_WAIT_S)

    @asynccontextmanager
    async def _input(self, job: Job) -> AsyncIterator[Input]:
        """Open what a job reads. Raises Conflict where it is another one than it was."""

        def opened() -> Input:
            return self._results.open(f"{job.id}/input") if job.url is None else self._locations.open(job.url)

        source = await asyncio.to_thread(opened)
        try:
            if job.identity not in (None, source.identity):
                raise Conflict(CHANGED)
            yield source
        finally:
            source.close()

    async def _endpoint(self, job: Job) -> Endpoint:
        """Return the version that predicts. Raises NotReady where it can't now, InvalidRequest where it was deleted."""
        try:
            return self._endpoints.find(PROTOCOL, job.model, job.version)
        except (ModelNotFound, NotReady) as error:
            store = self._fleet.changes.store
            if not self._fleet.folder_gone and job.version not in await asyncio.to_thread(store.versions, job.model):
                raise InvalidRequest(f"version {job.version} of model {job.model} was deleted meanwhile") from None
            raise NotReady(error.message) from None


class _Predicted:
    """The rows of a piece, predicted and written as they come; counts them."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.good = self.bad = 0
        self.errors = io.BytesIO()
        """A line of JSON for each bad row."""
        self._described = endpoint.model.described
        self._prediction = BulkPrediction(endpoint, (), DEFAULTS)

    async def written(self, claimed: Claim, batches: Iterator[Batch]) -> AsyncIterator[bytes]:
        """Give the part's bytes; the next batch is read while the model has the one before."""
        kind, sink = cast(formats.Format, claimed.job.output_format), io.BytesIO()
        writer: Writer = formats.writer(kind, self._described, sink)
        if kind == "csv":  # the parts' lines are put one behind the other
            writer = CsvWriter(self._described, sink, header=claimed.piece.number == 1)
        upcoming = asyncio.ensure_future(asyncio.to_thread(next, batches, None))
        try:
            while (batch := await upcoming) is not None:
                upcoming = asyncio.ensure_future(asyncio.to_thread(next, batches, None))
                for scored in await self._prediction.run(batch):
                    self.good += len(scored.lines)
                    self.bad += len(scored.bad)
                    self.errors.writelines(strict_json.dumps(each._asdict()) + b"\n" for each in scored.bad)
                    await asyncio.to_thread(writer.write, *scored)
                if sink.tell() > _CHUNK:
                    yield _drained(sink)
        finally:
            upcoming.cancel()
        if kind != "ndjson":
            await asyncio.to_thread(writer.close, self.good, self.bad)
        yield _drained(sink)


def part(job_id: str, number: int, token: int, kind: str) -> str:
    """Return where the part of a piece is that was made under a token."""
    return f"{job_id}/parts/{number}.{token}.{kind}"


def _reader(job: Job, file: InputFile, described: Described, start: Position = BEGIN) -> Iterator[Batch]:
    kind = cast(formats.Format, job.input_format)
    return iter(formats.reader(kind, cast(BinaryIO, file), described, start))


def _row_cuts(rows: int, start: int, size: int) -> Iterator[Position]:
    """Cut so many rows, from `start` on."""
    for row in range(start + size, rows, size):
        yield Position(row, row + 1)
    if rows > start:
        yield Position(rows, rows + 1)


def _batches(claimed: Claim, source: Input, described: Described) -> Iterator[Batch]:
    """Read the rows of a piece."""
    job, piece = claimed.job, claimed.piece
    start = Position(piece.start, piece.line)
    if job.input_format != "parquet":
        yield from _reader(job, InputFile(source, piece.end), described, start)
        return
    for batch in _reader(job, InputFile(source), described, start):
        within = int(np.searchsorted(batch.lines, piece.end, "right"))
        bad = tuple(each for each in batch.bad if each.line <= piece.end)
        if within < batch.rows:
            inputs = tuple(array[:within] for array in batch.inputs or ()) if within else None
            batch = batch._replace(inputs=inputs, rows=within, lines=batch.lines[:within])  # noqa: PLW2901
        yield batch._replace(bad=bad)
        if batch.end is not None and batch.end.offset >= piece.end:
            return


def _drained(sink: io.BytesIO) -> bytes:
    held = sink.getvalue()
    sink.seek(0)
    sink.truncate()
    return held
