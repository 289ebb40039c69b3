"""The options that several commands have: which model, where it is, and how to show what was found."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from serving.commands.output import tell
from serving.deploy.mirror import mirrored
from serving.errors import InvalidRequest, NotReady

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}

Name = Annotated[str, typer.Argument(metavar="NAME", help="The model.")]
Version = Annotated[str, typer.Argument(metavar="VERSION", help="One of its versions.")]
Models = Annotated[
    Path, typer.Option("--models", envvar="SERVING_MODELS", help="Folder of models, or s3://, gs://, az://.")
]
StateDir = Annotated[
    Path | None, typer.Option("--state-dir", envvar="SERVING_STATE_DIR", help="The state folder of its servers.")
]
Why = Annotated[str, typer.Option(help="The reason, for the history.", show_default=False)]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Do not wait until the running servers serve it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Url = Annotated[str, typer.Option(envvar="SERVING_URL", help="Where the server is; the key is $SERVING_API_KEY.")]
ApiKey = Annotated[str | None, typer.Option(envvar="SERVING_API_KEY", hidden=True)]


def up_to_date(
    models: Path, state_dir: Path | None, name: str | None = None, *, is_made: bool = False
) -> tuple[Path, Path | None]:
    """Return the models folder and the state folder: of a repository in an object store those that mirror it here, now.

    name: the model that is looked at; all without it. is_made: a folder that is not there is made by who asks. Raises
    InvalidRequest, and NotReady where there is no such folder.
    """
    found = mirrored(models, state_dir, name, say=lambda text: tell(f"serving: {text}", err=True))
    if not is_made and not found[0].is_dir():
        raise NotReady(f"there is no models folder {found[0]}: name another with --models")
    return found


def seconds(option: str, text: str) -> float:
    """Read a time such as 90s, 10m, 1.5h, 2d, 1w. Raises InvalidRequest, which names the option."""
    found = re.fullmatch(r"([1-9]\d{0,4}(?:\.\d+)?)([smhdw])", text.strip())
    if found is None:
        raise InvalidRequest(f"{option}: {text[:40]!r} is no time: write 90s, 10m, 2h, 90d or 2w")
    return float(found[1]) * _UNITS[found[2]]
