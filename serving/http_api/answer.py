"""Statuses, error bodies and headers: the one table from errors to HTTP."""

from __future__ import annotations

from serving.errors import (
    Conflict,
    DeadlineExceeded,
    Forbidden,
    GenerationConflict,
    InferenceFailed,
    InvalidRequest,
    JobNotFound,
    ModelNotFound,
    NotReady,
    PayloadTooLarge,
    QueueFull,
    ServingError,
    SignatureMismatch,
    Unauthenticated,
    UnsupportedMediaType,
    by_kind,
)
from serving.gate.report import GateRefused
from serving.protocols.headers import HeaderList
from serving.protocols.strict_json import dumps

STATUS: dict[type[ServingError], int] = {
    InvalidRequest: 400,
    Unauthenticated: 401,
    Forbidden: 403,
    ModelNotFound: 404,
    JobNotFound: 404,
    GenerationConflict: 412,
    Conflict: 409,
    PayloadTooLarge: 413,
    UnsupportedMediaType: 415,
    SignatureMismatch: 422,
    InferenceFailed: 422,
    GateRefused: 422,
    QueueFull: 429,
    NotReady: 503,
    DeadlineExceeded: 504,
}
# The Open Inference Protocol and MLflow know no 422: a request that does not fit the model is a bad request.
OPEN_INFERENCE = STATUS | {SignatureMismatch: 400, InferenceFailed: 400}


def status_of(error: ServingError, protocol: str = "v1") -> int:
    """Return the HTTP status for an error."""
    return by_kind(STATUS if protocol == "v1" else OPEN_INFERENCE, error, 500)


_MLFLOW_CODES = {
    400: "BAD_REQUEST",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "RESOURCE_DOES_NOT_EXIST",
    413: "BAD_REQUEST",
    415: "BAD_REQUEST",
    429: "REQUEST_LIMIT_EXCEEDED",
    503: "TEMPORARILY_UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


def refusal(error: ServingError, protocol: str) -> tuple[int, HeaderList, bytes]:
    """Return status, headers and body of an answer that says no."""
    return status_of(error, protocol), error_headers(error), error_body(error, protocol)


def error_body(error: ServingError, protocol: str = "v1") -> bytes:
    """Write `{"error": ..., "details": [{"path", "message"}]}`; details, if there are any.

    After a lost race it has `current` too, and from the gate `report`. MLflow has `error_code` and `message` in place
    of `error`.
    """
    body: dict[str, object] = {"error": error.message}
    if protocol == "mlflow":
        code = _MLFLOW_CODES.get(status_of(error, protocol), "INTERNAL_ERROR")
        body = {"error_code": code, "message": error.message}
    if isinstance(error, GenerationConflict):
        body["current"] = error.current
    if isinstance(error, GateRefused):
        body["report"] = error.report.model_dump(mode="json")
    if error.details:
        body["details"] = [{"path": d.path, "message": d.message} for d in error.details]
    return dumps(body)


def error_headers(error: ServingError) -> HeaderList:
    """Return the headers that an error adds."""
    if isinstance(error, QueueFull):
        return [(b"retry-after", b"%d" % error.retry_after)]
    if isinstance(error, Unauthenticated):  # RFC 6750, 3
        return [
            (b"www-authenticate", b'Bearer realm="serving"' + (b', error="invalid_token"' if error.invalid else b""))
        ]
    if isinstance(error, Forbidden) and error.scope is not None:
        challenge = f'Bearer realm="serving", error="insufficient_scope", scope="{error.scope}"'
        return [(b"www-authenticate", challenge.encode())]
    return []
