"""`serving keys`: make, list and revoke the keys of a file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from serving.access.key_store import KeyStore
from serving.access.keys import are_entries, written
from serving.access.principal import SCOPES, AccessInvalid
from serving.access.rate_limits import Rates
from serving.commands.options import seconds
from serving.commands.output import explained, show

KeysFile = Annotated[
    str, typer.Option("--keys", metavar="FILE", envvar="SERVING_KEYS", help="What the server is given as --keys.")
]
keys = typer.Typer(
    name="keys", help="Make, list and revoke the keys of a keys file.", no_args_is_help=True, rich_markup_mode=None
)


@keys.command("create")
def create(  # noqa: PLR0917  each is an option
    name: Annotated[str, typer.Option(help="Who will use it, as histories will call them.")],
    scope: Annotated[list[str], typer.Option(help="predict, deploy, metrics or jobs; may be repeated.")],
    expires: Annotated[str | None, typer.Option(help="How long it is good: 90d, 12h; else until revoked.")] = None,
    requests_per_s: Annotated[
        float | None, typer.Option(help="Predictions that it may ask for in a second; else any number.")
    ] = None,
    rows_per_s: Annotated[float | None, typer.Option(help="Rows it may ask for in a second; else any number.")] = None,
    file: KeysFile = "serving.keys",
) -> None:
    """Make a key and print it, once: only its SHA-256 is kept."""
    with explained():
        if not SCOPES.issuperset(scope):
            raise AccessInvalid(f"--scope: there are {', '.join(sorted(SCOPES))}")
        until = None if expires is None else time.time() + seconds("--expires", expires)
        for flag, rate in (("--requests-per-s", requests_per_s), ("--rows-per-s", rows_per_s)):
            if rate is not None and not 1e-6 <= rate < 1e9:
                raise AccessInvalid(f"{flag}: should be above 0, and less than a billion")
        path = _path(file)
        first = not path.exists()
        scopes = frozenset(s for s in SCOPES if s in scope)
        secret = KeyStore(path).create(name, scopes, expires=until, rates=Rates(requests_per_s, rows_per_s))
    typer.echo(secret)
    how = f"start the server with --keys {path}" if first else "a running server takes it within 2 seconds"
    typer.echo(f"This is the only time that the key is shown. Its SHA-256 is in {path}; {how}.", err=True)


@keys.command("list")
def list_keys(file: KeysFile = "serving.keys") -> None:
    """List names, scopes, times and rates; the keys themselves are nowhere."""
    with explained():
        found = KeyStore(_path(file)).read()
    now = time.time()
    rows = []
    for key in found:
        times = ("" if at is None else written(at) for at in (key.created, key.expires))
        rates = ("" if rate is None else f"{rate:.15g}" for rate in key.rates)
        rows.append((key.name, ", ".join(sorted(key.scopes)), key.state(now), *times, *rates))
    show(("name", "scopes", "state", "created", "expires", "requests/s", "rows/s"), rows)


@keys.command("revoke")
def revoke(name: Annotated[str, typer.Argument(help="The key's name.")], file: KeysFile = "serving.keys") -> None:
    """Withdraw a key: a running server refuses it within 2 seconds."""
    with explained():
        KeyStore(_path(file)).revoke(name)
    typer.echo(f"{name} is revoked", err=True)


def _path(given: str) -> Path:
    if are_entries(given):
        raise AccessInvalid("SERVING_KEYS holds keys themselves: name a file with --keys")
    return Path(given)
