"""The metrics as Prometheus reads them: its text format, or OpenMetrics with exemplars.

Written here, and not by a library: with hundreds of models a scrape has tens of thousands of lines, over which
prometheus_client spends a second of the interpreter, and predictions would wait for it.

Source: https://prometheus.io/docs/instrumenting/exposition_formats and OpenMetrics 1.0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import TypeVar

from serving.metrics.definitions import COUNTERS, GAUGES, HISTOGRAMS, Exemplar, Key, Labels
from serving.metrics.store import Store
from serving.metrics.triton_names import triton_samples

T = TypeVar("T")

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


def exposition(store: Store, *, openmetrics: bool = False, triton: bool = False) -> tuple[bytes, str]:
    """Return a store's metrics and their content type; triton: with the names of Triton beside our own."""
    lines = list(_lines(store, openmetrics=openmetrics))
    if triton:
        for name, (text, of, samples) in triton_samples(store).items():
            # Triton's counters do not end in _total, as counters must here.
            lines += _head(name, "unknown" if openmetrics else "untyped", text)
            lines += [_sample(name, _labels(of, labels), value) for labels, value in samples]
    if openmetrics:
        lines.append("# EOF")
    lines.append("")
    return "\n".join(lines).encode(), OPENMETRICS if openmetrics else TEXT


def _lines(store: Store, *, openmetrics: bool) -> Iterator[str]:
    counters, histograms = _by_name(store.counters), _by_name(store.histograms)
    for name, (text, of) in COUNTERS.items():
        yield from _head(name if openmetrics else f"{name}_total", "counter", text)
        for labels, value in counters[name]:
            yield _sample(f"{name}_total", _labels(of, labels), value)
    for name, (text, of, bounds) in HISTOGRAMS.items():
        yield from _head(name, "histogram", text)
        upper = [*map(repr, bounds), "+Inf"]
        for labels, cells in histograms[name]:
            exemplars = store.exemplars.get((name, labels), {}) if openmetrics else {}
            yield from _histogram(name, _labels(of, labels), upper, cells, exemplars)
    agreeing = dict(counters["serving_shadow_agreeing_rows"])
    for labels, rows in counters["serving_shadow_rows"]:
        if not rows:  # all that was asked had none
            continue
        store.gauges["serving_shadow_agreement_ratio", labels] = agreeing.get(labels, 0.0) / rows
    gauges = _by_name(store.gauges)
    for name, (text, of) in GAUGES.items():
        yield from _head(name, "gauge", text)
        for labels, value in gauges[name]:
            yield _sample(name, _labels(of, labels), value)


def _histogram(
    name: str, labels: str, upper: list[str], cells: list[float], exemplars: dict[int, Exemplar]
) -> Iterator[str]:
    start = f'{name}_bucket{{{labels},le="' if labels else f'{name}_bucket{{le="'
    total = 0.0
    for at, (bound, total) in enumerate(zip(upper, accumulate(cells[:-1]), strict=True)):
        line = f'{start}{bound}"}} {total:.0f}'
        if at in exemplars:
            trace, value, when = exemplars[at]
            line += f' # {{trace_id="{trace}"}} {value} {when}'
        yield line
    yield _sample(f"{name}_count", labels, total)
    yield _sample(f"{name}_sum", labels, cells[-1])


def _head(name: str, kind: str, text: str) -> tuple[str, str]:
    return f"# HELP {name} {text}", f"# TYPE {name} {kind}"


def _sample(name: str, labels: str, value: float) -> str:
    return f"{name}{{{labels}}} {value!r}" if labels else f"{name} {value!r}"


def _labels(names: Iterable[str], values: Labels) -> str:
    return ",".join(
        [f'{name}="{value.translate(_ESCAPES)}"' for name, value in sorted(zip(names, values, strict=True))]
    )


def _by_name(table: dict[Key, T]) -> dict[str, list[tuple[Labels, T]]]:
    found: dict[str, list[tuple[Labels, T]]] = defaultdict(list)
    for (name, labels), value in table.items():
        found[name].append((labels, value))
    return found
