"""`serving score`: a model's answers to files of rows, computed here on all cores, or by a running server."""

from __future__ import annotations

import glob
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from serving.bulk.formats import SUFFIXES, Format, answer_form, check_installed
from serving.commands.options import ApiKey, Models, StateDir, up_to_date
from serving.commands.output import explained
from serving.commands.tune import version_of
from serving.errors import InvalidRequest, ServingError
from serving.linux.limits import cores
from serving.logs import visible

if TYPE_CHECKING:  # onnxruntime and pyarrow are for those who score
    from serving.bulk.pieces import Engine
    from serving.bulk.scoring import AnsweringModel, Scoring

SOME_BAD, INTERRUPTED = 3, 130
"""Exit statuses, beside 1 for what could not be done and 2 for a bad request."""
_LINE_S = 5.0
"""Seconds between two lines of progress, where there is no terminal."""


def score(  # noqa: PLR0917  typer makes options of parameters
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="CSV, NDJSON, Parquet; patterns; - for stdin.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The model.")],
    out: Annotated[str, typer.Option("--out", "-o", help="File of the answers; - for standard output.")] = "-",
    version: Annotated[str | None, typer.Option(help="One of its versions [default: the one that answers].")] = None,
    url: Annotated[str | None, typer.Option(help="A server that computes; the key is $SERVING_API_KEY.")] = None,
    kind: Annotated[Format | None, typer.Option("--format", help="Of the files, where their names do not say.")] = None,
    out_kind: Annotated[Format | None, typer.Option("--out-format", help="Of the answers, likewise.")] = None,
    errors: Annotated[Path | None, typer.Option(help="File for the bad rows, a line of JSON each.")] = None,
    max_bad: Annotated[int | None, typer.Option(min=0, help="End where more rows than this are bad.")] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Threads here, or actors of a Ray cluster.")
    ] = "local",
    workers: Annotated[int | None, typer.Option(min=1, help="How many of these at most [default: one a core].")] = None,
    models: Models = Path("models"),
    state_dir: StateDir = None,
    api_key: ApiKey = None,
) -> None:
    """Answer every row of some files, in their order, into one file.

    What is interrupted goes on where it was, once the same command is run again. Exit status: 0 where all rows are
    answered, 3 where some are bad, 1 where it could not be done, 2 for bad input, 130 where it was interrupted.
    """
    with explained():
        check_installed()
        from serving.bulk.pieces import threads  # noqa: PLC0415  50 MB
        from serving.bulk.scoring import Scoring  # noqa: PLC0415

        inputs = _inputs(files, kind)
        to = None if out == "-" else Path(out)
        form = _format(out, out_kind or ("ndjson" if to is None else None), "--out-format")
        if to is None and form == "parquet":
            raise InvalidRequest("--out-format: Parquet needs a file, by --out")
        taken = {path.resolve() for path, _ in inputs if path is not None}
        for option, written in (("--out", to), ("--errors", errors)):
            if written is not None and (written.is_dir() or written.resolve() in taken):
                raise InvalidRequest(f"{option}: {written} is a folder, or one of the other files")
            taken |= {written.resolve()} if written is not None else set()
        who: Engine = threads(workers or cores())
        if engine == "ray":
            if url or any(path is None for path, _ in inputs):
                raise InvalidRequest(
                    "--engine: Ray reads files that have names, and loads the model itself, without --url"
                )
            from serving.scale.actors import actors  # noqa: PLC0415  Ray is an extra

            who = actors(workers)
        with (
            _by_server(url, api_key, model, version, form)
            if url
            else nullcontext(_here(models, state_dir, model, version, form)) as answering
        ):
            _run(Scoring(inputs, answering, to, sys.stdout.buffer, errors=errors, max_bad=max_bad, engine=who))


