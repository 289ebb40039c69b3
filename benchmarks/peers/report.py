"""The table of what was found, as the command prints it and the manual shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
CASES = [(rows, connections) for rows in (1, 32) for connections in (1, 8, 32)]
"""Rows in a request, connections."""


def case_name(rows: int, connections: int) -> str:
    """Name a load as the results have it: rows, and c for connections."""
    return f"{rows} row{'s' if rows > 1 else ''} {connections}c"


def comparison(facts: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Make the head and the lines, the fastest first; who could not be measured stands below, with the reason."""
    figures = facts["figures"]
    crowd = case_name(1, 32)
    head = ["", *(case_name(*case) for case in CASES)]
    head += [f"p50, {case_name(1, 1)}", f"p99, {crowd}", "processor for 1,000", "memory", "failed"]
    lines = []
    for name in sorted(figures[crowd], key=lambda name: -figures[crowd][name]["rate"]):
        one, many = figures[case_name(1, 1)][name], figures[crowd][name]
        rates = [f"{figures[case_name(*case)][name]['rate']:,.0f}/s" for case in CASES]
        seen = many["processor"] is not None
        cost = [f"{many['processor']:.3f} s", f"{many['memory']:,.0f} MiB"] if seen else ["", ""]
        failed = sum(figures[case_name(*case)][name]["failed"] for case in CASES)
        lines.append([name, *rates, f"{one['p50']:.2f} ms", f"{many['p99']:.1f} ms", *cost, f"{failed:,}"])
    return head, lines + [[name, reason] + [""] * (len(head) - 2) for name, reason in facts["missing"].items()]
