"""`Client` and `AsyncClient`: two ways to drive the same conversations."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, overload

from numpy.typing import NDArray

from serving.client.conversation import Answer, Conversation, Conversations, Infer, Pause
from serving.client.given import F
from serving.client.refusals import Refused
from serving.client.retries import Retries

try:
    import httpx2 as httpx

    from serving.client import http_transport as http_wire
except ImportError:
    raise ImportError('the client needs httpx2: pip install "serving[client]"') from None

T = TypeVar("T")


class _Base:
    """What both clients are told, and how they speak."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None,
        timeout: float,
        retries: Retries,
        grpc: str | None,
    ) -> None:
        self._url = url
        self._api_key = api_key
        self._channel: Any = None
        self._infer: Any = None
        if grpc is not None:
            self._channel = _grpc().channel(grpc, asynchronous=isinstance(self, AsyncClient))
            self._infer = _grpc().method(self._channel)
        self._conversations = Conversations(timeout=timeout, retries=retries, grpc=grpc is not None)


class Client(_Base):
    """A client of one server, for any number of threads; keep it, and its connections are used again.

    url: such as `http://127.0.0.1:8080`. api_key: sent as bearer. timeout: seconds for one call, its retries included;
    the server is told what is left of it. retries: how often a request is sent again that the server was too busy for
    or never got. repeat: send also again what may have run (a lost answer, a 502 or 504). grpc: `host:port`, or
    `grpcs://host:port`; tensors go there. http: an `httpx2.Client` of your own, for other certificates or proxies.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8080",
        *,
        api_key: str | None = None,
        timeout: float = 30.0,
        retries: int = 2,
        repeat: bool = False,
        grpc: str | None = None,
        http: httpx.Client | None = None,
    ) -> None:
        super().__init__(url, api_key=api_key, timeout=timeout, retries=Retries(retries, repeat), grpc=grpc)
        self._own = http is None
        self._http = http if http is not None else httpx.Client(limits=http_wire.LIMITS)

    @overload
    def predict(
        self,
        model: str,
        rows: NDArray[Any] | Mapping[str, NDArray[Any]],
        *,
        version: str | None = None,
        label: str | None = None,
        timeout: float | None = None,
    ) -> dict[str, NDArray[Any]]: ...
    @overload
    def predict(
        self,
        model: str,
        rows: Mapping[str, Any] | Sequence[Any],
        *,
        version: str | None = None,
        label: str | None = None,
        timeout: float | None = None,
    ) -> Any: ...
    @overload
    def predict(
        self,
        model: str,
        rows: F,
        *,
        version: str | None = None,
        label: str | None = None,
        timeout: float | None = None,
    ) -> F: ...
    def predict(
        self,
        model: str,
        rows: Any,
        *,
        version: str | None = None,
        label: str | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Predict, and answer in the kind of the rows, in their order.

        rows: dicts by feature name or lists by position give a list of predictions, as V1 has them, and a single dict
        one prediction. An array [rows, features], or a dict of arrays by feature or input name, gives arrays by name:
        `label` [rows] and `probabilities` [rows, classes] of a classifier, else the outputs. A DataFrame of pandas or
        polars gives one: `label`, `probabilities.<class>`, or a column for each output; pandas keeps its index.

        version, label: which version answers; without them the stable one, or a canary. timeout: seconds, in place of
        the client's own. Raises a `serving.ServingError`: `SignatureMismatch` has the bad cells in `details`.
        """
        return self.answer(model, rows, version=version, label=label, timeout=timeout).predictions

    def answer(
        self,
        model: str,
        rows: Any,
        *,
        version: str | None = None,
        label: str | None = None,
        timeout: float | None = None,
    ) -> Answer:
        """Predict as `predict` does, and say which version answered."""
        return self._run(self._conversations.predict(model, rows, version=version, label=label, timeout=timeout))

    def describe(self, model: str, version: str | None = None) -> dict[str, Any]:
        """Return what a model takes and answers: features, classes, tensors, an example."""
        return self._run(self._conversations.describe(model, version))

    def drift(self, model: str, version: str | None = None) -> dict[str, Any]:
        """Return whether the rows that a version gets are as those that it was made for: histograms, PSI, p-values."""
        return self._run(self._conversations.drift(model, version))

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
        refused: Refused | None = None
        while True:
            try:
                step = conversation.throw(refused) if refused is not None else conversation.send(heard)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            heard = refused = None
            if isinstance(step, Pause):
                time.sleep(step.seconds)
                continue
            try:
                heard = self._sent(step)
            except Refused as error:
                refused = error

    def _sent(self, step: Any) -> Any:
        if isinstance(step, Infer):
            try:
                return _grpc().received(self._infer(**_grpc().arguments(step, self._api_key)))
            except _grpc().grpc.RpcError as error:
                raise _grpc().refused(error) from error
        try:
            return http_wire.received(self._http.send(http_wire.built(self._http, step, self._url, self._api_key)))
        except httpx.HTTPError as error:
            raise http_wire.refused(error) from error


