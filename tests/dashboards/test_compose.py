"""The compose file: what one service is told about another is so.

`make check` holds it against the specification's schema, and test_prometheus runs the server's and Prometheus'
commands. Grafana itself can be had from no package registry, so nothing here proves that it starts.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import yaml

from tests.dashboards.test_boards import MADE

COMPOSE = yaml.safe_load(files("serving.dashboards").joinpath("compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def content(name: str) -> str:
    """Return a configuration that stands in the compose file."""
    return str(COMPOSE["configs"][name]["content"])


def mounted(service: str) -> dict[str, str]:
    """Return what a service finds at which path: a configuration by name, or a path beside the compose file."""
    given = SERVICES[service]
    found = {one["target"]: one["source"] for one in given.get("configs", ())}
    return found | {parts[1]: parts[0] for parts in (volume.split(":") for volume in given["volumes"])}


def test_grafana_finds_prometheus_and_the_dashboards() -> None:
    """Grafana is given Prometheus as the only data source, and the folder that the dashboards are exported to."""
    there = mounted("grafana")
    assert there["/etc/grafana/provisioning/datasources/serving.yml"] == "datasources"
    assert there["/etc/grafana/provisioning/dashboards/serving.yml"] == "dashboards"
    (source,) = yaml.safe_load(content("datasources"))["datasources"]
    assert (source["type"], source["access"], source["isDefault"]) == ("prometheus", "proxy", True)
    url = urlsplit(source["url"])
    assert f":{url.port}" in SERVICES[str(url.hostname)]["ports"][0]
    (provider,) = yaml.safe_load(content("dashboards"))["providers"]
    assert (provider["type"], there[provider["options"]["path"]]) == ("file", "./")
    home = PurePosixPath(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (str(home.parent), home.stem in MADE) == (provider["options"]["path"], True)


def test_prometheus_finds_its_rules_and_the_server() -> None:
    """Prometheus reads the configuration and the rules that are mounted, and scrapes the server by its name."""
    there = mounted("prometheus")
    (option,) = (part for part in SERVICES["prometheus"]["command"] if part.startswith("--config.file="))
    path = PurePosixPath(option.partition("=")[2])
    assert there[str(path)] == "prometheus"
    asked = yaml.safe_load(content("prometheus"))
    assert there[str(path.parent / asked["rule_files"][0])] == "./rules.yml"
    (target,) = asked["scrape_configs"][0]["static_configs"][0]["targets"]
    name, port = target.split(":")
    assert SERVICES[name]["ports"] == [f"127.0.0.1:{port}:{port}"]


def test_nothing_is_open_to_the_network_or_runs_with_rights() -> None:
    """Each service is published on the machine's loopback alone, has no capability and can't get one."""
    for name, service in SERVICES.items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert (service["cap_drop"], service["security_opt"]) == (["ALL"], ["no-new-privileges:true"]), name
