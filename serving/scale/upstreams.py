"""What a load balancer in front of servers that Ray places must know: where they are now."""

from __future__ import annotations

import json
import logging
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from serving.linux.files import write_whole

log = logging.getLogger("serving.upstreams")

EVERY_S = 1.0
"""Seconds between two questions."""


def nginx(addresses: Sequence[str]) -> str:
    """Write nginx's upstream block; a server that refuses or resets gets nothing for a few seconds.

    >>> print(nginx(["10.0.0.7:8080"]), end="")
    upstream serving {
        server 10.0.0.7:8080 max_fails=1 fail_timeout=5s;
        keepalive 64;
    }
    """
    servers = "".join(f"    server {address} max_fails=1 fail_timeout=5s;\n" for address in addresses)
    return f"upstream serving {{\n{servers}    keepalive 64;\n}}\n"


def fetch(url: str, timeout_s: float = 5.0) -> bytes:
    """Return what an address answers. Raises OSError for any status but 200."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:  # noqa: S310  the operator's own
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        error.close()
        raise


def addresses(urls: Sequence[str]) -> list[str]:
    """Ask Ray, by the first of its proxies that answers, where the servers are. Raises OSError where none does."""
    last: Exception = OSError("no address to ask")
    for url in urls:
        try:
            return sorted(str(each) for each in json.loads(fetch(url))["servers"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            last = error
    raise OSError(f"none of {', '.join(urls)} says where the servers are: {last}")


def changes(urls: Sequence[str]) -> Iterator[list[str]]:
    """Give the addresses each time that they have changed; as long as none is known, the last ones stay."""
    known: list[str] = []
    silent = False
    while True:
        try:
            found = addresses(urls)
            silent = False
        except OSError as error:
            if not silent:
                log.warning("%s; what is known stays", error)
            found, silent = known, True
        if found and found != known:
            known = found
            yield found
        time.sleep(EVERY_S)


def follow(urls: Sequence[str], out: Path, reload: Sequence[str]) -> None:
    """Write nginx's upstream block to a file and run a command, each time that the servers change; for good."""
    for found in changes(urls):
        write_whole(out, nginx(found).encode())
        log.info("servers: %s", ", ".join(found))
        ended = subprocess.run(reload, check=False)  # noqa: S603  the operator's own
        if ended.returncode:
            log.warning("%s ended with status %d", reload[0], ended.returncode)
