"""`serving drift`: whether the rows that a running server gets are as those that its models were made for."""

from __future__ import annotations

import json
from itertools import zip_longest
from typing import Annotated, Any

import typer

from serving.commands.options import ApiKey, AsJson, Name, Url
from serving.commands.output import explained, show, tell
from serving.commands.predict import client_of

_MOST_BINS = 24
_LEVELS = " ▁▂▃▄▅▆▇█"


def drift(
    name: Name,
    version: Annotated[str | None, typer.Option(help="Which version; else the one that answers now.")] = None,
    as_json: AsJson = False,
    url: Url = "http://127.0.0.1:8080",
    api_key: ApiKey = None,
) -> None:
    """Show how a model's last window of rows differs from its reference; what drifted comes first."""
    with explained(), client_of(url, api_key, 30.0) as client:
        found = client.drift(name, version)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    tell(_summary(found))
    if found["window"] is None:
        return
    columns = sorted(found["window"]["columns"], key=lambda column: (not column["drifted"], -column["psi"]))
    show(
        ("", "reference", "window", "PSI", "JS", "p", "values"),
        map(_row, columns),
        numbers=("PSI", "JS", "p"),
        whole=("reference", "window", "PSI", "JS", "p"),
        styles=("bold red" if column["drifted"] else None for column in columns),
    )


def _row(column: dict[str, Any]) -> list[str]:
    p_value = "" if column["p_value"] is None else f"{column['p_value']:.1g}"
    kinds = ("missing", "unseen", "out_of_range")
    shares = ", ".join(f"{column[of]:.1%} {of.replace('_', ' ')}" for of in kinds if column[of])
    bars = _bars(column["reference"][:_MOST_BINS], column["window"][:_MOST_BINS])
    return [column["name"], *bars, f"{column['psi']:.3f}", f"{column['jensen_shannon']:.3f}", p_value, shares]


def _summary(found: dict[str, Any]) -> str:
    said = f"{found['model']} {found['version']}: "
    window = found["window"]
    if window is None:
        return (
            said
            + {
                "off": "its rows are not compared: drift is off",
                "no reference": "its file has no reference: export it anew, or set drift.learn_rows in its model.toml",
                "learning": f"the reference is being learned, of {found['learned_rows']} rows so far",
                "comparing": "no rows yet",
            }[found["status"]]
        )
    if window["ended"] is None:
        return said + f"{window['rows']} of the first window's {found['window_rows']} rows: too early to say"
    drifted = sum(column["drifted"] for column in window["columns"])
    verdict = f"{drifted} of {len(window['columns'])} columns drifted" if drifted else "no drift"
    return said + (
        f"{verdict} in the last window of {window['rows']} rows; "
        f"{found['drifted_windows']} of {found['windows']} windows drifted"
    )


def _bars(*histograms: list[int]) -> list[str]:
    """Draw histograms on one scale, a character a bin."""
    shares = [[count / (sum(counts) or 1) for count in counts] for counts in histograms]
    top = max((share for row in zip_longest(*shares, fillvalue=0.0) for share in row), default=0.0) or 1.0
    return ["".join(_LEVELS[round(share / top * (len(_LEVELS) - 1))] for share in row) for row in shares]
