"""`serving export` and `serving compose` write one ONNX file from what others have made."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from serving.commands.traffic import explained
from serving.errors import InvalidRequest, ServingError

PICKLES = (".pkl", ".pickle", ".joblib", ".dill", ".cloudpickle", ".sav")

To = Annotated[Path, typer.Option("--to", metavar="FILE.onnx", help="The file to write; it must not be there.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("export")(export)
    app.command("compose")(compose)


def export(
    path: Annotated[Path, typer.Argument(metavar="FOLDER", help="A model folder of MLflow with the onnx flavour.")],
    to: To = Path("model.onnx"),
) -> None:
    """Write a model folder of MLflow as one ONNX file, with the signature and the example that it was logged with.

    A fitted model is exported where it was fitted, in Python: `from serving.export import export`.
    """
    if is_pickle(path):
        Console(stderr=True, highlight=False).print(instead_of_pickle(path), markup=False, soft_wrap=True)
        raise typer.Exit(2)
    _write(lambda exporter: exporter.export(path), to)


def compose(
    first: Annotated[Path, typer.Argument(metavar="PRE.onnx", help="What callers send goes in here.")],
    then: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="What comes out of it goes in here.")],
    join: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="OUTPUT=INPUT", help="An output of the first that feeds an input of the second."),
    ] = None,
    to: To = Path("composed.onnx"),
) -> None:
    """Join two graphs into one file, so that preprocessing travels with its model."""
    joins = dict(pair.partition("=")[::2] for pair in join or ())
    if not all(joins.values()):
        raise typer.BadParameter("write OUTPUT=INPUT", param_hint="--map")
    _write(lambda exporter: exporter.compose(first, then, joins=joins), to)


def is_pickle(path: Path) -> bool:
    """Tell whether a file is what pickle, joblib and their like write: by its name, or by its first bytes."""
    if path.suffix.lower() in PICKLES:
        return True
    try:
        with path.open("rb") as file:
            head = file.read(2)
    except OSError:
        return False
    return head[:1] == b"\x80" and head[1:] in (b"\x02", b"\x03", b"\x04", b"\x05")


def instead_of_pickle(path: Path) -> str:
    """Say why a pickle is refused, and what to write where it was made."""
    return f"""serving: {path.name} is a pickle, which runs whatever its author wrote into it: it is never opened here.
Where it comes from, with the libraries that it was made with and the rows that it was fitted on, write:

    import joblib
    from serving.export import export, publish
    model = joblib.load("{path.name}")
    exported = export(model, train=X_train, held_out=X_test)
    publish(exported, name="{path.stem}", root="models")"""


def _write(make: Any, to: Path) -> None:
    with explained():
        try:
            made = make(import_module("serving.export"))  # its libraries are an extra, and slow to import
            with to.open("xb") as file:
                file.write(made.content)
        except FileExistsError:
            raise InvalidRequest(f"{to} is there: name another with --to") from None
        except OSError as error:
            raise ServingError(f"{error.filename}: {(error.strerror or '').lower()}") from None
        except ModuleNotFoundError as error:
            raise ServingError(str(error)) from None
    Console(stderr=True, highlight=False).print(made)
    typer.echo(f"written: {to}")
