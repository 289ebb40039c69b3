"""`Client` and `AsyncClient`: two ways to drive the same conversations."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, ClassVar, Generic, Self, TypeVar, Unpack, overload

from numpy.typing import NDArray

from serving.client.conversation import (
    Answer,
    Asking,
    Conversation,
    Conversations,
    Infer,
    Outcomes,
    Pause,
    Request,
    Which,
)
from serving.client.given import Arrays, F
from serving.client.refusals import Refused
from serving.client.retries import Retries
from serving.errors import InvalidRequest

try:
    import httpx2 as httpx

    from serving.client import http_transport as http_wire
except ImportError:
    raise ImportError('the client needs httpx2: pip install "serving[client]"') from None

T = TypeVar("T")
H = TypeVar("H", httpx.Client, httpx.AsyncClient)


class _Base(Generic[H]):
    """What both clients are told, and how they speak."""

    _own_http: ClassVar[type[httpx.Client | httpx.AsyncClient]]

    def __init__(
        self,
        url: str = "http://127.0.0.1:8080",
        *,
        api_key: str | None = None,
        timeout: float = 30.0,
        retries: int = 2,
        repeat: bool = False,
        grpc: str | None = None,
        http: H | None = None,
    ) -> None:
        if not (api_key or "").isascii() or not (api_key or "").isprintable():
            raise InvalidRequest("api_key: is none: it has characters that no header takes")
        self._url = url
        self._api_key = api_key
        self._own = http is None
        self._http: Any = http if http is not None else self._own_http(limits=http_wire.LIMITS)
        self._process = os.getpid()
        self._channel: Any = None
        self._infer: Any = None
        if grpc is not None:
            self._channel = _grpc().channel(grpc, asynchronous=isinstance(self, AsyncClient))
            self._infer = _grpc().method(self._channel)
        self._conversations = Conversations(timeout=timeout, retries=Retries(retries, repeat), grpc=grpc is not None)

    def _asked(self, step: Infer) -> Any:
        """Begin to ask over gRPC; what is returned is the response, or is awaited for it."""
        return self._infer(**_grpc().arguments(step, self._api_key))

    def _built(self, step: Request) -> httpx.Request:
        if self._own and self._process != os.getpid():  # forked: two processes would read each other's answers
            self._http, self._process = self._own_http(limits=http_wire.LIMITS), os.getpid()
        return http_wire.built(self._http, step, self._url, self._api_key)


class Client(_Base[httpx.Client]):
    """A client of one server, for any number of threads; keep it, and its connections are used again.

    url: such as `http://127.0.0.1:8080`. api_key: sent as bearer. timeout: seconds for one call, its retries included;
    the server is told what is left of it. retries: how often a request is sent again that the server was too busy for
    or never got. repeat: send also again what may have run (a lost answer, a 502 or 504). grpc: `host:port`, or
    `grpcs://host:port`; tensors go there. http: an `httpx2.Client` of your own, for other certificates or proxies.
    """

    _own_http = httpx.Client

    @overload
    def predict(self, model: str, rows: Arrays, **which: Unpack[Which]) -> dict[str, NDArray[Any]]: ...
    @overload
    def predict(self, model: str, rows: Mapping[str, Any] | Sequence[Any], **which: Unpack[Which]) -> Any: ...
    @overload
    def predict(self, model: str, rows: F, **which: Unpack[Which]) -> F: ...
    def predict(self, model: str, rows: Any, **which: Unpack[Which]) -> Any:
        """Predict, and answer in the kind of the rows, in their order.

        rows: dicts by feature name or lists by position give a list of predictions, as V1 has them, and a single dict
        one prediction. An array [rows, features], or a dict of arrays by feature or input name, gives arrays by name:
        `label` [rows] and `probabilities` [rows, classes] of a classifier, else the outputs. A DataFrame of pandas or
        polars gives one: `label`, `probabilities.<class>`, or a column for each output; pandas keeps its index.

        version, label: which version answers; without them the stable one, or a canary. timeout: seconds, in place of
        the client's own. Raises a `serving.ServingError`: `SignatureMismatch` has the bad cells in `details`.
        """
        return self.answer(model, rows, **which).predictions

    def answer(self, model: str, rows: Any, **asking: Unpack[Asking]) -> Answer:
        """Predict as `predict` does, and say which version answered.

        request_id: what the request is called in logs, traces and `feedback`; without it, a name of its own.
        """
        return self._run(self._conversations.predict(model, rows, **asking))

    def describe(self, model: str, version: str | None = None) -> dict[str, Any]:
        """Return what a model takes and answers: features, classes, tensors, an example."""
        return self._run(self._conversations.describe(model, version))

    def drift(self, model: str, version: str | None = None) -> dict[str, Any]:
        """Return whether the rows that a version gets are as those that it was made for: histograms, PSI, p-values."""
        return self._run(self._conversations.drift(model, version))

    def feedback(self, model: str, outcomes: Outcomes) -> int:
        """Tell what turned out to be true of earlier predictions; return how many outcomes the server has taken.

        outcomes: by `Answer.request_id`, the outcome of a request's one row, or those of all its rows in their order:
        the right label, or the right number. For models whose model.toml has [feedback].
        """
        return self._run(self._conversations.feedback(model, outcomes))

    def close(self) -> None:
        """Close the connections."""
        if self._own:
            self._http.close()
        if self._channel is not None:
            self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, conversation: Conversation[T]) -> T:
        heard: Any = None
        while True:
            try:
                step = conversation.throw(heard) if isinstance(heard, Refused) else conversation.send(heard)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            try:
                heard = self._heard(step)
            except Refused as refused:
                heard = refused

    def _heard(self, step: Request | Infer | Pause) -> Any:
        if isinstance(step, Pause):
            return time.sleep(step.seconds)
        wire = _grpc() if isinstance(step, Infer) else http_wire
        try:
            if isinstance(step, Infer):
                return wire.received(self._asked(step))
            request = self._built(step)
            return wire.received(http_wire.sent(self._http, request, step.seconds))
        except wire.FAULTS as error:
            raise wire.refused(error) from error


class AsyncClient(_Base[httpx.AsyncClient]):
    """`Client` for asyncio, with the same arguments (`http` is an `httpx2.AsyncClient`) and the same answers."""

    _own_http = httpx.AsyncClient

    @overload
    async def predict(self, model: str, rows: Arrays, **which: Unpack[Which]) -> dict[str, NDArray[Any]]: ...
    @overload
    async def predict(self, model: str, rows: Mapping[str, Any] | Sequence[Any], **which: Unpack[Which]) -> Any: ...
    @overload
    async def predict(self, model: str, rows: F, **which: Unpack[Which]) -> F: ...
    async def predict(self, model: str, rows: Any, **which: Unpack[Which]) -> Any:
        """Predict as `Client.predict` does."""
        return (await self.answer(model, rows, **which)).predictions

    async def answer(self, model: str, rows: Any, **asking: Unpack[Asking]) -> Answer:
        """Predict as `predict` does, and say which version answered; request_id: see `Client.answer`."""
        return await self._run(self._conversations.predict(model, rows, **asking))

    async def describe(self, model: str, version: str | None = None) -> dict[str, Any]:
        """Return what a model takes and answers: features, classes, tensors, an example."""
        return await self._run(self._conversations.describe(model, version))

    async def drift(self, model: str, version: str | None = None) -> dict[str, Any]:
        """Return whether the rows that a version gets are as those that it was made for: histograms, PSI, p-values."""
        return await self._run(self._conversations.drift(model, version))

    async def feedback(self, model: str, outcomes: Outcomes) -> int:
        """Tell what turned out to be true, as `Client.feedback` does."""
        return await self._run(self._conversations.feedback(model, outcomes))

    async def close(self) -> None:
        """Close the connections."""
        if self._own:
            await self._http.aclose()
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, conversation: Conversation[T]) -> T:
        heard: Any = None
        while True:
            try:
                step = conversation.throw(heard) if isinstance(heard, Refused) else conversation.send(heard)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            try:
                heard = await self._heard(step)
            except Refused as refused:
                heard = refused

    async def _heard(self, step: Request | Infer | Pause) -> Any:
        if isinstance(step, Pause):
            return await asyncio.sleep(step.seconds)
        wire = _grpc() if isinstance(step, Infer) else http_wire
        try:
            if isinstance(step, Infer):
                return wire.received(await self._asked(step))
            request = self._built(step)
            async with asyncio.timeout(step.seconds):  # httpx2 alone bounds each piece, and not the whole
                return wire.received(await self._http.send(request))
        except wire.FAULTS as error:
            raise wire.refused(error) from error


def _grpc() -> Any:
    try:
        from serving.client import grpc_transport  # noqa: PLC0415  an extra of its own
    except ImportError:
        raise ImportError('gRPC needs grpcio: pip install "serving[client-grpc]"') from None
    return grpc_transport
