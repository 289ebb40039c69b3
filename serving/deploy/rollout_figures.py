"""What was counted of versions since the server started, in words and units that a person reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serving.deploy.analysis import live, percent
from serving.metrics.totals import VersionTotals
from serving.repository.traffic import Traffic


def lines_of(traffic: Traffic, totals: Mapping[str, VersionTotals]) -> list[str]:
    """Say in a line each how canary and shadow go, since the server started."""
    lines = []
    if traffic.canary is not None:
        for role, version in (("canary", traffic.canary.version), ("stable", traffic.stable or "")):
            if version in totals:
                its = live(totals[version])
                mean = f", {its.seconds / its.timed * 1e3:.3g} ms each" if its.timed else ""
                lines.append(f"{role} {version}: {its.predictions:,.0f} predictions, {its.errors:,.0f} failed{mean}")
    for copy in (traffic.shadow, traffic.canary):
        if copy is None or copy.version not in totals:
            continue
        seen = figures(totals[copy.version]).get("shadow")
        if seen is None:
            continue
        line = f"shadow {copy.version}: {seen['compared']:,} answers compared, {seen['failed']:,} failed"
        if seen["agreement"] is not None:
            line += f", {percent(seen['agreement'])} of the rows agree"
        if seen["score_difference"]["mean"] is not None:
            line += f", scores differ by {seen['score_difference']['mean']:.3g} on average"
        if seen["mean_seconds"] is not None:
            line += f", {seen['mean_seconds'] * 1e3:.3g} ms each"
        lines.append(f"{line}; not copied: {seen['busy']:,} while busy, {seen['incompatible']:,} incompatible")
    return lines


def figures(did: VersionTotals) -> dict[str, Any]:
    """Put what one version did since the server started in words and units that a person reads."""
    its = live(did)
    found: dict[str, Any] = {
        "predictions": round(its.predictions),
        "rows": round(its.rows),
        "errors": round(its.errors),
        "error_rate": _ratio(its.errors, its.predictions),
        "mean_seconds": _ratio(its.seconds, its.timed),
    }
    if did.shadow_compared or did.shadow_failed or did.shadow_busy or did.shadow_incompatible:
        found["shadow"] = {
            "compared": round(did.shadow_compared),
            "failed": round(did.shadow_failed),
            "busy": round(did.shadow_busy),
            "incompatible": round(did.shadow_incompatible),
            "agreement": _ratio(did.shadow_agreeing_rows, did.shadow_rows),
            "score_difference": {
                "mean": _ratio(did.difference_sum, did.differences),
                "rows_up_to": {bound: round(count) for bound, count in did.differences_up_to.items()},
            },
            "mean_seconds": _ratio(did.shadow_seconds, did.shadow_timed),
        }
    return found


def _ratio(part: float, whole: float) -> float | None:
    return round(part / whole, 6) if whole else None
