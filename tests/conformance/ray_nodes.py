"""Runs where Ray is: a cluster of several nodes on this machine, and what a file of this project deploys on it.

Given JSON as argument; prints a line of JSON once it serves, then does what each line on standard input says (`kill
node`, `kill server`, `kill replica`, `replicas`) and answers with a line. Ends, all of Ray too, with standard input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.resources import files
from typing import Any

import psutil
import ray
import yaml
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

STORE_BYTES = 100 << 20


def main() -> None:
    """Start, obey, end."""
    given = json.loads(sys.argv[1])
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints is no answer
    store = {"object_store_memory": STORE_BYTES}
    head = {"num_cpus": 0, "include_dashboard": False, "gcs_server_port": given["gcs_port"], **store}
    cluster = Cluster(initialize_head=True, connect=True, head_node_args=head)
    try:
        nodes = [cluster.add_node(num_cpus=2, **store) for _ in range(given["nodes"])]
        config = yaml.safe_load(files("serving.scale").joinpath(given["file"]).read_text())
        config["http_options"] |= {"host": "127.0.0.1", "port": given["port"]}
        application = config["applications"][0]
        application["args"] |= given["settings"]
        (deployment,) = application["deployments"]
        if given["scaling"]:
            deployment["autoscaling_config"] |= given["scaling"]
        else:
            deployment |= {"num_replicas": given["replicas"], "autoscaling_config": None}
        serve.start(proxy_location="EveryNode", http_options=config["http_options"])
        client = _get_global_client()
        client.deploy_apps(ServeDeploySchema(**config))
        until = time.monotonic() + 180
        while (status := serve.status().applications["serving"]).status != "RUNNING":
            if status.status in ("DEPLOY_FAILED", "UNHEALTHY") or time.monotonic() > until:
                raise RuntimeError(status)
            time.sleep(0.2)
        print(json.dumps({"pid": os.getpid()}), file=said, flush=True)
        for line in sys.stdin:
            does = {"kill node": kill_node, "kill server": kill_server, "kill replica": kill_replica}
            print(json.dumps(does.get(line.strip(), replicas)(nodes)), file=said, flush=True)
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


def replicas(_: list[Any]) -> dict[str, int]:
    """Say how many replicas are in which state."""
    (deployment,) = serve.status().applications["serving"].deployments.values()
    return {str(state): count for state, count in deployment.replica_states.items()}


def processes_of(node: Any) -> list[psutil.Process]:
    """Give what runs on a node."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [raylet, *raylet.children(recursive=True)]


def named(nodes: list[Any], text: str) -> psutil.Process:
    """Find a process by its command."""
    return next(each for node in nodes for each in processes_of(node) if text in " ".join(each.cmdline()))


def kill_server(nodes: list[Any]) -> bool:
    """Kill a server that a replica keeps."""
    named(nodes, "serving.cli import main").kill()
    return True


def kill_replica(nodes: list[Any]) -> bool:
    """Kill a replica; tell whether its server ends with it."""
    server = named(nodes, "serving.cli import main")
    server.parent().kill()
    return not psutil.wait_procs([server], timeout=10)[1]


def kill_node(nodes: list[Any]) -> bool:
    """Kill all processes of a node at once, as a machine that loses power."""
    for node in nodes:
        processes = processes_of(node)
        if any("ServeReplica" in " ".join(each.cmdline()) for each in processes):
            for each in processes:
                each.suspend()  # none is to see another end, and close what it has in good order
            for each in processes:
                each.kill()
            nodes.remove(node)
            return True
    raise RuntimeError("no node has a replica")


if __name__ == "__main__":
    main()
