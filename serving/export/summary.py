"""What an export shows of itself: to a notebook as HTML, to a terminal as text, both from the same tables."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import pandas as pd
from rich.console import Console, Group
from rich.table import Table as RichTable
from rich.text import Text

from serving.engine.batching import Independence
from serving.engine.rows import described
from serving.engine.signature import Signature
from serving.export.parity import Worst

MOST_ROWS = 30
"""Features that are shown: a model of a thousand is not read row by row."""
MOST_TEXT = 300
_WIDTH = 110


class Table(NamedTuple):
    """A title, the names of its columns (none: names and values), and its rows."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def tables(signature: Signature, independence: Independence, worst: Worst | None, size: int) -> list[Table]:
    """Say what callers send and get, how the file compared with its original, and how good it is. size: bytes."""
    features = [(f.name, _type(f.datatype, f.shape), described(f)) for f in signature.features]
    if len(features) > MOST_ROWS:
        features = [*features[:MOST_ROWS], (f"and {len(features) - MOST_ROWS} more", "", "")]
    roles = {signature.label: "the class", signature.scores: "a score of each class"}
    outputs = [(o.name, _type(o.datatype, o.shape[1:]), roles.get(o.name, "")) for o in signature.outputs]
    if signature.classes:
        names = ", ".join(map(str, signature.classes[:MOST_ROWS]))
        outputs[0] = (*outputs[0][:2], f"{outputs[0][2]}: {names}".removeprefix(": "))
    facts = [
        ("task", signature.task),
        ("size", f"{size / 1024:,.0f} KiB"),
        ("requests", "share batches" if independence.proved else f"run alone: {independence.reason}"),
    ]
    return [
        Table(signature.description or "Exported model", (), facts),
        Table("Takes", ("feature", "type", "meaning"), features),
        Table("Answers", ("output", "type", "meaning"), outputs),
        Table("Compared with the original", (), _compared(signature, worst)),
        *([Table("Metrics", (), [(k, f"{v:g}") for k, v in signature.metrics.items()])] if signature.metrics else []),
    ]


def html(found: list[Table]) -> str:
    """Write tables as a fragment for a notebook; every text is escaped."""
    with pd.option_context("display.max_colwidth", None):
        return "".join(
            f"<p style='font-weight:bold'>{escape(table.title)}</p>"
            + pd.DataFrame(table.rows, columns=table.head or None).to_html(index=False, header=bool(table.head))
            for table in found
        )


def renderable(found: list[Table]) -> Group:
    """Make what rich prints of tables."""
    made: list[Text | RichTable] = []
    for table in found:
        shown = RichTable(show_header=bool(table.head), box=None)
        for name in table.head or ("", ""):
            shown.add_column(name)
        for row in table.rows:
            shown.add_row(*(Text(cell) for cell in row))
        made += [Text(table.title, style="bold"), shown]
    return Group(*made)


def text(found: list[Table]) -> str:
    """Write tables as plain text."""
    console = Console(width=_WIDTH, no_color=True, force_terminal=False, force_jupyter=False)
    with console.capture() as captured:
        console.print(renderable(found))
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())


def _type(datatype: str, shape: tuple[int, ...]) -> str:
    return f"{datatype} [{', '.join('?' if size < 0 else str(size) for size in shape)}]" if shape else datatype


def _compared(signature: Signature, worst: Worst | None) -> list[tuple[str, ...]]:
    parity = signature.parity
    if parity is None:
        return [("parity", "not compared: give `reference=` to compare with")]
    rows: list[tuple[str, ...]] = [("rows", str(parity.rows))]
    if parity.label_agreement is not None:
        rows.append(("same class", f"{parity.label_agreement:.2%}"))
    rows.append(("largest difference", f"{parity.max_difference:.2g}"))
    if worst is not None:
        due, got = (", ".join(map(_cell, values)) for values in (worst.expected, worst.actual))
        rows += [
            ("worst row", _short(f"{worst.index}: {', '.join(f'{k} {_cell(v)}' for k, v in worst.row.items())}")),
            ("there", _short(f"{worst.output}: the original says {due}, the file {got}")),
        ]
    return rows


def _cell(value: object) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def _short(text: str) -> str:
    return text if len(text) <= MOST_TEXT else f"{text[: MOST_TEXT - 3]}..."