class AsyncClient(_Base):
    """`Client` for asyncio, with the same arguments (`http` is an `httpx2.AsyncClient`) and the same answers."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8080",
        *,
        api_key: str | None = None,
        timeout: float = 30.0,
        retries: int = 2,
        repeat: bool = False,
        grpc: str | None = None,
        http: httpx.AsyncClient | None = None,
    ) -> None:
        super().__init__(url, api_key=api_key, timeout=timeout, retries=Retries(retries, repeat), grpc=grpc)
        self._own = http is None
        self._http = http if http is not None else httpx.AsyncClient(limits=http_wire.LIMITS)

    @overload
    async def predict(
        self,
        model: str,
        rows: NDArray[Any] | Mapping[str, NDArray[Any]],
        *,
        version: str | None = None,
        label: str | None = None,
        timeout: float | None = None,
    ) -> dict[str, NDArray[Any]]: ...
    @overload
    async def predict(
        self,
        model: str,
        rows: Mapping[str, Any] | Sequence[Any],
        *,
        version: str | None = None,
        label: str | None = None,
        timeout: float | None = None,
    ) -> Any: ...
    @overload
    async def predict(
        self,
        model: str,
        rows: F,
        *,
        version: str | None = None,
        label: str | None = None,
        timeout: float | None = None,
    ) -> F: ...
    async def predict(
        self,
        model: str,
        rows: Any,
        *,
        version: str | None = None,
        label: str | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Predict as `Client.predict` does."""
        return (await self.answer(model, rows, version=version, label=label, timeout=timeout)).predictions

    async def answer(
        self,
        model: str,
        rows: Any,
        *,
        version: str | None = None,
        label: str | None = None,
        timeout: float | None = None,
    ) -> Answer:
        """Predict as `predict` does, and say which version answered."""
        return await self._run(self._conversations.predict(model, rows, version=version, label=label, timeout=timeout))

    async def describe(self, model: str, version: str | None = None) -> dict[str, Any]:
        """Return what a model takes and answers: features, classes, tensors, an example."""
        return await self._run(self._conversations.describe(model, version))

    async def drift(self, model: str, version: str | None = None) -> dict[str, Any]:
        """Return whether the rows that a version gets are as those that it was made for: histograms, PSI, p-values."""
        return await self._run(self._conversations.drift(model, version))

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
        refused: Refused | None = None
        while True:
            try:
                step = conversation.throw(refused) if refused is not None else conversation.send(heard)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            heard = refused = None
            if isinstance(step, Pause):
                await asyncio.sleep(step.seconds)
                continue
            try:
                heard = await self._sent(step)
            except Refused as error:
                refused = error

    async def _sent(self, step: Any) -> Any:
        if isinstance(step, Infer):
            try:
                return _grpc().received(await self._infer(**_grpc().arguments(step, self._api_key)))
            except _grpc().grpc.RpcError as error:
                raise _grpc().refused(error) from error
        try:
            return http_wire.received(
                await self._http.send(http_wire.built(self._http, step, self._url, self._api_key))
            )
        except httpx.HTTPError as error:
            raise http_wire.refused(error) from error


def _grpc() -> Any:
    try:
        from serving.client import grpc_transport  # noqa: PLC0415  an extra of its own
    except ImportError:
        raise ImportError('gRPC needs grpcio: pip install "serving[client-grpc]"') from None
    return grpc_transport
