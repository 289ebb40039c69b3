"""`make train`: rebuild every model that ships, and show how each fared."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from serving.export import CannotExport, ParityError, publish
from serving.gate.gate import Gate
from serving.gate.report import GateRefused
from training.models import TRAINERS, UNSHIPPED


def main() -> int:
    """Train, export, compare and publish the models named, or all; return the exit status."""
    known = {**TRAINERS, **UNSHIPPED}
    parser = argparse.ArgumentParser(prog="python -m training", description=main.__doc__)
    parser.add_argument("names", nargs="*", help=f"models to train, of: {', '.join(known)}; all that ship if none")
    parser.add_argument("--to", type=Path, default=Path("models"), help="folder to publish into (default: models)")
    given = parser.parse_args()
    unknown = set(given.names) - known.keys()
    if unknown:
        parser.error(f"no such model: {', '.join(sorted(unknown))}")
    console = Console()
    table = Table("model", "version", "rows", "metric", "parity", "batched", "KiB", "seconds", title="trained")
    failed = False
    with Gate() as gate:
        for name, train in [(chosen, train) for chosen in given.names or TRAINERS for train in known[chosen]]:
            console.print(f"{name}: training", highlight=False)
            began = time.monotonic()
            try:
                exported = train()
                version, fresh = publish(exported, name=name, root=given.to, examiner=gate)
            except (CannotExport, ParityError, GateRefused) as error:
                failed = True
                console.print(f"{name}: not published: {error}", markup=False)
                continue
            signature = exported.signature
            parity = signature.parity
            table.add_row(
                name,
                version if fresh else f"{version} (unchanged)",
                str(parity.rows) if parity else "",
                ", ".join(f"{k} {v:.3f}" for k, v in signature.metrics.items()),
                f"{parity.max_difference:.1e}" if parity else "not compared",
                "yes" if exported.independence.proved else f"no: {exported.independence.reason}",
                f"{len(exported.content) / 1024:.0f}",
                f"{time.monotonic() - began:.1f}",
            )
    console.print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
