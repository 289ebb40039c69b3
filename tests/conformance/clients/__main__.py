"""Ask the real server with gRPC clients of other languages: `python -m tests.conformance.clients [go java rust]`.

Each is built with what Debian has of its language (the packages are named where one is missing), and asks all kinds of
calls. Then it calls on from 32 threads while the server's workers are replaced, and while the server is ended and
another takes its address: not one call may be lost.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from tests.conformance.clients.build import LANGUAGES, Missing
from tests.conformance.own import grpc_address
from tests.conftest import Server

ROOMY = ("--max-queued-rows", "100000")


def main(names: list[str]) -> int:
    """Print a line for each point; return 1 where one is not kept."""
    kept = True
    for name in names or LANGUAGES:
        with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
            try:
                client = LANGUAGES[name](Path(folder))
            except Missing as missing:
                print(f"{name}: not asked: {missing}")
                continue
            for line in [*asked(client), *called_on(client)]:
                kept = kept and line.startswith("yes")
                print(f"{name}: {line}", flush=True)
    return 0 if kept else 1


def asked(client: list[str]) -> list[str]:
    """Return what a client says of a server that stays."""
    server = Server("--grpc-port", "0", *ROOMY)
    try:
        address = grpc_address(server.wait())
        return subprocess.run(
            [*client, address], check=True, capture_output=True, text=True, timeout=120
        ).stdout.splitlines()
    finally:
        server.stop()


def called_on(client: list[str]) -> list[str]:
    """Return what it says of calls through new workers, and through a new server at the same address."""
    server = Server("--grpc-port", "0", *ROOMY)
    try:
        address = grpc_address(server.wait())
        calling = Calling([*client, address, "on"])
        calling.on()
        server.process.send_signal(signal.SIGHUP)
        while "every worker is new" not in server.output() and not calling.ended:
            calling.on()
        server.stop()
        server = Server("--grpc-port", address.rpartition(":")[2], *ROOMY).wait()
        calling.on()
        return calling.end()
    finally:
        server.stop()


class Calling:
    """A client that calls until its input ends, and prints a number for each thousand answers."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._lines: list[str] = []
        self._told = threading.Condition()
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._told:
                self._lines.append(line.strip())
                self._told.notify_all()

    @property
    def ended(self) -> bool:
        """Whether it has given up."""
        return self._process.poll() is not None

    def on(self) -> None:
        """Wait until it has had two thousand answers more, or has ended."""
        with self._told:
            due = len(self._lines) + 2
            self._told.wait_for(lambda: len(self._lines) >= due or self.ended, 60)

    def end(self) -> list[str]:
        """End it, and return what it says of all its calls."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        status = self._process.wait(60)
        self._reading.join(10)
        return [line for line in self._lines if not line.isdigit()] or [f"no: it ended with {status}"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
