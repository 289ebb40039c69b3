"""Draws the figures that the README shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

SHOWN = [
    ("v2 1 row 32c", "v2 tensors, one row"),
    ("v1 1 row 32c", "V1 named rows, one row"),
    ("v2 32 rows 32c", "v2, 32 rows"),
]
OURS, OTHERS = "#0b7285", "#adb5bd"


def draw(middle: dict[str, dict[str, Any]], path: Path, machine: str, cases: Sequence[tuple[str, str]] = SHOWN) -> None:
    """Draw requests per second as bars, one panel a case. cases: with their titles."""
    shown = [(case, title) for case, title in cases if case in middle]
    if not shown:
        return
    figure, axes = plt.subplots(1, len(shown), figsize=(4.2 * len(shown), 2.9), squeeze=False)
    for axis, (case, title) in zip(axes[0], shown, strict=True):
        bars = sorted(
            ((n, f.rate) for n, f in middle[case].items() if "workers" not in n),
            key=lambda bar: bar[1],
        )
        names = [name for name, _ in bars]
        rates = [rate / 1000 for _, rate in bars]
        drawn = axis.barh(names, rates, color=[OURS if n.startswith("serving") else OTHERS for n in names])
        axis.bar_label(
            drawn, [f"{rate:.1f}k" if rate >= 1 else f"{1000 * rate:.0f}" for rate in rates], padding=3, fontsize=8
        )
        axis.set_title(title, fontsize=10)
        axis.set_xlim(0, max(rates) * 1.18)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"thousand requests/s at 32 connections, one core for the server ({machine})", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
