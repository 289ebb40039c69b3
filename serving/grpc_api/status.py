"""gRPC's status codes, and the one table from errors to them."""

from __future__ import annotations

from enum import IntEnum

from serving.errors import (
    DeadlineExceeded,
    Forbidden,
    GenerationConflict,
    InferenceFailed,
    InvalidRequest,
    ModelNotFound,
    NotReady,
    PayloadTooLarge,
    QueueFull,
    ServingError,
    SignatureMismatch,
    Unauthenticated,
    by_kind,
)

FAULT = "the server failed on this request; its log has the reason"
"""What a caller learns of a fault of ours, with INTERNAL."""


class Status(IntEnum):
    """Source: https://grpc.github.io/grpc/core/md_doc_statuscodes.html."""

    OK = 0
    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


STATUS: dict[type[ServingError], Status] = {
    InvalidRequest: Status.INVALID_ARGUMENT,
    Unauthenticated: Status.UNAUTHENTICATED,
    Forbidden: Status.PERMISSION_DENIED,
    SignatureMismatch: Status.INVALID_ARGUMENT,
    InferenceFailed: Status.INVALID_ARGUMENT,
    PayloadTooLarge: Status.RESOURCE_EXHAUSTED,
    QueueFull: Status.RESOURCE_EXHAUSTED,
    ModelNotFound: Status.NOT_FOUND,
    GenerationConflict: Status.FAILED_PRECONDITION,
    NotReady: Status.UNAVAILABLE,
    DeadlineExceeded: Status.DEADLINE_EXCEEDED,
}


class Aborted(Exception):
    """A call ends with a status that no error of ours stands for."""

    def __init__(self, status: Status, details: str) -> None:
        super().__init__(details)
        self.status = status
        self.details = details


def status_of(error: ServingError) -> Status:
    """Return the status code for an error: its own, or that of the class that it derives from."""
    return by_kind(STATUS, error, Status.INTERNAL)


def trailers(error: ServingError) -> tuple[tuple[str, str], ...]:
    """Return the trailing metadata that an error adds: `retry-after` in whole seconds."""
    return (("retry-after", str(error.retry_after)),) if isinstance(error, QueueFull) else ()
