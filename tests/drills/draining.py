"""SIGTERM under load, again and again: every accepted request gets its answer."""

from __future__ import annotations

import signal
import time
from typing import Any

from tests.conftest import Server
from tests.drills.drill import Report, drill
from tests.drills.steady import Load, until

DRAIN_S = 10


@drill("draining", "SIGTERM under load loses no request, says goodbye on each connection and exits 0 in time")
def draining(report: Report, *, times: int = 50, connections: int = 16) -> None:
    """End a server under load `times` times; then once with impolite connections."""
    codes, seconds, lost, close, opened = [], [], 0, 0, 0
    for _ in range(times):
        code, took, load = _ended({}, connections)
        codes.append(code)
        seconds.append(took)
        lost += load.outcomes["lost"]
        close += load.said_close
        opened += load.opened
        wrong = sum(n for outcome, n in load.outcomes.items() if outcome.startswith("status"))
        if wrong:
            report.exactly("answers other than 200 while draining", wrong, 0)
    report.exactly("times ended", len(codes), times)
    report.exactly("exits with 0", codes.count(0), times)
    report.exactly("requests that were sent and got no answer", lost, 0)
    report.at_least("connections whose last answer said close, share", close / opened, 0.99)
    report.at_most("longest drain", max(seconds), DRAIN_S, "s")
    _, _, load = _ended({"off": ["polite"]}, connections, slow=True)
    report.control("connections closed at once lose requests", load.outcomes["lost"] > 0)


def _ended(faults: dict[str, Any], connections: int, *, slow: bool = False) -> tuple[int, float, Load]:
    import json

    if slow:
        faults = {**faults, "slow": 0.05}
    server = Server(
        "--workers", "2", "--drain-s", str(DRAIN_S),
        module="tests.drills.faulty", environment={"FAULTS": json.dumps(faults)},
    )  # fmt: skip
    try:
        server.wait(120)
        load = Load(server.port, connections=connections)
        with load.running():
            until(lambda: load.answered > 5 * connections)
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            code = server.process.wait(DRAIN_S + 20)
            took = time.monotonic() - began
        return code, took, load
    finally:
        server.stop()
