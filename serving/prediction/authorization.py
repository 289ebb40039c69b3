"""Who may predict, by the headers of HTTP or the metadata of gRPC, which are the same here."""

from __future__ import annotations

from serving.access.access import Access
from serving.access.principal import Principal, Scope
from serving.errors import InvalidRequest
from serving.protocols.headers import Headers


def authorization(headers: Headers) -> bytes | None:
    """Return the Authorization header. Raises InvalidRequest where there are two: a proxy may have judged the other."""
    given = None
    for name, value in headers:
        if name == b"authorization":
            if given is not None:
                raise InvalidRequest("there are two Authorization headers: send one")
            given = value
    return given


def authorize(access: Access, headers: Headers, scope: Scope, among: frozenset[str] | None = None) -> Principal:
    """Return who sent a request. Raises Unauthenticated or Forbidden where they may not do what `scope` names.

    among: see `Access.decide`.
    """
    return access.decide(authorization(headers), scope, among=among)
