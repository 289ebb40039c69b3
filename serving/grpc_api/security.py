"""Who may, over gRPC: the table of methods, and what judges a call before a message of it is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from serving.access.access import Access
from serving.access.principal import Scope
from serving.errors import InvalidRequest
from serving.http2.hpack import Headers

SCOPES: dict[str, Scope | None] = {
    "ServerLive": None,
    "ServerReady": None,
    "ServerMetadata": "predict",
    "ModelReady": "predict",
    "ModelMetadata": "predict",
    "ModelConfig": "predict",
    "ModelStatistics": "predict",
    "ModelInfer": "predict",
    "ModelStreamInfer": "predict",
    "RepositoryIndex": "predict",
    "RepositoryModelLoad": "deploy",
    "RepositoryModelUnload": "deploy",
}
"""What each method of the service requires; None is open. A method that is not here requires `deploy`."""

Judge: TypeAlias = Callable[[Headers], Callable[[], object]]
"""Takes the headers of a call, and returns what says whether it may, each time that it is asked.

That raises Unauthenticated, Forbidden, or InvalidRequest where two credentials are sent.
"""


def judge_of(access: Access, method: str) -> Judge | None:
    """Return what judges the calls of a method of the service; None where it is open, whatever becomes of the keys."""
    scope = SCOPES.get(method, "deploy")
    if scope is None or (scope != "deploy" and not access.configured):
        return None

    def judge(headers: Headers) -> Callable[[], object]:
        given = _authorizations(headers)
        if len(given) > 1:
            return _refuse_two
        credential = given[0] if given else None
        # Access keeps what it found out about a credential, and forgets it when the keys change.
        return lambda: access.decide(credential, scope)

    return judge


def deployer(access: Access, headers: Headers) -> str:
    """Return the name of who makes a call that requires `deploy`. Raises Unauthenticated or Forbidden."""
    given = _authorizations(headers)
    return access.decide(given[0] if given else None, "deploy").name


def _refuse_two() -> None:
    raise InvalidRequest("there are two authorization entries in the metadata: send one")


def _authorizations(headers: Headers) -> list[bytes]:
    return [value for name, value in headers if name == b"authorization"]
