"""The gate's report as a table for a terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from serving.gate.report import Figures, Report


def table(report: Report, title: str) -> Group:
    """Draw a report for a terminal."""
    checks = Table(title=Text(title), title_justify="left", box=box.SIMPLE)
    for column in ("check", "outcome", "", "ms"):
        checks.add_column(column, overflow="fold", justify="right" if column == "ms" else "left")
    style = {"passed": "green", "warned": "yellow", "refused": "red", "skipped": "dim"}
    for check in report.checks:
        outcome = Text(check.outcome, style[check.outcome])
        checks.add_row(Text(check.name), outcome, Text(check.detail), f"{check.seconds * 1e3:.0f}")
    parts: list[Table | Text] = [checks]
    if report.figures is not None:
        parts.append(_costs(report.figures, report.beside))
    if report.ok and report.breaking:
        parts.append(Text(f"breaking, and allowed: {'; '.join(report.breaking)}", "yellow"))
    verdict = Text("passed", "bold green") if report.ok else Text(f"refused: {report.reason}", "bold red")
    return Group(*parts, verdict)


def _costs(new: Figures, old: Figures | None) -> Table:
    drawn = Table(box=box.SIMPLE)
    for column in ("", "this version", *(("serving now", "ratio") if old else ())):
        drawn.add_column(column, justify="right" if column else "left")
    rows: list[tuple[str, float, Callable[[Figures], float | None]]] = [
        ("load, ms", 1e3, lambda figures: figures.load_s),
        ("1 row, µs", 1e6, lambda figures: figures.row_s),
        (f"{new.batch_rows} rows, µs", 1e6, lambda figures: figures.batch_s),
        ("memory, MiB", 2**-20, lambda figures: figures.memory_bytes),
    ]
    for what, scale, read in rows:
        value, beside = read(new), read(old) if old else None
        cells = ["-" if v is None else f"{v * scale:,.1f}" for v in ((value, beside) if old else (value,))]
        ratio = f"{value / beside:.2f}" if value and beside else "-"
        drawn.add_row(what, *cells, *((ratio,) if old else ()))
    return drawn
