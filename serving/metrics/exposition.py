"""The metrics as Prometheus reads them; the sole owner of prometheus_client."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TypeVar

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from serving.metrics.definitions import COUNTERS, GAUGES, HISTOGRAMS, Key, Labels
from serving.metrics.store import Store, cumulative

T = TypeVar("T")


class _Collector:
    """One scrape's store as prometheus_client's registry takes it."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        yield from _families(self._store)


def exposition(store: Store) -> tuple[bytes, str]:
    """Return a store's metrics in Prometheus' text format, and its content type."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(store))
    return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4


def _families(store: Store) -> Iterator[Metric]:
    counters, histograms = _by_name(store.counters), _by_name(store.histograms)
    for name, (text, label_names) in COUNTERS.items():
        counter = CounterMetricFamily(name, text, labels=label_names)
        for labels, value in counters[name]:
            counter.add_metric(labels, value)
        yield counter
    for name, (text, label_names, bounds) in HISTOGRAMS.items():
        histogram = HistogramMetricFamily(name, text, labels=label_names)
        for labels, cells in histograms[name]:
            histogram.add_metric(labels, list(cumulative(bounds, cells)), cells[-1])
        yield histogram
    agreeing = dict(counters["serving_shadow_agreeing_rows"])
    for labels, rows in counters["serving_shadow_rows"]:
        if not rows:  # all that was asked had none
            continue
        store.gauges["serving_shadow_agreement_ratio", labels] = agreeing.get(labels, 0.0) / rows
    gauges = _by_name(store.gauges)
    for name, (text, label_names) in GAUGES.items():
        gauge = GaugeMetricFamily(name, text, labels=label_names)
        for labels, value in gauges[name]:
            gauge.add_metric(labels, value)
        yield gauge


def _by_name(table: dict[Key, T]) -> dict[str, list[tuple[Labels, T]]]:
    found: dict[str, list[tuple[Labels, T]]] = defaultdict(list)
    for (name, labels), value in table.items():
        found[name].append((labels, value))
    return found
