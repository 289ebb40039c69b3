"""A real nginx before several servers, whose list of endpoints changes as a controller changes it."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.drills.steady import until

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
RETRY = "error timeout http_502 http_503 non_idempotent"
"""When another endpoint is asked instead: predictions may be repeated, though they are POSTs."""

_CONFIGURATION = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/errors;
events {{ }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  keepalive_timeout 0;  # a reload closes idle connections of clients, and a client might just then use one
  upstream serving {{ {servers} keepalive 32; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://serving; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_connect_timeout 1s; proxy_read_timeout 5s; proxy_next_upstream {retry}; proxy_next_upstream_tries 3;
    }}
  }}
}}
"""


class Nginx:
    """One nginx on a free port of loopback. retry: its `proxy_next_upstream`."""

    def __init__(self, folder: Path, retry: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        self._folder, self._retry = folder, retry
        self._process: subprocess.Popen[bytes] | None = None

    def route(self, ports: Iterable[int]) -> None:
        """Send requests to these ports of loopback from now on."""
        servers = " ".join(f"server 127.0.0.1:{port} max_fails=1 fail_timeout=2s;" for port in ports)
        file = self._folder / "nginx.conf"
        file.write_text(_CONFIGURATION.format(folder=self._folder, servers=servers, port=self.port, retry=self._retry))
        if self._process is None:
            assert NGINX is not None, "nginx is not installed"
            self._process = subprocess.Popen([NGINX, "-p", str(self._folder), "-c", str(file)])
            assert until(self._listens) < 30
        else:
            self._process.send_signal(signal.SIGHUP)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(20)


@contextmanager
def nginx(folder: Path, ports: Iterable[int], retry: str = RETRY) -> Iterator[Nginx]:
    """Run nginx for a while."""
    made = Nginx(folder, retry)
    try:
        made.route(ports)
        yield made
    finally:
        made.stop()
