"""`serving publish | check | delete`: a version comes into the folder, could come, or goes."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from serving.commands.export import refuse_pickle
from serving.commands.options import Models, Name, NoWait, StateDir, Version, Why, up_to_date
from serving.commands.output import explained, tell
from serving.commands.traffic import carry_out, made, served, user
from serving.deploy import commands
from serving.deploy.delete import delete as delete_version
from serving.deploy.publish import Published, check_name, serving_now
from serving.deploy.publish import publish as publish_version
from serving.deploy.staging import ModelFile
from serving.errors import InvalidRequest
from serving.gate.findings import Limits
from serving.gate.gate import Gate
from serving.gate.report import GateRefused
from serving.gate.report_table import table
from serving.gate.settings_check import with_settings
from serving.linux.thread_scheduling import lowest_priority
from serving.repository.traffic_store import TrafficStore

ExtensionOps = Annotated[
    bool,
    typer.Option("--extension-ops", envvar="SERVING_EXTENSION_OPS", help="Allow operators of onnxruntime-extensions."),
]


def publish(  # noqa: PLR0917  typer makes options of parameters
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The file; its external data comes along.")],
    name: Annotated[str, typer.Option(help="The model's name.")],
    version: Annotated[str | None, typer.Option(help="A whole number; the next one if left out.")] = None,
    signature: Annotated[
        Path | None, typer.Option(metavar="FILE", exists=True, dir_okay=False, help="JSON to embed as its signature.")
    ] = None,
    note: Annotated[str, typer.Option(help="What is new, for people.", show_default=False)] = "",
    allow_breaking: Annotated[bool, typer.Option("--allow-breaking", help="Callers of what serves may break.")] = False,
    extension_ops: ExtensionOps = False,
    promote: Annotated[bool, typer.Option("--promote", help="Make it the stable version.")] = False,
    canary: Annotated[float | None, typer.Option(metavar="PERCENT", help="Give it this share.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until every running server has taken it.")] = False,
    models: Models = Path("models"),
    state_dir: StateDir = None,
) -> None:
    """Examine a model, and put it into the folder as a new version, whole or not at all.

    It gets no traffic unless --promote or --canary asks for that: the version that answers now goes on to. A model's
    first version answers.
    """
    console = Console(stderr=True, highlight=False)
    refuse_pickle(model)
    with explained():
        try:
            check_name(name)
            if promote and canary is not None:
                raise InvalidRequest("give --promote or --canary, not both")
            if canary is not None:  # before anything is published
                made(commands.StartCanary, version="1", percent=canary)
            models, state_dir = up_to_date(models, state_dir, name, is_made=True)
            embedded = None if signature is None else signature.read_bytes()
            # On a thread behind all others: a large file is read, hashed and written beside workers that answer.
            with ThreadPoolExecutor(1, initializer=lowest_priority) as aside:
                published = aside.submit(
                    publish_version,
                    models,
                    name,
                    model,
                    version=version,
                    signature=embedded,
                    note=note,
                    allow_breaking=allow_breaking,
                    extension_ops=extension_ops,
                    state_dir=state_dir,
                ).result()
            console.print(table(with_settings(published.report, models / name), f"{name} {published.version}"))
            said = "published" if published.new else "is there already, with the same bytes"
            typer.echo(f"{name} version {published.version} {said}{_answers(name, published, asked=promote or canary)}")
            if promote or canary is not None:
                kind = partial(commands.StartCanary, percent=canary or 0.0) if not promote else commands.Promote
                order = made(kind, version=published.version, why=note)
                carry_out(models, state_dir, name, order, no_wait=False)
            elif wait:
                generation = TrafficStore(models, state_dir).read(name).generation
                said = served(models, state_dir, name, generation, "it is published", version=published.version)
                typer.echo(f"{name} version {published.version}: {said}")
        except GateRefused as error:
            console.print(table(error.report, f"{name}: not published"))
            raise typer.Exit(1) from None


def _answers(name: str, published: Published, *, asked: object) -> str:
    if published.answers == published.version:
        return ", and answers"
    return "" if asked else f"; version {published.answers} answers: serving promote {name} {published.version}"


def delete(  # noqa: PLR0917  typer makes options of parameters
    name: Name,
    version: Version,
    why: Why = "",
    models: Models = Path("models"),
    state_dir: StateDir = None,
    no_wait: NoWait = False,
) -> None:
    """Remove a version that is not stable, canary, shadow, labelled or kept by name; servers let it go."""
    with explained():
        models, state_dir = up_to_date(models, state_dir, name)
        after = delete_version(TrafficStore(models, state_dir), name, version, who=user(), why=why)
        done = f"{name}: version {version} is deleted (generation {after.generation}"
        if no_wait:
            typer.echo(f"{done}; not waited for)")
            return
        served(models, state_dir, name, after.generation, f"{done})")
        typer.echo(f"{done}; every server has let it go)")


def check(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="An ONNX file, or the folder of a version.")],
    name: Annotated[str | None, typer.Option(help="Compare with what serves of this model.")] = None,
    extension_ops: ExtensionOps = False,
    models: Models = Path("models"),
) -> None:
    """Examine a model as the server would before it serves it, and change nothing."""
    with explained(undone=2):
        if name is not None:
            check_name(name)
            models, _ = up_to_date(models, None, name)
        current = None if name is None else serving_now(models, name)
        if name is not None and current is None:
            tell(f"serving: there is no model {name} in {models} yet: it is compared with nothing", err=True)
        try:
            with (
                Gate(Limits(extension_ops=extension_ops)) as gate,
                tempfile.TemporaryDirectory(prefix="serving-check-") as temporary,
            ):
                folder = path
                if not path.is_dir():
                    folder = Path(temporary)
                    ModelFile(path).stage(folder)
                report = gate.examine(folder, serving=current)
        except GateRefused as error:
            report = error.report
    home = models / name if name is not None else path.absolute().parent if path.is_dir() else None
    shown = table(report if home is None else with_settings(report, home), str(path))
    Console(highlight=False).print(shown)
    raise typer.Exit(0 if report.ok else 1)
