"""Files cut into pieces, which are answered on several threads or machines, and come in their order."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from serving.bulk.batch import BEGIN, BadRow, Piece, Position
from serving.bulk.formats import Format, reader
from serving.engine.signature import Described
from serving.errors import InvalidRequest, SignatureMismatch

if TYPE_CHECKING:
    from serving.bulk.reader import Reader
    from serving.bulk.scoring import AnsweringModel

Files: TypeAlias = Sequence[tuple[Path | None, Format]]
"""Named, each with its format; `None` for a path is standard input."""


class Scored(NamedTuple):
    """A piece that is done: answers as they are written, rows that are good, rows that are bad.

    file: which of the files; end: where its next piece begins; total: its rows, where positions are rows.
    """

    file: int
    end: Position
    total: int | None
    data: bytes
    good: int
    bad: list[BadRow]


Engine: TypeAlias = Callable[[Files, "AnsweringModel", int, Position], Generator[Scored]]
"""Answers the files' rows from a position of one of them on, and gives the pieces in order.

Raises InvalidRequest for what can't be read. Closing it ends what runs.
"""


def cut(files: Files, described: Described, file: int, at: Position) -> Iterator[tuple[int, Reader, Piece]]:
    """Cut files into pieces, from a position of one of them on. Raises InvalidRequest for what can't be read."""
    for index in range(file, len(files)):
        path, kind = files[index]
        with nullcontext(sys.stdin.buffer) if path is None else path.open("rb") as source:
            reading = reader(kind, source, described, at if index == file else BEGIN)
            try:
                for piece in reading.pieces():
                    yield index, reading, piece
            except (InvalidRequest, SignatureMismatch) as error:
                told = "; ".join(f"{detail.path[1:]} {detail.message}" for detail in error.details)
                raise InvalidRequest(f"{path or 'standard input'}: {told or error.message}") from None


def score(index: int, reading: Reader, piece: Piece, total: int | None, model: AnsweringModel) -> Scored:
    """Read and answer a piece of a file; on any thread."""
    data = b""
    good, bad = 0, []
    for batch in reading.read(piece):
        found = list(model.answer(batch.inputs, batch.lines)) if batch.inputs is not None else []
        answered = [each for each in found if not isinstance(each, BadRow)]
        wrong = [*batch.bad, *(each for each in found if isinstance(each, BadRow))]
        data += model.form.together(answered, wrong) if answered or wrong else b""
        good += sum(len(lines) for _, lines in answered)
        bad += wrong
    return Scored(index, piece.end, total, data, good, sorted(bad))


def threads(workers: int) -> Engine:
    """Have so many threads of this process do it."""

    def engine(files: Files, model: AnsweringModel, file: int, at: Position) -> Generator[Scored]:
        pool = ThreadPoolExecutor(workers)
        waiting: deque[Future[Scored]] = deque()
        try:
            for index, reading, piece in cut(files, model.described, file, at):
                waiting.append(pool.submit(score, index, reading, piece, reading.total, model))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    return engine
