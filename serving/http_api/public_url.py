"""Where clients see this server: a proxy may serve it under another name, and a path of its own."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Router
from starlette.types import Receive, Scope, Send

_PREFIX = re.compile(r"(/[A-Za-z0-9_.~-]+)+")


class Prefix:
    """The path under which a proxy serves this server, which it takes off before it passes a request on.

    path: what is set, "" for none. proxies: addresses and networks whose X-Forwarded-Prefix is believed instead;
    "unix" is whoever has no address.
    """

    def __init__(self, path: str, proxies: Iterable[str]) -> None:
        self._path = path
        named = set(proxies)
        self._unix = "unix" in named
        self._proxies = [ipaddress.ip_network(proxy) for proxy in named - {"unix"}]

    def of(self, request: Request) -> str:
        """Return the prefix that the client of a request sees; anything that is no plain path is none."""
        given = request.headers.get("x-forwarded-prefix", "").rstrip("/")
        # Two slashes in front would be another host, to which the page would send its reader's key.
        return given if _PREFIX.fullmatch(given) and self._is_proxy(request) else self._path

    def _is_proxy(self, request: Request) -> bool:
        if request.client is None:  # a socket without addresses
            return self._unix
        try:
            peer = ipaddress.ip_address(request.client.host)
        except ValueError:
            return False
        return any(peer in network for network in self._proxies)


def redirect_relatively(router: Router) -> None:
    """Send who asks for a path with a slash too many or too few to the right one, wherever a proxy has put it.

    Starlette writes the whole URL, with the host that the proxy calls this server by.
    """
    router.redirect_slashes = False
    not_found = router.default

    async def moved(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        other = path.rstrip("/") if path.endswith("/") else path + "/"
        there = {**scope, "path": other}
        if not other or all(route.matches(there)[0] is Match.NONE for route in router.routes):
            await not_found(scope, receive, send)
            return
        raw = scope["raw_path"].decode("ascii")
        last = raw.rstrip("/").rpartition("/")[2]
        slashes = len(raw) - len(raw.rstrip("/"))
        target = "../" * slashes + last if slashes else f"./{last}/"
        if scope["query_string"]:
            target += "?" + scope["query_string"].decode("latin-1")
        await Response(status_code=307, headers={"location": target})(scope, receive, send)

    router.default = moved
