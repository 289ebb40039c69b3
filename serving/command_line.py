"""The `serving` command: its subcommands, and the one that serves."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from pydantic import ValidationError
from pydantic_core import PydanticUndefined
from rich.console import Console

from serving.commands import (
    dashboards,
    drift,
    export,
    keys,
    manifests,
    predict,
    ray,
    replay,
    score,
    status,
    traffic,
    tune,
    versions,
)
from serving.documented import descriptions
from serving.server import CannotStart, serve
from serving.settings import Settings, read
from serving.supervisor import CannotReload

app = typer.Typer(
    help="Serve a folder of ONNX models.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"serving {metadata.version('serving')}")
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Serve a folder of ONNX models."""


def _flags() -> list[inspect.Parameter]:
    """Make a flag of each setting: same name, help and type, and no default, so that the environment shows through."""
    flags, told = [], descriptions(Settings)
    for name, kind in get_type_hints(Settings).items():
        field = Settings.model_fields.get(name)
        if field is None:
            continue
        flag = f"--{name.replace('_', '-')}"
        default = "" if field.default in (PydanticUndefined, ()) else f" [default: {field.default}]"
        option = typer.Option(
            f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
            help=f"{told[name]}{default} (SERVING_{name.upper()})",
            show_default=False,
        )
        kind = kind if kind in (bool, int, float, Path) else str  # noqa: PLW2901
        flags.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
            )
        )
    return flags


def run(config: Path | None, **given: Any) -> None:
    """Serve the models of a folder over HTTP until SIGTERM or Ctrl-C."""
    flags = {name: value for name, value in given.items() if value is not None}
    try:
        settings = read(config, **flags)
    except ValueError as error:  # pydantic's are such
        raise typer.Exit(_complain(error)) from None

    def reread() -> Settings:
        try:
            return read(config, **flags)
        except ValueError as error:
            raise CannotReload("; ".join(_complaints(error))) from error

    console = Console(stderr=True, highlight=False, markup=False)
    try:
        code = serve(settings, reread)
    except CannotStart as error:
        console.print(f"serving: {error}", style="red", soft_wrap=True)
        raise typer.Exit(1) from None
    raise typer.Exit(code)


def _complain(error: Exception) -> int:
    console = Console(stderr=True, highlight=False, markup=False)
    for complaint in _complaints(error):
        console.print(f"serving: {complaint}", soft_wrap=True)
    return 2


def _complaints(error: Exception) -> list[str]:
    """Return a line for each setting that is wrong."""
    if isinstance(error, ValidationError):
        said = [(found["loc"][0] if found["loc"] else "", found["msg"]) for found in error.errors()]
        return [f"{name}: {text.removeprefix('Value error, ').lower()}" for name, text in said]
    return [str(error)]


_config = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None,
        typer.Option("--config", help="TOML file with any of these settings.", show_default=False),
    ],
)
run.__signature__ = inspect.Signature([_config, *_flags()])  # type: ignore[attr-defined]
app.command("run")(run)


@app.command("serve")
def serve_container() -> None:
    """Serve as SageMaker has its containers do: `run --platform sagemaker`, all else from SERVING_*."""
    run(None, platform="sagemaker")


_COMMANDS: tuple[Callable[..., None], ...] = (
    *(versions.publish, versions.check, versions.delete, export.export, export.compose),
    *traffic.COMMANDS,
    *(status.status, status.history, tune.tune, predict.predict, score.score, drift.drift, replay.replay),
)
for command in _COMMANDS:
    app.command()(command)
for group in (keys.keys, dashboards.dashboards, manifests.manifests, ray.ray):
    app.add_typer(group)


def main() -> None:
    """Run the command line."""
    app()
