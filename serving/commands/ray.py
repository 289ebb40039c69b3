"""`serving ray`: what deploys this server on a Ray cluster, and what tells a load balancer where its servers are."""

from __future__ import annotations

import logging
import shlex
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from serving.commands.written import writer
from serving.scale import upstreams

FILES = ("serve.yaml", "servers.yaml", "rayservice.yaml", "rayservice-servers.yaml", "nginx.conf")

ray = writer(
    "ray",
    "Deploy on a Ray cluster.",
    "Write the files for `serve deploy`, for KubeRay and for nginx.",
    lambda: {name: files("serving.scale").joinpath(name).read_text() for name in FILES},
)


@ray.command("upstreams")
def follow(
    out: Annotated[Path, typer.Option("--out", "-o", help="nginx includes this file; it is replaced.")],
    url: Annotated[
        list[str] | None, typer.Option(help="Proxies of Ray's: the first that answers [default: 127.0.0.1:8000].")
    ] = None,
    reload: Annotated[str, typer.Option(help="Command to run each time that the file changes.")] = "nginx -s reload",
) -> None:
    """Keep nginx's list of servers as Ray has it, until it is ended."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    upstreams.follow(url or ["http://127.0.0.1:8000"], out, shlex.split(reload))