def _run(scoring: Scoring) -> None:
    """Do a task, and tell of it. Raises InvalidRequest."""
    from serving.bulk.scoring import TooManyBad  # noqa: PLC0415  50 MB

    console = Console(stderr=True, highlight=False, markup=False)
    if scoring.resume():
        console.print(f"goes on behind {scoring.progress.rows:,} rows")
    began, before = time.monotonic(), scoring.progress.rows
    try:
        with _shown(console, scoring) as tell:
            scoring.run(tell)
    except KeyboardInterrupt:
        later = "; the same command goes on from there" if scoring.resumable else ""
        console.print(f"{_rows(scoring)}: interrupted{later}")
        raise typer.Exit(INTERRUPTED) from None
    except TooManyBad as error:
        _say_bad(console, scoring)
        console.print(f"ended: {error}")
        raise typer.Exit(1) from None
    except OSError as error:
        # What can't be opened has a name; what can't be written any more has none, and is no fault of the request.
        kind = InvalidRequest if error.filename else ServingError
        raise kind(f"{error.filename or 'the answers'}: {(error.strerror or '').lower()}") from None
    seconds = max(1e-6, time.monotonic() - began)
    console.print(f"{_rows(scoring)} in {seconds:.1f} s ({(scoring.progress.rows - before) / seconds:,.0f} rows/s)")
    if scoring.progress.bad:
        _say_bad(console, scoring)
        raise typer.Exit(SOME_BAD)


def _inputs(files: Sequence[str], kind: Format | None) -> list[tuple[Path | None, Format]]:
    """Find the files. Raises InvalidRequest."""
    found: list[tuple[Path | None, Format]] = []
    for name in files:
        if name == "-":
            found.append((None, _format(name, kind or "ndjson", "--format")))
            continue
        names = (
            [name] if Path(name).is_file() else sorted(n for n in glob.glob(name, recursive=True) if Path(n).is_file())
        )
        if not names:
            raise InvalidRequest(f"{name}: there is no such file")
        found += [(Path(each), _format(each, kind, "--format")) for each in names]
    if any(path is None and form == "parquet" for path, form in found):
        raise InvalidRequest("--format: Parquet is read from its end, and not from standard input")
    return found


def _format(name: str, asked: Format | None, option: str) -> Format:
    suffix = Path(name).suffix.lower()
    if asked is None and suffix not in SUFFIXES:
        raise InvalidRequest(f"{name}: what it is can't be told from its name: give {option}")
    return asked or SUFFIXES[suffix]


def _here(models: Path, state_dir: Path | None, name: str, version: str | None, kind: Format) -> AnsweringModel:
    """Load a version into this process. Raises ServingError."""
    from serving.bulk.scoring import loaded  # noqa: PLC0415  50 MB

    path, batching = version_of(*up_to_date(models, state_dir, name), name, version)
    return loaded(path, name, kind, together=batching.together)


@contextmanager
def _by_server(url: str, api_key: str | None, name: str, version: str | None, kind: Format) -> Iterator[AnsweringModel]:
    """Have a server answer. Raises ServingError."""
    from serving.bulk.remote import Remote  # noqa: PLC0415  50 MB
    from serving.bulk.scoring import AnsweringModel  # noqa: PLC0415

    with closing(Remote(url, api_key, name, version)) as remote:
        described = remote.describe()
        identity = f"{url} {name} {described.version}"
        yield AnsweringModel(described, remote.answering(described, kind), kind, answer_form(kind, described), identity)


def _rows(scoring: Scoring) -> str:
    progress = scoring.progress
    return f"{progress.good:,} rows answered" + (f", {progress.bad:,} bad" if progress.bad else "")


def _say_bad(console: Console, scoring: Scoring) -> None:
    progress = scoring.progress
    for name, bad in progress.shown:
        console.print(visible(f"  {name}, line {bad.line}: {bad.path or 'the row'}: {bad.message}"), soft_wrap=True)
    if progress.bad > len(progress.shown):
        console.print(f"  and {progress.bad - len(progress.shown):,} more")


@contextmanager
def _shown(console: Console, scoring: Scoring) -> Iterator[Callable[[float], None]]:
    """Show how far it is: a bar on a terminal, else a line every few seconds."""
    began = last = time.monotonic()
    before = scoring.progress.rows
    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)

        def tell(share: float) -> None:
            nonlocal last
            now = time.monotonic()
            said = f"{_rows(scoring)}, {(scoring.progress.rows - before) / max(1e-6, now - began):,.0f} rows/s"
            bar.update(task, completed=share, description=said)
            if not console.is_terminal and now - last >= _LINE_S:
                last = now
                left = bar.tasks[task].time_remaining
                console.print(said + ("" if left is None else f", {share:.0%}, {left:.0f} s left"))

        yield tell
