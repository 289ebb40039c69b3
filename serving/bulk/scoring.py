"""Whole files of rows: read, answered and written in their order; what was ended amid goes on later."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeAlias

import pyarrow as pa
from pyarrow import ipc, parquet

from serving.bulk.answers import GROUP_ROWS, AnswerColumns, AnswerLines, csv_bytes
from serving.bulk.batch import BEGIN, BadRow, Lines, Position
from serving.bulk.formats import Format
from serving.engine.limits import Limits
from serving.engine.model import load
from serving.engine.signature import Described
from serving.errors import InferenceFailed, InvalidRequest
from serving.linux.files import try_lock, write_whole
from serving.protocols.strict_json import dumps
from serving.tensors import Tensors

if TYPE_CHECKING:
    from serving.bulk.pieces import Engine, Files, Scored

SAVE_S = 1.0
"""Seconds between two notes of how far it has come."""
SHOWN = 5
"""Bad rows that are kept to be shown."""
_END = b"\xff\xff\xff\xff\0\0\0\0"
"""Of an Arrow stream."""

Answered: TypeAlias = tuple[Any, Lines] | BadRow
"""Good rows as `AnswerForm.rows` makes them, with their numbers; or a row that the model refuses."""
Answer: TypeAlias = Callable[[Tensors, Lines], Iterator[Answered]]
"""Answers rows, in order; called from several threads."""


def locally(run: Callable[[Tensors], Tensors], described: Described, form: AnswerForm) -> Answer:
    """Answer by a session in this process; rows that may see each other run one by one."""
    alone = described.signature.batch == "one" or not described.together

    def answer(inputs: Tensors, lines: Lines) -> Iterator[Answered]:
        try:
            if len(lines) == 1 or not alone:
                yield form.rows(run(inputs)), lines
                return
        except InferenceFailed as error:
            if len(lines) == 1:
                yield BadRow(int(lines[0]), "", error.message)
                return
        half = len(lines) // 2
        yield from answer(tuple([array[:half] for array in inputs]), lines[:half])
        yield from answer(tuple([array[half:] for array in inputs]), lines[half:])

    return answer


class AnswerForm:
    """How answers lie in a file: bytes that can be made on any thread, and are put behind each other."""

    def __init__(self, kind: Format, described: Described) -> None:
        self.kind = kind
        self._answers = AnswerLines(described) if kind == "ndjson" else AnswerColumns(described.signature)
        self.rows: Callable[[Tensors], Any] = self._answers.rows

    def head(self) -> bytes:
        """Write what comes before all rows."""
        if self.kind == "ndjson":
            return b""
        assert isinstance(self._answers, AnswerColumns)  # noqa: S101
        empty = self._answers.together((), ())
        return csv_bytes(empty, header=True) if self.kind == "csv" else bytes(empty.schema.serialize())

    def together(self, good: Sequence[tuple[Any, Lines]], bad: Sequence[BadRow]) -> bytes:
        """Write rows in the order of their numbers; of Parquet, as Arrow has them."""
        made: Any = self._answers.together(good, bad)
        if self.kind == "ndjson":
            return bytes(made)
        return csv_bytes(made, header=False) if self.kind == "csv" else bytes(made.serialize())

    def tail(self) -> bytes:
        """Write what comes after all rows."""
        return _END if self.kind in ("arrow", "parquet") else b""

    def finish(self, part: Path, to: Path) -> None:
        """Put all that was written into place."""
        with part.open("ab") as file:
            file.write(self.tail())
        if self.kind == "parquet":
            made = part.with_name(part.name + ".parquet")
            with ipc.open_stream(pa.memory_map(str(part))) as stream, parquet.ParquetWriter(made, stream.schema) as out:
                for tables in _groups(stream):
                    out.write_table(pa.Table.from_batches(tables))
            part.unlink()
            part = made
        part.replace(to)


def _groups(stream: Any) -> Iterator[list[Any]]:
    held: list[Any] = []
    rows = 0
    for table in stream:
        held.append(table)
        rows += len(table)
        if rows >= GROUP_ROWS:
            yield held
            held, rows = [], 0
    if held:
        yield held


@dataclass
class Progress:
    """How far it has come. file, at: where reading goes on. written, told: bytes of answers and of bad rows."""

    task: dict[str, Any]
    """What tells this task from another."""
    file: int = 0
    at: Position = BEGIN
    written: int = 0
    told: int = 0
    good: int = 0
    bad: int = 0
    shown: list[tuple[str, BadRow]] = field(default_factory=list)
    """The first bad rows, with the names of their files."""

    @property
    def rows(self) -> int:
        """Rows that are done."""
        return self.good + self.bad

    @classmethod
    def read(cls, path: Path, task: dict[str, Any]) -> Progress | None:
        """Return what was noted of the same task; None where there is nothing."""
        try:
            noted = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return None
        if noted.get("task") != json.loads(json.dumps(task)):
            return None
        shown = [(name, BadRow(*bad)) for name, bad in noted["shown"]]
        return cls(**noted | {"at": Position(*noted["at"]), "shown": shown})


class AnsweringModel(NamedTuple):
    """A model as a task asks it; `identity` tells it from others, and from other versions of it.

    path: its file, where it is this process that has loaded it.
    """

    described: Described
    answer: Answer
    form: AnswerForm
    identity: str
    path: Path | None = None


def loaded(path: Path, name: str, kind: Format, *, together: bool) -> AnsweringModel:
    """Load a version's file into this process. together: its rows were proved independent. Raises ModelInvalid."""
    # A thread of ours has a run of its own: several at a time take less than one that is divided.
    session = load(path, limits=Limits(threads=1, exact_threads=True))
    described = Described(name, path.parent.name, session.signature, together)
    form = AnswerForm(kind, described)
    stamp = path.stat()
    identity = f"{path.absolute()} {stamp.st_size} {stamp.st_mtime_ns}"
    return AnsweringModel(described, locally(session.run, described, form), form, identity, path)


