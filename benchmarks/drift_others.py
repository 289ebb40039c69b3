"""What evidently and river make of the rows that benchmarks.drift gives them; run in an environment that has them."""

from __future__ import annotations

import json
import sys
import warnings

import numpy as np
import pandas as pd
from evidently import Dataset, Report
from evidently.presets import DataDriftPreset
from river.drift import ADWIN

WINDOW = 1000


def evidently(train, unchanged, streams, begins):
    """Compare windows by evidently's preset: an alarm where any column has drifted."""
    names = [f"f{i}" for i in range(train.shape[1])]
    reference = Dataset.from_pandas(pd.DataFrame(train, columns=names))

    def alarm(window):
        current = Dataset.from_pandas(pd.DataFrame(window, columns=names))
        said = Report([DataDriftPreset()]).run(current, reference).dict()
        return next(m["value"]["count"] for m in said["metrics"] if "DriftedColumnsCount" in m["metric_name"]) > 0

    after = []
    for stream, begin in zip(streams, begins, strict=True):
        ends = (
            end for end in range(WINDOW, len(stream) + 1, WINDOW) if end > begin and alarm(stream[end - WINDOW : end])
        )
        after.append(next((end - int(begin) for end in ends), None))
    return {"windows": len(unchanged), "false_alarms": sum(map(alarm, unchanged)), "rows_until_seen": after}


def river(make, unchanged, streams, begins):
    """Follow each feature with a detector of its own: an alarm where any of them says drift."""

    def alarms(rows):
        detectors = [make() for _ in range(rows.shape[1])]
        for number, row in enumerate(rows.tolist()):
            seen = False
            for detector, value in zip(detectors, row, strict=True):
                detector.update(value)
                seen = seen or detector.drift_detected
            if seen:
                yield number

    rows = unchanged.reshape(-1, unchanged.shape[2])
    false = {number // WINDOW for number in alarms(rows)}
    after = []
    for stream, begin in zip(streams, begins, strict=True):
        after.append(next((number - int(begin) for number in alarms(stream) if number >= begin), None))
    return {"windows": len(unchanged), "false_alarms": len(false), "rows_until_seen": after}


def main():
    """Print what they found, as JSON."""
    warnings.simplefilter("ignore")
    given = np.load(sys.argv[1])
    rows = given["unchanged"], given["streams"], given["begins"]
    found = {"evidently": evidently(given["train"], *rows), "river, ADWIN": river(ADWIN, *rows)}
    json.dump(found, sys.stdout)


main()
