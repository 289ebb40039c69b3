"""Every error that a caller can meet has its status, in each transport's one table."""

from __future__ import annotations

import pytest

from serving import errors
from serving.grpc_api import status
from serving.http_api import answer

# ModelInvalid is about a file: it is met at start and by the gate, and no caller is told it.
ALL = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type)
    and issubclass(kind, errors.ServingError)
    and kind not in (errors.ServingError, errors.ModelInvalid)
]
# gRPC has no content codings and no jobs, and no versions are published over it.
HTTP_ALONE = {errors.UnsupportedMediaType, errors.Conflict, errors.JobNotFound}


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: str(kind.__name__))
def test_no_error_of_ours_is_a_fault_of_the_server(kind: type[errors.ServingError]) -> None:
    """Whatever this server says no with is a 4xx, 503 or 504, and never UNKNOWN or INTERNAL."""
    error = made(kind)
    code = answer.status_of(error)
    assert 400 <= code < 500 or code in (503, 504)
    assert kind in HTTP_ALONE or status.status_of(error) is not status.Status.INTERNAL


def made(kind: type[errors.ServingError]) -> errors.ServingError:
    """Make an error of a kind."""
    return kind("no", **({"current": {}} if kind is errors.GenerationConflict else {}))


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: str(kind.__name__))
def test_a_narrower_error_has_the_status_of_its_kind(kind: type[errors.ServingError]) -> None:
    """An error that derives from another is answered as that one, over HTTP and gRPC, unless a table names it."""
    known, narrower = made(kind), made(kind)
    narrower.__class__ = type("Narrower", (kind,), {})
    for protocol in ("v1", "v2"):
        assert answer.status_of(narrower, protocol) == answer.status_of(known, protocol) < 505
    assert status.status_of(narrower) is status.status_of(known)
    assert answer.status_of(errors.SignatureMismatch("no"), "v2") == 400
    assert answer.status_of(errors.ServingError("no")) == 500
