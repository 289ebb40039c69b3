"""Whole files of rows: read, answered and written in their order; what was ended amid goes on later."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeAlias

import pyarrow as pa
from pydantic import BaseModel

from serving.bulk.answers import AnswerForm, as_parquet
from serving.bulk.batch import BEGIN, BadRow, Lines, Position
from serving.bulk.formats import Format, answer_form
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

Answered: TypeAlias = tuple[Any, Lines] | BadRow
"""Good rows as `AnswerForm.rows` makes them, with their numbers; or a row that the model refuses."""
Answer: TypeAlias = Callable[[Tensors, Lines], Iterator[Answered]]
"""Answers rows, in order; called from several threads."""


def locally(run: Callable[[Tensors], Tensors], described: Described, rows: Callable[[Tensors], Any]) -> Answer:
    """Answer by a session in this process; rows that may see each other run one by one.

    rows: makes of the outputs of good rows what is answered for them.
    """
    alone = described.signature.batch == "one" or not described.together

    def answer(inputs: Tensors, lines: Lines) -> Iterator[Answered]:
        try:
            if len(lines) == 1 or not alone:
                yield rows(run(inputs)), lines
                return
        except InferenceFailed as error:
            if len(lines) == 1:
                yield BadRow(int(lines[0]), "", error.message)
                return
        half = len(lines) // 2
        yield from answer(tuple([array[:half] for array in inputs]), lines[:half])
        yield from answer(tuple([array[half:] for array in inputs]), lines[half:])

    return answer


class Progress(BaseModel):
    """How far it has come. file, at: where reading goes on. written, told: bytes of answers and of bad rows."""

    task: dict[str, Any]
    """What tells this task from another."""
    file: int = 0
    at: Position = BEGIN
    written: int = 0
    told: int = 0
    good: int = 0
    bad: int = 0
    shown: list[tuple[str, BadRow]] = []
    """The first bad rows, with the names of their files."""

    @property
    def rows(self) -> int:
        """Rows that are done."""
        return self.good + self.bad


class AnsweringModel(NamedTuple):
    """A model as a task asks it; `identity` tells it from others, and from other versions of it.

    kind: of the answers, which `form` makes. path: its file, where it is this process that has loaded it.
    """

    described: Described
    answer: Answer
    kind: Format
    form: AnswerForm
    identity: str
    path: Path | None = None


def loaded(path: Path, name: str, kind: Format, *, together: bool) -> AnsweringModel:
    """Load a version's file into this process. together: its rows were proved independent. Raises ModelInvalid."""
    # A thread of ours has a run of its own: several at a time take less than one that is divided.
    session = load(path, limits=Limits(threads=1, exact_threads=True))
    described = Described(name, path.parent.name, session.signature, together)
    form = answer_form(kind, described)
    stamp = path.stat()
    identity = f"{path.absolute()} {stamp.st_size} {stamp.st_mtime_ns}"
    return AnsweringModel(described, locally(session.run, described, form.rows), kind, form, identity, path)


class TooManyBad(Exception):
    """More rows are bad than may be."""


