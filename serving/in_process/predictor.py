"""Predictions for code that runs in the server's own process: a transport whose answer a coroutine gets."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Unpack, overload

from numpy.typing import NDArray

from serving.client import given as rows_given
from serving.client.conversation import Answer, Which
from serving.client.given import Arrays, F
from serving.errors import InvalidRequest, ServingError
from serving.in_process.codec import PROTOCOL, Codec
from serving.prediction.endpoints import EndpointTable
from serving.prediction.prediction import Prediction
from serving.prediction.request_options import RequestOptions, request_options
from serving.protocols.headers import Headers

# With a slash in any case, and no version begins with @: a model's name passes for nothing else.
ROUTES = {
    (PROTOCOL, "name"): "{model}/",
    (PROTOCOL, "version"): "{model}/{version}",
    (PROTOCOL, "label"): "{model}/@{label}",
}
CODECS = {PROTOCOL: Codec}


class Asking(Which, total=False):
    """What `predict` takes besides rows."""

    headers: Mapping[str, str] | None


class InProcessPrediction(Prediction):
    """A prediction whose outputs, or error, a coroutine waits for."""

    __slots__ = ("finished",)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.finished: asyncio.Future[Any] = loop.create_future()

    def answer(self, response: Any) -> None:  # noqa: D102
        if not self.finished.done():
            self.finished.set_result(response)

    def refuse(self, error: ServingError) -> None:  # noqa: D102
        if not self.finished.done():
            self.finished.set_exception(error)


class Predictor:
    """Asks one model in this process, as a request over HTTP would: in the same batches, canary, shadow and metrics.

    For the event loop that serves. Who may ask is for the caller to say: no key is needed.
    """

    def __init__(self, model: str, endpoints: EndpointTable) -> None:
        self.model = model
        self._endpoints = endpoints

    @overload
    async def predict(self, rows: Arrays, **asking: Unpack[Asking]) -> dict[str, NDArray[Any]]: ...
    @overload
    async def predict(self, rows: Mapping[str, Any] | Sequence[Any], **asking: Unpack[Asking]) -> Any: ...
    @overload
    async def predict(self, rows: F, **asking: Unpack[Asking]) -> F: ...
    async def predict(self, rows: Any, **asking: Unpack[Asking]) -> Any:
        """Predict for rows; the answer is of their kind, as `serving.Client.predict` gives it.

        rows: dicts by feature name, lists by position, one dict, a DataFrame of pandas or polars, an array [rows,
        features], or arrays by the name of a feature or of an input. timeout: seconds; without it the server's
        deadline. headers: of the request that this is asked for; a canary that follows a header goes by them, and so do
        X-Request-Timeout and X-Request-Priority. Whoever is cancelled while waiting leaves the queue.

        Raises a ServingError: SignatureMismatch with every bad cell in `details`, InvalidRequest, ModelNotFound,
        NotReady, QueueFull, DeadlineExceeded, InferenceFailed.
        """
        return (await self.answer(rows, **asking)).predictions

    async def answer(
        self,
        rows: Any,
        *,
        version: str | None = None,
        label: str | None = None,
        timeout: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Predict, and say which version answered."""
        asked = rows_given.given(rows)
        if version is not None and label is not None:
            raise InvalidRequest("give a version or a label, not both")
        endpoint = self._endpoints.find(PROTOCOL, self.model, version, label)
        sent = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        call = InProcessPrediction(asyncio.get_running_loop())
        call.start(endpoint, sent, asked, _options(sent, timeout))
        try:
            response = await call.finished
        except asyncio.CancelledError:
            call.cancel()
            raise
        answered = call.endpoint
        assert isinstance(answered.codec, Codec)  # noqa: S101  the only one of this table
        return Answer(answered.codec.in_kind(asked, response), answered.model.name, answered.model.version)


def _options(headers: Headers, timeout: float | None) -> RequestOptions:
    options = request_options(headers)
    if timeout is None:
        return options
    if not timeout > 0:
        raise InvalidRequest("timeout: should be a number of seconds above 0, such as 0.25")
    return RequestOptions(options.priority, min(timeout, options.timeout or timeout))
