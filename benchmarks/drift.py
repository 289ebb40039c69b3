"""How often drift raises a false alarm, and how soon it sees a shift, beside evidently and river on the same rows.

.venv/bin/python -m benchmarks.drift [--windows 10000]; writes benchmarks/results/drift.json and docs/images/drift.png.
The others run in an environment of their own, which the first run makes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from serving.engine.reference import Column, reference_of
from serving.monitoring.drift_test import compare, drifted
from serving.monitoring.tally import Tally
from tests.conformance.environments import environment

mpl.use("Agg")
import matplotlib.pyplot as plt

FEATURES, TRAIN, WINDOW = 30, 4000, 1000
SHIFTED = 20
RESULTS, IMAGE = Path("benchmarks/results/drift.json"), Path("docs/images/drift.png")


def training(random: np.random.Generator) -> Any:
    """Make rows of 30 features: normal ones, skewed ones, whole numbers, and some that hang together."""
    rows = random.normal(size=(TRAIN, FEATURES))
    rows[:, :8] = np.exp(1.5 * rows[:, :8])
    rows[:, 8:14] = np.round(rows[:, 8:14])
    rows[:, 25:] += rows[:, 15:20]
    return rows


class Ours:
    """This server's test on whole windows."""

    def __init__(self, train: Any) -> None:
        columns = [Column(f"f{i}", "input", 0, i, categorical=False) for i in range(FEATURES)]
        found = [reference_of(column, train[:, i]) for i, column in enumerate(columns)]
        self._tallies = [Tally(c, reference) for c, reference in zip(columns, found, strict=True) if reference]

    def alarm(self, window: Any) -> bool:
        """Tell whether a window raises the alarm."""
        pairs = zip(self._tallies, window.T, strict=True)
        return any(drifted([compare(tally.counts, tally.of(x)) for tally, x in pairs]))


def streams(train: Any, number: int, random: np.random.Generator) -> Any:
    """Draw rows of training again, [number, 4 windows, features]; from somewhere in the second window on, shifted."""
    rows = train[random.integers(0, TRAIN, (number, 4 * WINDOW))]
    begins = random.integers(WINDOW, 2 * WINDOW, number)
    for stream, begin in zip(rows, begins, strict=True):
        stream[begin:, SHIFTED] += train[:, SHIFTED].std()
    return rows, begins


def main() -> None:
    """Measure all, write the results, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=10_000, help="of unchanged rows, for this server")
    parser.add_argument("--others", type=int, default=20, help="of unchanged rows, for the others, which take longer")
    given = parser.parse_args()
    random = np.random.default_rng(0)
    train = training(random)
    ours = Ours(train)
    quiet = sum(ours.alarm(train[random.integers(0, TRAIN, WINDOW)]) for _ in range(given.windows))
    rows, begins = streams(train, 100, random)
    after = []
    for stream, begin in zip(rows, begins, strict=True):
        ends = [end for end in range(WINDOW, 4 * WINDOW + 1, WINDOW) if ours.alarm(stream[end - WINDOW : end])]
        after.append(next((end - int(begin) for end in ends if end > begin), None))
    found: dict[str, Any] = {"serving": {"windows": given.windows, "false_alarms": quiet, "rows_until_seen": after}}
    with tempfile.TemporaryDirectory() as folder:
        unchanged = train[random.integers(0, TRAIN, (given.others, WINDOW))]
        np.savez(Path(folder) / "rows.npz", train=train, unchanged=unchanged, streams=rows[:10], begins=begins[:10])
        python = environment("drift") / "bin" / "python"
        command = [str(python), "benchmarks/drift_others.py", str(Path(folder) / "rows.npz")]
        found |= json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    draw(found)
    for name, its in found.items():
        seen = [rows for rows in its["rows_until_seen"] if rows is not None]
        print(
            f"{name}: {its['false_alarms']} false alarms in {its['windows']} windows of {WINDOW} rows; a shift of one"
            f" standard deviation in one of {FEATURES} features was seen in {len(seen)} of"
            f" {len(its['rows_until_seen'])} streams, after {max(seen, default=0)} rows at most"
        )


def draw(found: dict[str, Any]) -> None:
    """Draw false alarms, and rows until the shift is seen."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8))
    names = list(found)
    shares = [max(100 * its["false_alarms"] / its["windows"], 0.01) for its in found.values()]
    texts = [f"{its['false_alarms']} of {its['windows']:,}" for its in found.values()]
    bars = left.barh(names, shares, color=["#0b7285", *["#adb5bd"] * (len(names) - 1)])
    left.bar_label(bars, texts, padding=3, fontsize=8)
    left.set_xscale("log")
    left.set_xlim(0.005, 2000)
    left.set_xlabel("% of unchanged windows with an alarm", fontsize=8)
    seen = [[rows for rows in its["rows_until_seen"] if rows is not None] or [0] for its in found.values()]
    right.boxplot(seen, orientation="horizontal", tick_labels=names)
    right.axvline(2000, color="#adb5bd", linewidth=1)
    right.set_xlabel("rows until a shift of one standard deviation raises one", fontsize=8)
    for axis in (left, right):
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(IMAGE, dpi=150)


if __name__ == "__main__":
    main()
