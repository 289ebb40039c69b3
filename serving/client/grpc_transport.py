"""ModelInfer over gRPC, by grpcio: its only owner. The messages are the server's own, apart from any stubs."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio

from serving.client import open_inference
from serving.client.conversation import Infer
from serving.client.open_inference import Outputs
from serving.client.refusals import AnswerLost, ConnectionFailed, Refused, ServerFailed
from serving.errors import (
    DeadlineExceeded,
    Forbidden,
    InvalidRequest,
    ModelNotFound,
    NotReady,
    PayloadTooLarge,
    QueueFull,
    ServingError,
    Unauthenticated,
)
from serving.protocols.messages import SERVICE, message

FAULTS = grpc.RpcError
"""What is raised where there is no answer."""
_METHOD = f"/{SERVICE}/ModelInfer"
_REQUEST, _RESPONSE = message("ModelInferRequest"), message("ModelInferResponse")
_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
_BROKEN = (
    "Socket closed",
    "Stream removed",
    "Connection reset",
    "Broken pipe",
    "GOAWAY",
    "Transport closed",
    "recvmsg",
)
"""What grpcio says where a connection has broken."""
_Code = grpc.StatusCode
STATUS: dict[Any, type[ServingError]] = {
    _Code.INVALID_ARGUMENT: InvalidRequest,
    _Code.UNAUTHENTICATED: Unauthenticated,
    _Code.PERMISSION_DENIED: Forbidden,
    _Code.NOT_FOUND: ModelNotFound,
    _Code.DEADLINE_EXCEEDED: DeadlineExceeded,
    _Code.RESOURCE_EXHAUSTED: PayloadTooLarge,
    _Code.UNAVAILABLE: NotReady,
}


def channel(target: str, *, asynchronous: bool) -> Any:
    """Make a channel to `host:port`, or, with TLS, `grpcs://host:port`."""
    module = grpc.aio if asynchronous else grpc
    if target.startswith("grpcs://"):
        return module.secure_channel(target.removeprefix("grpcs://"), grpc.ssl_channel_credentials(), options=_OPTIONS)
    return module.insecure_channel(target.removeprefix("grpc://"), options=_OPTIONS)


def method(channel: Any) -> Any:
    """Return what calls ModelInfer."""
    return channel.unary_unary(_METHOD, _REQUEST.SerializeToString, _RESPONSE.FromString)


def arguments(call: Infer, api_key: str | None) -> dict[str, Any]:
    """Return a call as both kinds of channel take it."""
    return {
        "request": open_inference.message(_REQUEST, call.model, call.version, call.tensors, call.request_id),
        "timeout": call.seconds,
        "metadata": (("authorization", f"Bearer {api_key}"),) if api_key else (),
    }


def received(response: Any) -> Outputs:
    """Read an answer. Raises Refused where it is none."""
    try:
        return open_inference.read_message(response)
    except (ValueError, ServingError):
        raise Refused(ServerFailed("the answer is none of this protocol")) from None


def refused(error: Any) -> Refused:
    """Say what a status means; error: grpc.RpcError."""
    code, text = error.code(), error.details() or ""
    trailers = {str(key): value for key, value in error.trailing_metadata() or ()}
    after = trailers.get("retry-after")
    if code is _Code.RESOURCE_EXHAUSTED and after is not None:
        return Refused(QueueFull(text, int(after)), retry_after=float(after))
    if code is _Code.UNAVAILABLE and "failed to connect" in text:
        return Refused(ConnectionFailed(f"the server can't be reached: {text}"))
    if code is _Code.UNAVAILABLE and any(sign in text for sign in _BROKEN):
        return Refused(AnswerLost(f"the connection broke before the answer was there: {text}"), ran=True)
    kind = STATUS.get(code, ServerFailed)
    # Nothing tells a server's own UNAVAILABLE, before a run, from one that grpcio makes of a broken connection.
    return Refused(kind(text), ran=kind in (DeadlineExceeded, ServerFailed, NotReady))
