"""Serve a folder of ONNX models, also within an application of your own, and ask such a server.

What is named in `__all__` is all that is public, and is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.client.client import AsyncClient as AsyncClient
    from serving.client.client import Client as Client
    from serving.client.conversation import Answer as Answer
    from serving.client.refusals import AnswerLost as AnswerLost
    from serving.client.refusals import ConnectionFailed as ConnectionFailed
    from serving.client.refusals import ServerFailed as ServerFailed
    from serving.errors import DeadlineExceeded as DeadlineExceeded
    from serving.errors import Detail as Detail
    from serving.errors import Forbidden as Forbidden
    from serving.errors import InferenceFailed as InferenceFailed
    from serving.errors import InvalidRequest as InvalidRequest
    from serving.errors import ModelNotFound as ModelNotFound
    from serving.errors import NotReady as NotReady
    from serving.errors import PayloadTooLarge as PayloadTooLarge
    from serving.errors import QueueFull as QueueFull
    from serving.errors import ServingError as ServingError
    from serving.errors import SignatureMismatch as SignatureMismatch
    from serving.errors import Unauthenticated as Unauthenticated
    from serving.http_api.app import router as router
    from serving.http_api.own_route import error_response as error_response
    from serving.in_process.fake import FakePredictor as FakePredictor
    from serving.in_process.predictor import Predictor as Predictor
    from serving.library import create_app as create_app
    from serving.library import lifespan as lifespan
    from serving.library import predictor as predictor

_HOME = {
    "AsyncClient": "serving.client.client",
    "Client": "serving.client.client",
    "Answer": "serving.client.conversation",
    "AnswerLost": "serving.client.refusals",
    "ConnectionFailed": "serving.client.refusals",
    "ServerFailed": "serving.client.refusals",
    "DeadlineExceeded": "serving.errors",
    "Detail": "serving.errors",
    "Forbidden": "serving.errors",
    "InferenceFailed": "serving.errors",
    "InvalidRequest": "serving.errors",
    "ModelNotFound": "serving.errors",
    "NotReady": "serving.errors",
    "PayloadTooLarge": "serving.errors",
    "QueueFull": "serving.errors",
    "ServingError": "serving.errors",
    "SignatureMismatch": "serving.errors",
    "Unauthenticated": "serving.errors",
    "router": "serving.http_api.app",
    "error_response": "serving.http_api.own_route",
    "FakePredictor": "serving.in_process.fake",
    "Predictor": "serving.in_process.predictor",
    "create_app": "serving.library",
    "lifespan": "serving.library",
    "predictor": "serving.library",
}
"""Where each public name is defined."""

__all__ = sorted(_HOME)  # noqa: PLE0605  one list


def __getattr__(name: str) -> Any:
    # Not at once: the server must not load an HTTP client, nor a client onnxruntime.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
