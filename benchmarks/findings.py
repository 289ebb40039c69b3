"""What a benchmark found, and what was aimed at."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Finding:
    """One measured figure; `aim` is a least, or where `most` a most; None where it stands for comparison."""

    what: str
    measured: float
    unit: str
    aim: float | None = None
    most: bool = False

    @property
    def verdict(self) -> str:
        """Say whether the aim was met."""
        if self.aim is None:
            return ""
        met = self.measured <= self.aim if self.most else self.measured >= self.aim
        return "met" if met else "MISSED"


def show(findings: list[Finding], console: Console) -> None:
    """Print the figures, and at the end what was aimed at."""
    table = Table("", "measured", "", "aim", "")
    for finding in findings:
        aim = "" if finding.aim is None else f"{'at most' if finding.most else 'at least'} {finding.aim:g}"
        table.add_row(finding.what, f"{finding.measured:,.2f}", finding.unit, aim, finding.verdict)
    console.print(table)
    missed = [f.what for f in findings if f.verdict == "MISSED"]
    console.print(f"{len(missed)} aims missed: {'; '.join(missed)}" if missed else "all aims met", soft_wrap=True)
