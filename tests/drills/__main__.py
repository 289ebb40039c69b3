"""Run drills and print the table of promises: `python -m tests.drills [NAME ...]`."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import tests.drills
from tests.drills.drill import DRILLS, Report

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "drills.json"


def main(names: list[str]) -> int:
    """Run the named drills, or all; return 1 if a promise was broken."""
    for module in pkgutil.iter_modules(tests.drills.__path__):
        if module.name != "__main__":
            importlib.import_module(f"tests.drills.{module.name}")
    unknown = set(names) - DRILLS.keys()
    if unknown:
        print(f"no drill is called {', '.join(sorted(unknown))}; drills: {', '.join(sorted(DRILLS))}")
        return 2
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    broken = 0
    console = Console(width=150, highlight=False)
    for name in names or sorted(DRILLS):
        chosen, report, began = DRILLS[name], Report(), time.monotonic()
        chosen.run(report)
        seconds = time.monotonic() - began
        broken += not report.kept
        table = Table(title=f"{name}: {chosen.promise} ({seconds:.0f} s)", title_justify="left")
        for column in ("", "measured", "promised", "kept"):
            table.add_column(column, overflow="fold")
        for figure in report.figures:
            table.add_row(figure.what, f"{figure.measured:,.6g}", figure.promised, "yes" if figure.kept else "NO")
        console.print(table)
        results[name] = {
            "promise": chosen.promise,
            "seconds": round(seconds),
            "cores": os.cpu_count(),
            "figures": [asdict(figure) for figure in report.figures],
        }
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="drills-") as temporary:
        os.environ["TMPDIR"] = temporary  # for the state folders of the models folders that drills make
        sys.exit(main(sys.argv[1:]))
