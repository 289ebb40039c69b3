"""NVIDIA's own Python clients, as their users call them: http, http.aio, grpc, grpc.aio."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

from tests.conformance.point import Ask, point
from tests.conformance.subject import Described, NotAsked, Subject, from_bytes, same

HTTP = "tritonclient.http"
HTTP_AIO = "tritonclient.http.aio"
GRPC = "tritonclient.grpc"
GRPC_AIO = "tritonclient.grpc.aio"


@contextmanager
def _http(subject: Subject) -> Iterator[Any]:
    client = tritonclient.http.InferenceServerClient(subject.address, concurrency=4, network_timeout=30)
    try:
        yield client
    finally:
        client.close()


@contextmanager
def _grpc(subject: Subject) -> Iterator[Any]:
    if subject.grpc is None:
        raise NotAsked("no --grpc address was given")
    client = tritonclient.grpc.InferenceServerClient(subject.grpc)
    try:
        yield client
    finally:
        client.close()


DOORS: dict[str, tuple[Any, Callable[[Subject], Any]]] = {
    HTTP: (tritonclient.http, _http),
    GRPC: (tritonclient.grpc, _grpc),
}


def _inputs(module: Any, model: Described, rows: int = 1, **more: Any) -> list[Any]:
    made = []
    for tensor, array in zip(model.inputs, model.arrays(rows), strict=True):
        one = module.InferInput(tensor.name, list(array.shape), tensor.datatype)
        one.set_data_from_numpy(array, **more)
        made.append(one)
    return made


def _answer(model: Described, result: Any, names: list[str] | None = None) -> dict[str, Any]:
    """Read what the client made of an answer."""
    outputs = []
    for tensor in model.outputs if names is None else [t for n in names for t in model.outputs if t.name == n]:
        array = result.as_numpy(tensor.name)
        assert array is not None, f"{tensor.name} is missing"
        data = array.ravel().tolist()
        data = [v.decode() if isinstance(v, bytes) else v for v in data]
        outputs.append({"name": tensor.name, "datatype": tensor.datatype, "shape": list(array.shape), "data": data})
    return {"outputs": outputs}


def _due(subject: Subject, model: Described, rows: int = 1) -> dict[str, Any]:
    return subject.infer(model, model.json(rows))


def _plain(subject: Subject) -> list[Described]:
    return [m for m in subject.models if not {"FP16", "BF16"}.intersection(t.datatype for t in m.inputs)]


def _refuses(call: Callable[[], Any], *words: str) -> None:
    try:
        got = call()
    except InferenceServerException as error:
        text = f"{error.status()} {error.message()}"
        assert any(word in text for word in words), f"{text[:120]}: none of {words}"
        return
    raise AssertionError(f"it is answered: {str(got)[:80]}")


def _both(name: str, *, last: bool = False) -> Callable[[Callable[[Subject, Any, Any], None]], None]:
    """Register a point for the http and the grpc client, whose calls are the same."""

    def register(ask: Callable[[Subject, Any, Any], None]) -> None:
        for group, (module, opened) in DOORS.items():

            def asked(subject: Subject, module: Any = module, opened: Any = opened) -> None:
                with opened(subject) as client:
                    ask(subject, module, client)

            point(group, name, last=last)(asked)

    return register


@_both("health, metadata, config, statistics, repository index")
def _(subject: Subject, module: Any, client: Any) -> None:
    model = subject.model()
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(model.name)
    client.get_server_metadata()
    client.get_model_metadata(model.name)
    client.get_model_config(model.name)
    client.get_inference_statistics(model.name)
    client.get_inference_statistics()
    client.get_model_repository_index()


@_both("is_model_ready of an unknown model is False, so that who waits for it can")
def _(subject: Subject, module: Any, client: Any) -> None:
    assert client.is_model_ready("no-such-model") is False


@_both("infer without outputs listed (which asks for raw ones)")
def _(subject: Subject, module: Any, client: Any) -> None:
    for model in _plain(subject):
        same(_answer(model, client.infer(model.name, _inputs(module, model))), _due(subject, model))


@_both("infer with outputs listed")
def _(subject: Subject, module: Any, client: Any) -> None:
    for model in _plain(subject):
        outputs = [module.InferRequestedOutput(t.name) for t in model.outputs]
        same(_answer(model, client.infer(model.name, _inputs(module, model), outputs=outputs)), _due(subject, model))


@_both("strings, in and out")
def _(subject: Subject, module: Any, client: Any) -> None:
    model = subject.model(datatype="BYTES")
    same(_answer(model, client.infer(model.name, _inputs(module, model))), _due(subject, model))


@_both("FP16")
def _(subject: Subject, module: Any, client: Any) -> None:
    model = subject.named("probe_fp16")
    result = client.infer(model.name, _inputs(module, model, 2)).as_numpy(model.outputs[0].name)
    assert result.dtype == np.float16
    np.testing.assert_array_equal(result, model.arrays(2)[0])


@_both("BF16")
def _(subject: Subject, module: Any, client: Any) -> None:
    model = subject.named("probe_bf16")
    result = client.infer(model.name, _inputs(module, model, 2)).as_numpy(model.outputs[0].name)
    np.testing.assert_array_equal(result, model.arrays(2)[0])


@_both("every datatype")
def _(subject: Subject, module: Any, client: Any) -> None:
    model = subject.named("probe_types")
    result = client.infer(model.name, _inputs(module, model, 2))
    for tensor, array in zip(model.inputs, model.arrays(2), strict=True):
        got = result.as_numpy(tensor.name.replace("in_", "out_"))
        if tensor.datatype == "BYTES":
            got = np.array([v.decode() for v in got.ravel()], object).reshape(got.shape)
        else:
            assert got.dtype == array.dtype, f"{tensor.name} comes back as {got.dtype}"
        np.testing.assert_array_equal(got, array)


@_both("an output without elements")
def _(subject: Subject, module: Any, client: Any) -> None:
    model = subject.named("probe_empty")
    given = module.InferInput(model.inputs[0].name, [4], "FP32")
    given.set_data_from_numpy(np.zeros(4, np.float32))
    asked = [module.InferRequestedOutput(model.outputs[0].name)]
    for outputs in (None, asked):
        array = client.infer(model.name, [given], outputs=outputs).as_numpy(model.outputs[0].name)
        assert array is not None
        assert array.shape == (1, 0), f"its shape is {array.shape}"


@_both("classification (class_count)")
def _(subject: Subject, module: Any, client: Any) -> None:
    for model in _plain(subject):
        for tensor in model.outputs:
            if tensor.datatype in ("FP32", "FP64") and len(tensor.shape) == 2 and tensor.shape[1] != 1:
                outputs = [module.InferRequestedOutput(tensor.name, class_count=2)]
                found = client.infer(model.name, _inputs(module, model), outputs=outputs).as_numpy(tensor.name)
                assert found.shape == (1, 2), f"its shape is {found.shape}"
                assert found.ravel()[0].decode().count(":") >= 1
                return
    raise NotAsked("no model has scores")


@_both("request_id, model_version, timeout, parameters, headers")
def _(subject: Subject, module: Any, client: Any) -> None:
    model = subject.model()
    result = client.infer(
        model.name,
        _inputs(module, model),
        model_version=model.versions[-1] if model.versions else "",
        request_id="a-1",
        timeout=20_000_000,
        parameters={"mine": "x", "count": 3, "yes": True},
        headers={"x-mine": "1"},
    )
    response = result.get_response()
    assert (response["id"] if isinstance(response, dict) else response.id) == "a-1"


@_both("async_infer, 16 at once")
def _(subject: Subject, module: Any, client: Any) -> None:
    model = subject.model(numbers=True)
    if module is tritonclient.http:
        results = [r.get_result() for r in [client.async_infer(model.name, _inputs(module, model)) for _ in range(16)]]
    else:
        done: queue.Queue[Any] = queue.Queue()
        for _ in range(16):
            client.async_infer(model.name, _inputs(module, model), lambda result, error: done.put((result, error)))
        answers = [done.get(timeout=30) for _ in range(16)]
        assert not [e for _, e in answers if e], f"errors: {[e for _, e in answers if e][:1]}"
        results = [r for r, _ in answers]
    due = _due(subject, model)
    for result in results:
        same(_answer(model, result), due)


@_both("errors: unknown model, version, input, output, a wrong shape")
def _(subject: Subject, module: Any, client: Any) -> None:
    model = subject.model(numbers=True)
    good = _inputs(module, model)
    _refuses(lambda: client.infer("no-such-model", good), "404", "NOT_FOUND")
    _refuses(lambda: client.infer(model.name, good, model_version="987654"), "404", "NOT_FOUND")
    _refuses(lambda: client.get_model_metadata("no-such-model"), "404", "NOT_FOUND")
    array = model.arrays()[0]
    unknown = module.InferInput("no-such-input", list(array.shape), model.inputs[0].datatype)
    unknown.set_data_from_numpy(array)
    _refuses(lambda: client.infer(model.name, [unknown]), "400", "INVALID_ARGUMENT")
    _refuses(
        lambda: client.infer(model.name, good, outputs=[module.InferRequestedOutput("no-such-output")]),
        "400",
        "INVALID_ARGUMENT",
    )
    wide = np.concatenate([array, array, array], axis=-1)
    wrong = module.InferInput(model.inputs[0].name, list(wide.shape), model.inputs[0].datatype)
    wrong.set_data_from_numpy(wide)
    _refuses(lambda: client.infer(model.name, [wrong, *good[1:]]), "400", "INVALID_ARGUMENT")


@_both("unload_model, load_model", last=True)
def _(subject: Subject, module: Any, client: Any) -> None:
    model = subject.models[-1]
    try:
        client.unload_model(model.name, headers=subject.headers)
    except InferenceServerException as error:
        if str(error.status()) in ("401", "403", "StatusCode.UNAUTHENTICATED", "StatusCode.PERMISSION_DENIED"):
            raise NotAsked(f"{error.status()}: it wants a --key") from None
        raise
    try:
        _wait(lambda: not client.is_model_ready(model.name), "it is still ready")
    finally:
        client.load_model(model.name, headers=subject.headers)
    _wait(lambda: bool(client.is_model_ready(model.name)), "it does not come back")


def _wait(condition: Callable[[], bool], otherwise: str) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until, otherwise
        time.sleep(0.05)


def _compressed(name: str) -> Ask:
    def ask(subject: Subject) -> None:
        model = subject.model(numbers=True, batched=True)
        due = _due(subject, model, 2000)
        with DOORS[name][1](subject) as client:
            for coding in ("gzip", "deflate"):
                more = (
                    {"request_compression_algorithm": coding, "response_compression_algorithm": coding}
                    if name == HTTP
                    else {"compression_algorithm": coding}
                )
                same(_answer(model, client.infer(model.name, _inputs(DOORS[name][0], model, 2000), **more)), due)

    return ask


for _name in DOORS:
    point(_name, "compression: gzip, deflate")(_compressed(_name))


@point(HTTP, "inputs as JSON, outputs as JSON, one of each")
def _(subject: Subject) -> None:
    model = next((m for m in _plain(subject) if len(m.outputs) > 1), None)
    if model is None:
        raise NotAsked("no model has two outputs")
    module = tritonclient.http
    with _http(subject) as client:
        for raw_in, raw_out in ((False, False), (False, True), (True, False)):
            inputs = _inputs(module, model, binary_data=raw_in)
            outputs = [module.InferRequestedOutput(t.name, binary_data=raw_out) for t in model.outputs]
            same(_answer(model, client.infer(model.name, inputs, outputs=outputs)), _due(subject, model))
        outputs = [module.InferRequestedOutput(t.name, binary_data=bool(i % 2)) for i, t in enumerate(model.outputs)]
        same(_answer(model, client.infer(model.name, _inputs(module, model), outputs=outputs)), _due(subject, model))


@point(HTTP, "generate_request_body and parse_response_body, with any HTTP client")
def _(subject: Subject) -> None:
    model = subject.model()
    module = tritonclient.http
    body, length = module.InferenceServerClient.generate_request_body(_inputs(module, model))
    headers = {"Inference-Header-Content-Length": str(length)} if length is not None else {}
    answer = subject.client.post(model.path, content=body, headers=headers)
    assert answer.status_code == 200, answer.text[:120]
    given = answer.headers.get("Inference-Header-Content-Length")
    result = module.InferenceServerClient.parse_response_body(
        answer.content, header_length=int(given) if given else None
    )
    same(_answer(model, result), _due(subject, model))


@point(GRPC, "client_timeout is the deadline")
def _(subject: Subject) -> None:
    slow = subject.named("probe_slow")
    given = tritonclient.grpc.InferInput(slow.inputs[0].name, [], "INT64")
    given.set_data_from_numpy(np.array(1_000, np.int64))
    with _grpc(subject) as client:
        _refuses(lambda: client.infer(slow.name, [given], client_timeout=0.02), "DEADLINE_EXCEEDED")


@point(GRPC, "start_stream, async_stream_infer: several in flight, ids, an error among them")
def _(subject: Subject) -> None:
    model = subject.model(numbers=True)
    done: queue.Queue[Any] = queue.Queue()
    with _grpc(subject) as client:
        client.start_stream(lambda result, error: done.put((result, error)))
        for i in range(16):
            client.async_stream_infer(model.name, _inputs(tritonclient.grpc, model), request_id=f"r-{i}")
        client.async_stream_infer("no-such-model", _inputs(tritonclient.grpc, model), request_id="bad")
        answers = [done.get(timeout=30) for _ in range(17)]
        client.stop_stream()
    assert sorted(r.get_response().id for r, _ in answers if r is not None) == sorted(f"r-{i}" for i in range(16))
    assert len([e for _, e in answers if e is not None]) == 1, "the wrong one is not told"


@point(GRPC, "a stream with empty final responses turned on says which is the last")
def _(subject: Subject) -> None:
    model = subject.model(numbers=True)
    done: queue.Queue[Any] = queue.Queue()
    with _grpc(subject) as client:
        client.start_stream(lambda result, error: done.put((result, error)))
        client.async_stream_infer(model.name, _inputs(tritonclient.grpc, model), enable_empty_final_response=True)
        result, error = done.get(timeout=30)
        client.stop_stream()
    assert error is None, str(error)
    assert result.get_response().parameters["triton_final_response"].bool_param, "there is no triton_final_response"


@point(GRPC, "an asynchronous call can be cancelled")
def _(subject: Subject) -> None:
    slow = subject.named("probe_slow")
    done: queue.Queue[Any] = queue.Queue()
    given = tritonclient.grpc.InferInput(slow.inputs[0].name, [], "INT64")
    given.set_data_from_numpy(np.array(1_000, np.int64))
    with _grpc(subject) as client:
        call = client.async_infer(slow.name, [given], lambda result, error: done.put(error))
        time.sleep(0.02)
        call.cancel()
        error = done.get(timeout=30)
    assert error is not None
    assert "CANCELLED" in str(error.status()), str(error)


def _aio(group: str, name: str) -> Callable[[Callable[[Subject, Any, Any], Awaitable[None]]], None]:
    def register(ask: Callable[[Subject, Any, Any], Awaitable[None]]) -> None:
        def asked(subject: Subject) -> None:
            if group == GRPC_AIO and subject.grpc is None:
                raise NotAsked("no --grpc address was given")
            # What is read by blocking calls can't be read inside.
            assert subject.models
            asyncio.run(_within(subject))

        async def _within(subject: Subject) -> None:
            module: Any = tritonclient.grpc.aio if group == GRPC_AIO else tritonclient.http.aio
            address = subject.grpc if group == GRPC_AIO else subject.address
            client = module.InferenceServerClient(address)
            try:
                await ask(subject, module, client)
            finally:
                await client.close()

        point(group, name)(asked)

    return register


for _group in (HTTP_AIO, GRPC_AIO):

    @_aio(_group, "health, metadata, config, statistics, repository index")
    async def _(subject: Subject, module: Any, client: Any) -> None:
        model = subject.model()
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready(model.name)
        await client.get_server_metadata()
        await client.get_model_metadata(model.name)
        await client.get_model_config(model.name)
        await client.get_inference_statistics(model.name)
        await client.get_model_repository_index()

    @_aio(_group, "infer, with and without outputs listed, 16 at once")
    async def _(subject: Subject, module: Any, client: Any) -> None:
        for model in _plain(subject):
            due = _due(subject, model)
            outputs = [module.InferRequestedOutput(t.name) for t in model.outputs]
            for asked in (None, outputs):
                same(_answer(model, await client.infer(model.name, _inputs(module, model), outputs=asked)), due)
        model = subject.model(numbers=True)
        due = _due(subject, model)
        for result in await asyncio.gather(*(client.infer(model.name, _inputs(module, model)) for _ in range(16))):
            same(_answer(model, result), due)

    @_aio(_group, "errors")
    async def _(subject: Subject, module: Any, client: Any) -> None:
        status = "none"
        try:
            await client.infer("no-such-model", _inputs(module, subject.model()))
        except InferenceServerException as error:
            status = str(error.status())
        assert "404" in status or "NOT_FOUND" in status, f"its status is {status}"


@_aio(GRPC_AIO, "stream_infer: several in flight, ids")
async def _(subject: Subject, module: Any, client: Any) -> None:
    model = subject.model(numbers=True)

    async def requests() -> Any:
        for i in range(16):
            yield {"model_name": model.name, "inputs": _inputs(module, model), "request_id": f"r-{i}"}

    found = []
    async for result, error in client.stream_infer(requests()):
        assert error is None, str(error)
        found.append(result.get_response().id)
    assert sorted(found) == sorted(f"r-{i}" for i in range(16))


@_aio(GRPC_AIO, "compression, strings, FP16, client_timeout")
async def _(subject: Subject, module: Any, client: Any) -> None:
    model = subject.model(datatype="BYTES")
    due = _due(subject, model)
    same(_answer(model, await client.infer(model.name, _inputs(module, model), compression_algorithm="gzip")), due)
    half = subject.named("probe_fp16")
    result = await client.infer(half.name, _inputs(module, half, 2), client_timeout=20)
    raw = result.as_numpy(half.outputs[0].name)
    assert raw.tolist() == from_bytes("FP16", half.arrays(2)[0].tobytes()) or raw.shape == (2, 2)
