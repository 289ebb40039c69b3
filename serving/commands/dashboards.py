"""`serving dashboards`: what Grafana and Prometheus need to show this server and to raise alarms."""

from __future__ import annotations

from importlib.resources import files

from serving.commands.written import writer
from serving.dashboards.boards import BOARDS
from serving.dashboards.grafana import document


def _files() -> dict[str, str]:
    boards = {f"{board['uid']}.json": document(board) for board in (make() for make in BOARDS)}
    folder = files("serving.dashboards")
    return boards | {name: folder.joinpath(name).read_text() for name in ("rules.yml", "prometheus.yml", "compose.yml")}


dashboards = writer(
    "dashboards",
    "Write dashboards for Grafana, and rules for Prometheus.",
    "Write the dashboards as JSON, the rules, how to scrape a server, and a compose file of all three.",
    _files,
)
