"""`serving export` and `serving compose` write one ONNX file from what others have made."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from serving.commands.output import explained
from serving.errors import InvalidRequest, ServingError

PICKLES = (".pkl", ".pickle", ".joblib", ".dill", ".cloudpickle", ".sav")
_INSTEAD = """serving: {name} is a pickle, which runs whatever its author wrote into it: it is never opened here.
Where it comes from, with the libraries that it was made with and the rows that it was fitted on, write:

    import joblib
    from serving.export import export, publish
    model = joblib.load("{name}")
    exported = export(model, train=X_train, held_out=X_test)
    publish(exported, name="{stem}", root="models")"""

To = Annotated[Path, typer.Option("--to", metavar="FILE.onnx", help="The file to write; it must not be there.")]


def export(
    path: Annotated[Path, typer.Argument(metavar="FOLDER", help="A model folder of MLflow with the onnx flavour.")],
    to: To = Path("model.onnx"),
) -> None:
    """Write a model folder of MLflow as one ONNX file, with the signature and the example that it was logged with.

    A fitted model is exported where it was fitted, in Python: `from serving.export import export`.
    """
    refuse_pickle(path)
    _write(lambda exporter: exporter.export(path), to)


def compose(
    first: Annotated[Path, typer.Argument(metavar="PRE.onnx", help="What callers send goes in here.")],
    then: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="What comes out of it goes in here.")],
    join: Annotated[
        list[str] | None, typer.Option("--map", metavar="OUTPUT=INPUT", help="Which output feeds which input.")
    ] = None,
    to: To = Path("composed.onnx"),
) -> None:
    """Join two graphs into one file, so that preprocessing travels with its model."""
    joins = dict(pair.partition("=")[::2] for pair in join or ())
    if not all(joins.values()):
        raise typer.BadParameter("write OUTPUT=INPUT", param_hint="--map")
    _write(lambda exporter: exporter.compose(first, then, joins=joins), to)


def refuse_pickle(path: Path) -> None:
    """End the command where a file is what pickle, joblib and their like write: by its name, or by its first bytes."""
    pickled = path.suffix.lower() in PICKLES
    if not pickled and path.is_file():
        with explained(), path.open("rb") as file:
            pickled = re.match(rb"\x80[\x02-\x05]", file.read(2)) is not None
    if pickled:
        typer.echo(_INSTEAD.format(name=path.name, stem=path.stem), err=True)
        raise typer.Exit(2)


def _write(make: Callable[[Any], Any], to: Path) -> None:
    """Have the exporter make a file. make: what is asked of it, whose libraries are an extra, and slow to import."""
    with explained():
        try:
            made = make(import_module("serving.export"))
            with to.open("xb") as file:
                file.write(made.content)
        except FileExistsError:
            raise InvalidRequest(f"{to} is there: name another with --to") from None
        except ModuleNotFoundError as error:
            raise ServingError(str(error)) from None
    Console(stderr=True, highlight=False).print(made)
    typer.echo(f"written: {to}")
