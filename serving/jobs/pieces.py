"""What is done of a job, piece by piece: the input is cut, each piece predicted, and one result made of them."""

from __future__ import annotations

import asyncio
import io
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import BinaryIO, cast

from sqlalchemy.ext.asyncio import AsyncSession

from serving.bulk import formats
from serving.bulk.answers import AnswerForm, as_parquet
from serving.bulk.batch import BEGIN, Batch, Piece, Position
from serving.bulk.lines import BLOCK_BYTES, Splitter
from serving.bulk.reader import Reader
from serving.deploy.fleet import Fleet
from serving.engine.signature import Described
from serving.errors import Conflict, InvalidRequest, ModelNotFound, NotReady
from serving.in_process.codec import PROTOCOL
from serving.jobs import leases
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


@dataclass
class Pieces:
    """Does pieces, with the models of `fleet`; endpoints: those of this process's own code."""

    database: Database
    results: Results
    locations: Locations
    fleet: Fleet
    endpoints: EndpointTable
    rows: Counter[str] = field(default_factory=Counter)
    """Rows that this worker has predicted, by outcome."""
    piece_bytes: int = PIECE_BYTES
    piece_rows: int = PIECE_ROWS

    async def do(self, claimed: Claim) -> None:
        """Do a piece and have it count. Raises LeaseLost, and ServingError: of a kind that passes, or not."""
        await {SPLIT: self._split, SCORE: self._score, PUBLISH: self._publish}[claimed.piece.kind](claimed)

    async def _split(self, claimed: Claim) -> None:
        """Cut the input, and see that it fits the model at all."""
        job, piece = claimed.job, claimed.piece
        described = (await self._endpoint(job)).model.described
        start = Position(piece.start, piece.line)
        async with self._input(job) as source:
            reading = _reader(job, InputFile(source), described)
            await asyncio.to_thread(next, reading.pieces(), None)  # raises where the columns are not the model's
            size = source.size if reading.total is None else reading.total
            cuts = self._cuts(job, source, start) if reading.total is None else self._row_cuts(size, start.offset)
            await self.results.put(_head(job), _form(job, described).head())
            last = False
            while not last:
                some = [start, *await asyncio.to_thread(lambda: list(islice(cuts, _AT_A_TIME)))]
                start, last = some[-1], len(some) <= _AT_A_TIME
                await self.database.run(partial(leases.commit_split, claimed=claimed, cuts=some, size=size, last=last))

    def _cuts(self, job: Job, source: Input, start: Position) -> Iterator[Position]:
        """Cut text where lines end; the last cut is its end."""
        file = InputFile(source)
        file.seek(start.offset)
        block_bytes = min(BLOCK_BYTES, self.piece_bytes)
        here = start
        for block in Splitter(file.read, start, quotes=job.input_format == "csv", block_bytes=block_bytes).blocks():
            here = block.end
            if here.offset - start.offset >= self.piece_bytes or here.line - start.line >= self.piece_rows:
                start = here
                yield here
        if here != start:
            yield here

    def _row_cuts(self, rows: int, start: int) -> Iterator[Position]:
        """Cut so many rows, from `start` on."""
        for row in range(start, rows, self.piece_rows):
            end = min(row + self.piece_rows, rows)
            yield Position(end, end + 1)

    async def _score(self, claimed: Claim) -> None:
        """Predict the rows of a piece."""
        prediction = BulkPrediction(await self._endpoint(claimed.job), (), DEFAULTS)
        errors: list[bytes] = []
        name = partial(part, claimed.job.id, claimed.piece.number, claimed.token)
        async with self._input(claimed.job) as source:
            await self.results.put(name("rows"), _written(claimed, source, prediction, errors))
        if errors:
            await self.results.put(name("errors"), b"".join(errors))
        good, bad = prediction.good, prediction.bad
        await self._commit(partial(leases.commit_scored, claimed=claimed, good=good, bad=bad))
        self.rows.update(good=good, bad=bad)

    async def _publish(self, claimed: Claim) -> None:
        """Make one result of the parts that count: of each piece the one with its last token."""
        job = claimed.job
        pieces = await self.database.run(partial(leases.scored, job_id=job.id))
        parts = [part(job.id, piece.number, piece.token, "rows") for piece in pieces]
        errors = [part(job.id, piece.number, piece.token, "errors") for piece in pieces if piece.bad]
        content = self._joined([_head(job), *parts])
        if job.output_format == "parquet":
            head = b"".join([chunk async for chunk in self.results.read(_head(job))])
            sources = (io.BufferedReader(InputFile(self.results.open(each)), _CHUNK) for each in parts)
            content = _aside(as_parquet(head, sources, job.rows_good, job.rows_bad))
        # The result last: it is what a job that counts as succeeded has for sure.
        await self.results.put(f"{job.id}/errors.ndjson", self._joined(errors))
        path = f"{job.id}/result.{job.output_format}"
        await self.results.put(path, self._while_held(claimed, content))
        size = await self.results.size(path)
        await self._commit(partial(leases.commit_published, claimed=claimed, result_bytes=size))

    async def _joined(self, parts: Sequence[str]) -> AsyncIterator[bytes]:
        """Give the bytes of parts, one behind the other."""
        for each in parts:
            async for chunk in self.results.read(each):
                yield chunk

    async def _while_held(self, claimed: Claim, content: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Give content whose end is reached only if the piece is still this worker's then. Raises LeaseLost."""
        async for chunk in content:
            yield chunk
        await self.database.run(partial(leases.renew, claimed=claimed))

    async def _commit(self, change: Callable[[AsyncSession], Awaitable[None]]) -> None:
        """Note what is done, however long the database is away: it is not done twice for that. Raises LeaseLost."""
        wait = 0.5
        while True:
            try:
                await self.database.run(change)
                return
            except DatabaseAway:
                await asyncio.sleep(wait)
                wait = min(2 * wait, _MOST_WAIT_S)

    @asynccontextmanager
    async def _input(self, job: Job) -> AsyncIterator[Input]:
        """Open what a job reads. Raises Conflict where it is another one than it was."""

        def opened() -> Input:
            return self.results.open(f"{job.id}/input") if job.url is None else self.locations.open(job.url)

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
            return self.endpoints.find(PROTOCOL, job.model, job.version)
        except (ModelNotFound, NotReady) as error:
            store = self.fleet.changes.store
            if not self.fleet.folder_gone and job.version not in await asyncio.to_thread(store.versions, job.model):
                raise InvalidRequest(f"version {job.version} of model {job.model} was deleted meanwhile") from None
            raise NotReady(error.message) from None


async def _written(
    claimed: Claim, source: Input, prediction: BulkPrediction, errors: list[bytes]
) -> AsyncIterator[bytes]:
    """Give a part's bytes, and note bad rows; the next batch is read while the model has the one before."""
    described = prediction.model.described
    form = _form(claimed.job, described)
    batches = _batches(claimed, source, described)
    upcoming = asyncio.ensure_future(asyncio.to_thread(next, batches, None))
    try:
        while (batch := await upcoming) is not None:
            upcoming = asyncio.ensure_future(asyncio.to_thread(next, batches, None))
            for scored in await prediction.run(batch):
                errors += [strict_json.dumps(each._asdict()) + b"\n" for each in scored.bad]
                if len(scored.lines) or scored.bad:
                    yield await asyncio.to_thread(form.written, *scored)
    finally:
        upcoming.cancel()


def part(job_id: str, number: int, token: int, kind: str) -> str:
    """Return where the part of a piece is that was made under a token."""
    return f"{job_id}/parts/{number}.{token}.{kind}"


def _head(job: Job) -> str:
    """Return where that is kept which a result begins with, before its parts."""
    return f"{job.id}/parts/head"


def _form(job: Job, described: Described) -> AnswerForm:
    return formats.answer_form(job.output_format, described)


def _reader(job: Job, file: InputFile, described: Described, start: Position = BEGIN) -> Reader:
    return formats.reader(job.input_format, cast(BinaryIO, file), described, start)


def _batches(claimed: Claim, source: Input, described: Described) -> Iterator[Batch]:
    """Read the rows of a piece."""
    job, piece = claimed.job, claimed.piece
    file = InputFile(source, None if job.input_format == "parquet" else piece.end)
    reading = _reader(job, file, described, Position(piece.start, piece.line))
    for some in reading.pieces():
        beyond = some.end.offset - piece.end
        if beyond > 0:  # a table may go on behind the piece
            some = Piece(some.data[:-beyond], some.line, Position(piece.end, piece.end + 1))  # noqa: PLW2901
        yield from reading.read(some)
        if beyond >= 0:
            return


async def _aside(content: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Have what is made by a thread."""
    while (chunk := await asyncio.to_thread(next, content, None)) is not None:
        yield chunk
