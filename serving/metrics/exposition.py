"""The metrics as Prometheus reads them; the sole owner of prometheus_client."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from serving.metrics.families import COUNTERS, GAUGES, HISTOGRAMS
from serving.metrics.store import Store, cumulative


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
    for name, (text, label_names) in COUNTERS.items():
        counter = CounterMetricFamily(name, text, labels=label_names)
        for (key, labels), value in store.counters.items():
            if key == name:
                counter.add_metric(labels, value)
        yield counter
    for name, (text, label_names, bounds) in HISTOGRAMS.items():
        histogram = HistogramMetricFamily(name, text, labels=label_names)
        for (key, labels), cells in store.histograms.items():
            if key == name:
                histogram.add_metric(labels, list(cumulative(bounds, cells)), cells[-1])
        yield histogram
    for (key, labels), rows in list(store.counters.items()):
        if key == "serving_shadow_rows" and rows:
            agreeing = store.counters["serving_shadow_agreeing_rows", labels]
            store.gauges["serving_shadow_agreement_ratio", labels] = agreeing / rows
    for name, (text, label_names) in GAUGES.items():
        gauge = GaugeMetricFamily(name, text, labels=label_names)
        for (key, labels), value in store.gauges.items():
            if key == name:
                gauge.add_metric(labels, value)
        yield gauge
