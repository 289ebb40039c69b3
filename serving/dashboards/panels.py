"""Panels by the question that they answer: each is its query in PromQL, with the labels that it sums by as legend."""

from __future__ import annotations

from serving.dashboards.grafana import Panel

WINDOW = "[$__rate_interval]"


def legend(by: str, more: str = "") -> str:
    """Return a legend of labels, given as PromQL lists them."""
    return " ".join([*(f"{{{{{label}}}}}" for label in by.split(", ") if label), more]).strip()


def rate_of(metric: str, by: str, where: str) -> str:
    """Return how much a counter grows a second, summed by labels."""
    return f"sum by ({by}) (rate({metric}{{{where}}}{WINDOW}))"


def mean_of(metric: str, by: str, where: str) -> str:
    """Return the mean of what a histogram observed; nothing where that was nothing."""
    return ratio_of(f"{metric}_sum", f"{metric}_count", by, where)


def ratio_of(metric: str, other: str, by: str, where: str) -> str:
    """Return how much a counter grew for each that another grew; nothing where that was nothing."""
    return f"{rate_of(metric, by, where)} / ({rate_of(other, by, where)} > 0)"


def quantile_of(quantile: float, metric: str, by: str, where: str) -> str:
    """Return a quantile of what a histogram observed."""
    return f"histogram_quantile({quantile}, {rate_of(f'{metric}_bucket', f'{by}, le', where)})"


def plot(title: str, expr: str, by: str, unit: str = "short") -> Panel:
    """Draw a query."""
    return Panel(title, ((expr, legend(by)),), unit)


def rate(title: str, metric: str, by: str, where: str, unit: str = "reqps") -> Panel:
    """Draw how much a counter grows a second."""
    return plot(title, rate_of(metric, by, where), by, unit)


def gauge(title: str, metric: str, by: str, where: str, unit: str = "short") -> Panel:
    """Draw a gauge, of which all servers that say it say the same, or the highest counts."""
    return plot(title, f"max by ({by}) ({metric}{{{where}}})", by, unit)


def total(title: str, metric: str, by: str, where: str) -> Panel:
    """Draw a gauge that adds up over servers."""
    return plot(title, f"sum by ({by}) ({metric}{{{where}}})", by)


def top(title: str, metric: str, by: str, where: str) -> Panel:
    """Draw the ten highest of a gauge."""
    return plot(title, f"topk(10, max by ({by}) ({metric}{{{where}}}))", by)


def shares(title: str, metric: str, by: str, where: str) -> Panel:
    """Draw the ten highest of a gauge that is there only where it is not zero."""
    return plot(title, f"topk(10, max by ({by}) ({metric}{{{where}}})) or vector(0)", by, "percentunit")


def quantiles(title: str, metric: str, by: str, where: str, *quantiles: float, unit: str = "s") -> Panel:
    """Draw quantiles of a histogram."""
    queries = tuple((quantile_of(q, metric, by, where), legend(by, f"p{q * 100:g}")) for q in quantiles)
    return Panel(title, queries, unit)


def now(title: str, expr: str) -> Panel:
    """Show one number."""
    return Panel(title, ((expr, ""),), kind="stat")
