"""The one table from errors to gRPC status codes."""

from __future__ import annotations

import grpc

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
)

FAULT = "the server failed on this request; its log has the reason"
"""What a caller learns of a fault of ours, with INTERNAL."""

STATUS: dict[type[ServingError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    Forbidden: grpc.StatusCode.PERMISSION_DENIED,
    SignatureMismatch: grpc.StatusCode.INVALID_ARGUMENT,
    InferenceFailed: grpc.StatusCode.INVALID_ARGUMENT,
    PayloadTooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ModelNotFound: grpc.StatusCode.NOT_FOUND,
    GenerationConflict: grpc.StatusCode.FAILED_PRECONDITION,
    NotReady: grpc.StatusCode.UNAVAILABLE,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
}


def status_of(error: ServingError) -> grpc.StatusCode:
    """Return the status code for an error."""
    return STATUS.get(type(error), grpc.StatusCode.INTERNAL)


def trailers(error: ServingError) -> tuple[tuple[str, str], ...]:
    """Return the trailing metadata that an error adds: `retry-after` in whole seconds."""
    return (("retry-after", str(error.retry_after)),) if isinstance(error, QueueFull) else ()
