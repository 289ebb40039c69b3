"""What a client says and hears, without I/O: generators that yield what to send or how long to wait.

`Client` and `AsyncClient` drive the same generators. What they yield is answered with what was received, or by throwing
`Refused` into them.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypedDict, TypeVar
from urllib.parse import quote

import numpy as np
import orjson

from serving.client import given as rows_given
from serving.client import open_inference, tensors
from serving.client.given import BINARY_CELLS, Given, cells
from serving.client.open_inference import Outputs
from serving.client.refusals import Refused, ServerFailed
from serving.client.retries import Retries
from serving.client.tensors import Tensor
from serving.engine.signature import Signature
from serving.errors import DeadlineExceeded, InvalidRequest, PayloadTooLarge, ServingError
from serving.prediction.request_id import request_id as _named
from serving.protocols.predict_v1_response import Answers

TIMEOUT = "X-Request-Timeout"
_ID = "X-Request-Id"
_LONGEST_S = 1e9
_JSON = {"content-type": "application/json"}


class Request(NamedTuple):
    """One HTTP request."""

    method: str
    path: str
    headers: Mapping[str, str] = {}
    body: bytes = b""
    seconds: float = 0.0
    """Until the deadline; the server is told so."""

    def within(self, seconds: float) -> Request:
        """Give it the time that is left."""
        return self._replace(headers={**self.headers, TIMEOUT: f"{seconds:.6f}"}, seconds=seconds)


class Infer(NamedTuple):
    """One ModelInfer call, for clients of gRPC."""

    model: str
    version: str | None
    tensors: Sequence[Tensor]
    request_id: str
    seconds: float = 0.0

    def within(self, seconds: float) -> Infer:
        """Give it the time that is left."""
        return self._replace(seconds=seconds)


class Pause(NamedTuple):
    """Wait so long."""

    seconds: float


class Received(NamedTuple):
    """A 2xx answer over HTTP; headers by lower-case name."""

    headers: Mapping[str, str]
    body: bytes


class Answer(NamedTuple):
    """A prediction, and who made it."""

    predictions: Any
    """In the kind of the rows: what `Client.predict` returns."""
    model: str
    version: str
    request_id: str | None = None
    """What the server calls it, and `Client.feedback`; None in this process, where its headers say that."""


class Which(TypedDict, total=False):
    """What `predict` takes besides rows."""

    version: str | None
    label: str | None
    timeout: float | None


class Asking(Which, total=False):
    """What `answer` takes besides rows."""

    request_id: str | None


Outcome: TypeAlias = str | bool | int | float
Outcomes: TypeAlias = Mapping[str, Outcome | Sequence[Outcome]]
"""What turned out to be true, by request: of its one row, or of all its rows in order."""


class _Call(NamedTuple):
    """Who is to answer one prediction, what it is called, and until when (monotonic seconds)."""

    model: str
    version: str | None
    label: str | None
    identity: str
    deadline: float


T = TypeVar("T")
Conversation: TypeAlias = Generator[Request | Infer | Pause, Any, T]


class Conversations:
    """Makes the conversations of one client, and remembers what models are like.

    timeout: seconds for a whole call, its retries included. grpc: tensors go by ModelInfer.
    """

    def __init__(self, *, timeout: float, retries: Retries, grpc: bool) -> None:
        self._timeout = timeout
        self._retries = retries
        self._grpc = grpc
        self._known: dict[tuple[str, str | None], Signature] = {}
        """Signatures by model and version; None: of the one that answered last."""
        self._writers: dict[tuple[str, str], Answers] = {}

    def describe(self, model: str, version: str | None = None) -> Conversation[dict[str, Any]]:
        """Ask what a model is like."""
        return self._document(Request("GET", _path(model, version)), _deadline(self._timeout))

    def drift(self, model: str, version: str | None = None) -> Conversation[dict[str, Any]]:
        """Ask whether a version's rows are as those that it was made for."""
        return self._document(Request("GET", f"{_path(model, version)}/drift"), _deadline(self._timeout))

    def feedback(self, model: str, outcomes: Outcomes) -> Conversation[int]:
        """Tell what turned out to be true."""
        rows = [
            {"id": identity, "outcomes": list(told) if np.ndim(told) else [told]}  # type: ignore[arg-type]
            for identity, told in outcomes.items()
        ]
        request = Request("POST", f"{_path(model)}:feedback", _JSON, rows_given.written({"feedback": rows}))
        document = yield from self._document(request, _deadline(self._timeout))
        try:
            return int(document["accepted"])
        except (KeyError, TypeError, ValueError):
            raise _strange() from None

    def predict(
        self,
        model: str,
        data: Any,
        *,
        version: str | None = None,
        label: str | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Conversation[Answer]:
        """Ask for a prediction. Raises ServingError."""
        if version is not None and label is not None:
            raise InvalidRequest("give a version or a label, not both")
        deadline = _deadline(self._timeout if timeout is None else timeout)
        call = _Call(model, version, label, _identity(request_id), deadline)
        asked = rows_given.given(data)
        names: Sequence[str] = ()
        made: Sequence[Tensor] | None = None
        refused: ServingError | None = None
        if asked.rows is None or cells(asked.rows) >= BINARY_CELLS:
            signature = yield from self._signature(model, version, deadline)
            names = [feature.name for feature in signature.features]
            made = tensors.tensors_of(asked, signature) if label is None else None
        if made is not None:
            try:
                outputs = yield from self._infer(call, made)
                answering = yield from self._signature(model, outputs.version, deadline)
            except InvalidRequest as error:
                # Nothing has run. Of rows as JSON the server says which cells are bad; and the model may have changed.
                refused = error
                self._forget(model)
            else:
                if version is None:
                    self._known[model, None] = answering
                if _inputs(answering) == _inputs(signature):
                    return self._answered(call, asked, outputs, answering)
                # To the version that answered the tensors may have meant something else: again, by name.
        try:
            return (yield from self._by_json(call, asked, names))
        except PayloadTooLarge:
            if refused is not None:
                raise refused from None
            raise

    def _answered(self, call: _Call, asked: Given, outputs: Outputs, signature: Signature) -> Answer:
        """Give a version's outputs in the kind of what was asked."""
        if asked.rows is None:
            columns = tensors.answered(outputs.tensors, signature)
            predictions = rows_given.in_kind(asked, columns, signature.classes or ())
        else:
            writer = self._writers.get((call.model, outputs.version))
            if writer is None:
                writer = Answers(signature, call.model, outputs.version)
                self._writers[call.model, outputs.version] = writer
            # The server's own writer: the same numbers, digit by digit, as the answer to rows sent as JSON.
            text = writer.rows(tuple(outputs.tensors[spec.name] for spec in signature.outputs))
            predictions = orjson.loads(text)["predictions"]
        return Answer(predictions, call.model, outputs.version, call.identity)

    def _by_json(self, call: _Call, asked: Given, names: Sequence[str]) -> Conversation[Answer]:
        path = f"{_path(call.model, call.version, call.label)}:predict"
        request = Request("POST", path, {**_JSON, _ID: call.identity}, rows_given.body(asked, names))
        document = yield from self._document(request, call.deadline)
        try:
            answered = str(document["model_version"])
            if asked.rows is not None:
                predictions = document["predictions"][0] if asked.kind == "row" else document["predictions"]
            else:
                signature = yield from self._signature(call.model, answered, call.deadline)
                columns = tensors.read_columns(document["outputs"], signature)
                predictions = rows_given.in_kind(asked, columns, signature.classes or ())
        except (KeyError, TypeError, IndexError, ValueError):
            raise _strange() from None
        return Answer(predictions, call.model, answered, call.identity)

    def _infer(self, call: _Call, made: Sequence[Tensor]) -> Conversation[Outputs]:
        if self._grpc:
            step = Infer(call.model, call.version, made, call.identity)
            outputs: Outputs = yield from self._asked(step, call.deadline)
            return outputs
        headers, body = open_inference.binary(made)
        path = f"{_path(call.model, call.version, protocol='v2')}/infer"
        request = Request("POST", path, {**headers, _ID: call.identity}, body)
        received = yield from self._asked(request, call.deadline)
        try:
            return open_inference.read_binary(received.headers, received.body)
        except (ValueError, KeyError, TypeError, ServingError):
            raise _strange() from None

    def _signature(self, model: str, version: str | None, deadline: float) -> Conversation[Signature]:
        """Return what a model is like; asked for once a version."""
        known = self._known.get((model, version))
        if known is None:
            document = yield from self._document(Request("GET", _path(model, version)), deadline)
            try:
                # A server that is newer than this client may say more.
                known = Signature.model_validate(
                    {name: document[name] for name in Signature.model_fields if name in document}, extra="ignore"
                )
                self._known[model, str(document["version"])] = self._known[model, version] = known
            except (ValueError, KeyError, TypeError):
                raise _strange() from None
        return known

    def _forget(self, model: str) -> None:
        for key in [key for key in self._known if key[0] == model]:
            del self._known[key]

    def _document(self, request: Request, deadline: float) -> Conversation[dict[str, Any]]:
        received = yield from self._asked(request, deadline)
        try:
            document: dict[str, Any] = orjson.loads(received.body)
        except ValueError:
            raise _strange() from None
        return document

    def _asked(self, request: Request | Infer, deadline: float) -> Conversation[Any]:
        """Send a request, each time with the seconds that are left, until it is answered or given up."""
        attempt = 0
        while True:
            attempt += 1
            left = deadline - time.monotonic()
            if left <= 0:
                raise DeadlineExceeded("the time for this call is over")
            try:
                return (yield request.within(left))
            except Refused as refused:
                pause = self._retries.pause(refused, attempt, deadline - time.monotonic())
                if pause is None:
                    raise refused.error from refused.__cause__
            yield Pause(pause)


def _deadline(timeout: float) -> float:
    if not abs(timeout) < _LONGEST_S:
        raise InvalidRequest(f"timeout: should be seconds, fewer than a billion, and is {timeout}")
    return time.monotonic() + timeout


def _path(model: str, version: str | None = None, label: str | None = None, protocol: str = "v1") -> str:
    parts = [("models", model), ("versions", version), ("labels", label)]
    return f"/{protocol}" + "".join(f"/{kind}/{_quoted(name)}" for kind, name in parts if name is not None)


def _quoted(name: str) -> str:
    """Write a name as one part of a path. Raises InvalidRequest for what can be none."""
    if not name or name in (".", ".."):
        raise InvalidRequest(f"{name!r} is no name of a model, version or label")
    return quote(name, safe="")


def _identity(given: str | None) -> str:
    """Return what a request is called: what it is to be, or a name of its own. Raises InvalidRequest."""
    made = _named(None if given is None else given.encode(errors="replace")).decode()
    if given is not None and made != given:
        raise InvalidRequest(f"request_id: {given[:40]!r} is none: up to 128 letters, digits and signs, without spaces")
    return made


def _inputs(signature: Signature) -> Any:
    """Return what decides what a request's tensors mean."""
    return signature.inputs, signature.layout, [(f.name, f.datatype) for f in signature.features]


def _strange() -> ServerFailed:
    return ServerFailed("the answer is none of this protocol: is this the address of a model server?")