class TooManyBad(Exception):
    """More rows are bad than may be."""


class Scoring:
    """One task: some files, the model's answers to their rows, and one file of these.

    out: None for standard output, which is `sink`. errors: where bad rows are told. max_bad: bad rows beyond which it
    ends. engine: who answers.
    """

    def __init__(
        self,
        files: Files,
        model: AnsweringModel,
        out: Path | None,
        sink: BinaryIO,
        *,
        errors: Path | None,
        max_bad: int | None,
        engine: Engine,
    ) -> None:
        self._files = files
        self._model = model
        self._form = model.form
        self._out = out
        self._sink = sink
        self._errors = errors
        self._max_bad = max_bad
        self._engine = engine
        inputs = [[str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns] for path, _ in files if path]
        self._task: dict[str, Any] = {
            "inputs": inputs,
            "identity": model.identity,
            "form": self._form.kind,
            "errors": str(errors and errors.absolute()),
        }
        self.resumable = out is not None and all(path is not None for path, _ in files)
        """Whether the same task, run again, goes on: a pipe can't be read, or written, from its middle."""
        self.progress = Progress(self._task)
        self._totals: dict[int, int | None] = {}
        self._saved = 0.0

    def _beside(self, path: Path, what: str) -> Path:
        return path.with_name(f".{path.name}.{what}")

    def resume(self) -> bool:
        """Take up what was done of the same task before; tell whether something was."""
        if self._out is None or not self.resumable:
            return False
        noted = Progress.read(self._beside(self._out, "progress"), self._task)
        if noted is None or _size(self._beside(self._out, "part")) < noted.written:
            return False
        if self._errors is not None and _size(self._beside(self._errors, "part")) < noted.told:
            return False
        self.progress = noted
        return True

    def run(self, tell: Callable[[float], None]) -> None:
        """Do it; `tell` is called now and then with the share of the bytes that is done.

        Raises SignatureMismatch, InvalidRequest, TooManyBad, OSError. Whatever ends it, a task with files goes on where
        it was once it is run again.
        """
        self._check_bad()
        with ExitStack() as stack:
            out, errors = self._opened(stack)
            if not self.progress.written:
                self.progress.written += out.write(self._form.head())
            scored = stack.enter_context(
                closing(self._engine(self._files, self._model, self.progress.file, self.progress.at))
            )
            try:
                for piece in scored:
                    self._take(piece, out, errors)
                    tell(self._share())
            finally:
                self._save(out, errors)
            self._finish()

    def _opened(self, stack: ExitStack) -> tuple[BinaryIO, BinaryIO | None]:
        out: BinaryIO = self._sink
        if self._out is not None:
            out = stack.enter_context(_cut(self._beside(self._out, "part"), self.progress.written))
        errors = None
        if self._errors is not None:
            errors = stack.enter_context(_cut(self._beside(self._errors, "part"), self.progress.told))
        return out, errors

    def _take(self, done: Scored, out: BinaryIO, errors: BinaryIO | None) -> None:
        progress = self.progress
        name = os.fsencode(self._files[done.file][0] or "-").decode(errors="replace")
        self._totals[done.file] = done.total
        told = b"".join([dumps({"file": name, **bad._asdict()}) + b"\n" for bad in done.bad])
        out.write(done.data)
        if errors is not None:
            errors.write(told)
        # At once: whatever interrupts this, what is noted goes together.
        progress = self.progress = replace(
            progress,
            file=done.file,
            at=done.end,
            written=progress.written + len(done.data),
            told=progress.told + len(told),
            good=progress.good + done.good,
            bad=progress.bad + len(done.bad),
            shown=[*progress.shown, *((name, bad) for bad in done.bad[: SHOWN - len(progress.shown)])],
        )
        self._check_bad()
        if time.monotonic() - self._saved > SAVE_S:
            self._save(out, errors)

    def _check_bad(self) -> None:
        if self._max_bad is not None and self.progress.bad > self._max_bad:
            raise TooManyBad(f"more than {self._max_bad} rows are bad, and {self._out or 'the rest'} is not written")

    def _save(self, out: BinaryIO, errors: BinaryIO | None) -> None:
        out.flush()
        if errors is not None:
            errors.flush()
        if self._out is not None and self.resumable and self.progress.at != BEGIN:
            write_whole(self._beside(self._out, "progress"), json.dumps(asdict(self.progress)).encode())
        self._saved = time.monotonic()

    def _share(self) -> float:
        """Return how much of the files' bytes is done, 0 to 1."""
        if not self.resumable:
            return 0.0
        sizes: list[int] = [size for _, size, _ in self._task["inputs"]]
        file, at = self.progress.file, self.progress.at
        whole = self._totals.get(file) or sizes[file]
        return (sum(sizes[:file]) + sizes[file] * min(1.0, at.offset / max(1, whole))) / max(1, sum(sizes))

    def _finish(self) -> None:
        if self._errors is not None:
            self._beside(self._errors, "part").replace(self._errors)
        if self._out is None:
            self._sink.write(self._form.tail())
            self._sink.flush()
            return
        self._form.finish(self._beside(self._out, "part"), self._out)
        self._beside(self._out, "progress").unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _cut(path: Path, size: int) -> BinaryIO:
    """Open a file to be written behind its first bytes, by nobody else. Raises InvalidRequest."""
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
    alone = True
    with suppress(OSError):  # not all file systems have locks
        alone = try_lock(file.fileno())
    if not alone:
        file.close()
        raise InvalidRequest(f"{path}: another run writes it now")
    file.truncate(size)
    file.seek(size)
    return file