@dataclass
class Scoring:
    """One task: some files, the model's answers to their rows, and one file of these.

    out: None for standard output, which is `sink`. errors: where bad rows are told. max_bad: bad rows beyond which it
    ends. engine: who answers.
    """

    files: Files
    model: AnsweringModel
    out: Path | None
    sink: BinaryIO
    _: KW_ONLY
    errors: Path | None
    max_bad: int | None
    engine: Engine

    def __post_init__(self) -> None:
        inputs = [(path, path.stat()) for path, _ in self.files if path]
        self._sizes = [facts.st_size for _, facts in inputs]
        task = {
            "inputs": [[str(path.absolute()), facts.st_size, facts.st_mtime_ns] for path, facts in inputs],
            "identity": self.model.identity,
            "form": self.model.kind,
            "errors": str(self.errors and self.errors.absolute()),
        }
        self.resumable = self.out is not None and all(path is not None for path, _ in self.files)
        """Whether the same task, run again, goes on: a pipe can't be read, or written, from its middle."""
        self.progress = Progress(task=task)
        self._whole: int | None = None  # of the file at hand, as `Scored.total`
        self._saved = 0.0

    def resume(self) -> bool:
        """Take up what was done of the same task before; tell whether something was."""
        if self.out is None or not self.resumable:
            return False
        try:
            noted = Progress.model_validate_json(_beside(self.out, "progress").read_bytes())
        except (OSError, ValueError):
            return False
        if noted.task != self.progress.task or _size(_beside(self.out, "part")) < noted.written:
            return False
        if self.errors is not None and _size(_beside(self.errors, "part")) < noted.told:
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
                self.progress.written += out.write(self.model.form.head())
            scored = stack.enter_context(
                closing(self.engine(self.files, self.model, self.progress.file, self.progress.at))
            )
            try:
                for piece in scored:
                    self._take(piece, out, errors)
                    tell(self._share())
            finally:
                self._save(out, errors)
            self._finish()

    def _opened(self, stack: ExitStack) -> tuple[BinaryIO, BinaryIO]:
        out: BinaryIO = self.sink
        if self.out is not None:
            out = stack.enter_context(_cut(_beside(self.out, "part"), self.progress.written))
        if self.errors is None:
            return out, stack.enter_context(Path(os.devnull).open("wb"))
        return out, stack.enter_context(_cut(_beside(self.errors, "part"), self.progress.told))

    def _take(self, done: Scored, out: BinaryIO, errors: BinaryIO) -> None:
        progress, self._whole = self.progress, done.total
        name = os.fsencode(self.files[done.file][0] or "-").decode(errors="replace")
        told = b"".join([dumps({"file": name, **bad._asdict()}) + b"\n" for bad in done.bad])
        out.write(done.data)
        errors.write(told)
        # At once: whatever interrupts this, what is noted goes together.
        self.progress = Progress(
            task=progress.task,
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
        if self.max_bad is not None and self.progress.bad > self.max_bad:
            raise TooManyBad(f"more than {self.max_bad} rows are bad, and {self.out or 'the rest'} is not written")

    def _save(self, out: BinaryIO, errors: BinaryIO) -> None:
        # Before the note: it counts bytes that must be there. A loss of power may still take some, so `resume` looks.
        out.flush()
        errors.flush()
        if self.out is not None and self.resumable and self.progress.at != BEGIN:
            write_whole(_beside(self.out, "progress"), self.progress.model_dump_json().encode())
        self._saved = time.monotonic()

    def _share(self) -> float:
        """Return how much of the files' bytes is done, 0 to 1."""
        if not self.resumable:
            return 0.0
        sizes, file, at = self._sizes, self.progress.file, self.progress.at
        share = min(1.0, at.offset / max(1, self._whole or sizes[file]))
        return (sum(sizes[:file]) + sizes[file] * share) / max(1, sum(sizes))

    def _finish(self) -> None:
        if self.errors is not None:
            _beside(self.errors, "part").replace(self.errors)
        good, bad, form = self.progress.good, self.progress.bad, self.model.form
        tail = form.tail(good, bad) if self.model.kind == "arrow" else b""  # other files are of rows alone
        if self.out is None:
            self.sink.write(tail)
            self.sink.flush()
            return
        part = _beside(self.out, "part")
        with part.open("ab") as file:
            file.write(tail)
        if self.model.kind == "parquet":
            stream, part = part, _beside(self.out, "part.parquet")
            with pa.memory_map(str(stream)) as given, part.open("wb") as file:
                file.writelines(as_parquet(form.head(), [given], good, bad))
            stream.unlink()
        part.replace(self.out)
        _beside(self.out, "progress").unlink(missing_ok=True)


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}")


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
