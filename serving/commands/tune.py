"""`serving tune`: measures how a model runs best on this machine, and writes that into its settings."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from serving.commands.options import Models, Name, StateDir, up_to_date
from serving.commands.output import explained, show
from serving.deploy.publish import serving_now
from serving.engine.batching import Batching
from serving.errors import InvalidRequest, ModelNotFound
from serving.gate import gate
from serving.linux.files import write_whole
from serving.linux.limits import cores
from serving.repository import model_settings
from serving.repository.manifest import MODEL_FILE
from serving.repository.model_settings import SETTINGS_FILE
from serving.repository.remote_traffic import RemoteTraffic
from serving.repository.state_directory import state_folder

if TYPE_CHECKING:  # onnxruntime is for those who measure
    from serving.engine.tuning import Load, Trial

_BAR = 14
EXTRA = "`pip install 'serving[tune]'`"


def tune(  # noqa: PLR0917  typer makes options of parameters
    name: Name,
    p99_ms: Annotated[
        float | None, typer.Option("--p99-ms", min=0.001, help="Write the fastest that keeps it into model.toml.")
    ] = None,
    version: Annotated[str | None, typer.Option(help="One of its versions [default: the one that answers].")] = None,
    callers: Annotated[int, typer.Option(min=1, max=10_000, help="Who ask at the same time.")] = 32,
    rows: Annotated[int, typer.Option(min=1, max=100_000, help="Rows of a request.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.05, help="Of each trial.")] = 1.0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw throughput against p99.")] = None,
    models: Models = Path("models"),
    state_dir: StateDir = None,
) -> None:
    """Try threads, instances and batch with the model's own example; show which is fastest, and keep that.

    It asks the engine itself, in this process: decoding and HTTP are not in it. Let nothing else run here meanwhile.
    """
    with explained():
        from serving.engine.tuning import Load, best  # noqa: PLC0415  loads onnxruntime

        if p99_ms is not None:
            _library("tomlkit")  # before minutes are spent
        if plot is not None:
            _library("matplotlib")
        models, state_dir = up_to_date(models, state_dir, name)
        found = _measured(name, *version_of(models, state_dir, name, version), Load(callers, rows, seconds))
        chosen = best(found, p99_ms / 1e3 if p99_ms is not None else math.inf)
        _show(name, found, chosen)
        if plot is not None:
            _draw(name, found, p99_ms, plot)
        if p99_ms is not None:
            if chosen is None:
                least = min(trial.p99_s for trial in found)
                raise InvalidRequest(f"no setting keeps a p99 of {p99_ms:g} ms: the shortest is {least * 1e3:.3g} ms")
            _write(models / name / SETTINGS_FILE, chosen)
            if (remote := RemoteTraffic.of(models)) is not None:
                remote.bucket.upload(f"{name}/{SETTINGS_FILE}", models / name / SETTINGS_FILE)
            typer.echo(f"{name}: {SETTINGS_FILE} says so now, and running servers follow")


def version_of(models: Path, state_dir: Path | None, name: str, version: str | None) -> tuple[Path, Batching]:
    """Return a version's file, and how its requests run. Raises ServingError."""
    folder = serving_now(models, name, state_dir) if version is None else models / name / version
    if folder is None or not (folder / MODEL_FILE).is_file():
        raise ModelNotFound(f"there is no version {version} of {name}" if version else f"there is no model {name}")
    state = state_folder(models, state_dir)
    report = gate.report(state, folder)
    if report is None:
        with gate.Gate() as examiner:
            report = examiner.examine(folder)
        gate.keep(state, report)
    if report.independence is None:
        raise InvalidRequest(f"the gate refuses {name} {folder.name}: {'; '.join(report.reasons)}")
    return folder / MODEL_FILE, model_settings.read(models / name).decide(report.independence)


def _measured(name: str, path: Path, batching: Batching, load: Load) -> list[Trial]:
    """Try every setting on one version. Raises ServingError."""
    from serving.engine import tuning  # noqa: PLC0415  loads onnxruntime

    if not batching.together:
        typer.echo(f"{name} {path.parent.name}: requests run alone: {batching.reason}", err=True)
    count = len(list(tuning.settings(cores(), load, together=batching.together)))
    trials = tuning.trials(path, batching, load, cores())
    console = Console(stderr=True)
    return list(track(trials, f"{name} {path.parent.name}", total=count, console=console, transient=True))


def _show(name: str, found: list[Trial], chosen: Trial | None) -> None:
    most = max(trial.rows_per_s for trial in found)
    numbers = ("threads", "instances", "batch", "rows/s", "p50 ms", "p99 ms")
    rows = [
        (
            str(trial.threads),
            str(trial.instances),
            str(trial.max_batch_rows),
            f"{trial.rows_per_s:,.0f}",
            f"{trial.p50_s * 1e3:.3g}",
            f"{trial.p99_s * 1e3:.3g}",
            "\u2588" * max(1, round(_BAR * trial.rows_per_s / most)) + (" best" if trial == chosen else ""),
        )
        for trial in found
    ]
    styles = ["bold" if trial == chosen else None for trial in found]
    title = f"{name}: the engine alone, in one process"
    show((*numbers, ""), rows, title=title, numbers=numbers, whole=("",), styles=styles)


def _draw(name: str, found: list[Trial], p99_ms: float | None, to: Path) -> None:
    """Draw throughput against p99, a line for each way to use the cores, a point for each batch. Raises OSError."""
    figures = _library("matplotlib.figure")
    figure = figures.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="p99, ms", ylabel="rows/s", title=name, xscale="log")
    for threads, instances in dict.fromkeys((trial.threads, trial.instances) for trial in found):
        line = [trial for trial in found if (trial.threads, trial.instances) == (threads, instances)]
        x, y = [trial.p99_s * 1e3 for trial in line], [trial.rows_per_s for trial in line]
        axes.plot(x, y, marker="o", label=f"{threads} threads, {instances} instances")
        for trial, at in zip(line, zip(x, y, strict=True), strict=True):
            axes.annotate(str(trial.max_batch_rows), at, xytext=(4, 4), textcoords="offset points", fontsize=8)
    if p99_ms is not None:
        axes.axvline(p99_ms, linestyle="--", color="gray", label="bound")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(to, dpi=120)


def _write(file: Path, chosen: Trial) -> None:
    """Put what was chosen into model.toml, where all else stays as it is, comments too. Raises InvalidRequest."""
    tomlkit = _library("tomlkit")
    document = tomlkit.parse(file.read_text()) if file.exists() else tomlkit.document()
    for table, name, value in (
        ("batching", "max_batch_rows", chosen.max_batch_rows),
        ("execution", "threads", chosen.threads),
        ("execution", "instances", chosen.instances),
    ):
        document.setdefault(table, tomlkit.table())[name] = value
    text = tomlkit.dumps(document)
    model_settings.parse(text)
    write_whole(file, text.encode())


def _library(name: str) -> Any:
    """Import what only this command needs. Raises InvalidRequest, which says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InvalidRequest(f"this needs {name.partition('.')[0]}: {EXTRA}") from None
