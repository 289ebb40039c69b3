"""gRPC: every call of the protocol, through the stubs that NVIDIA ships."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tritonclient.grpc import service_pb2 as pb

from tests.conformance.point import point
from tests.conformance.subject import Described, NotAsked, Subject, from_bytes, same, to_bytes

CALLS = "gRPC: calls"
INFER = "gRPC: predictions"
STREAM = "gRPC: streams"
WRONG = "gRPC: wrong requests"
SECONDS = 30

CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def request(model: Described, *, raw: bool, rows: int = 1, **more: Any) -> Any:
    """Make a ModelInferRequest."""
    made = pb.ModelInferRequest(model_name=model.name, **more)
    for tensor, array in zip(model.inputs, model.arrays(rows), strict=True):
        sent = made.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=array.shape)
        if raw:
            made.raw_input_contents.append(to_bytes(tensor.datatype, array))
            continue
        values = array.ravel().tolist()
        if tensor.datatype == "BYTES":
            values = [value.encode() for value in values]
        getattr(sent.contents, CONTENTS[tensor.datatype]).extend(values)
    return made


def answer(response: Any) -> dict[str, Any]:
    """Read a ModelInferResponse into the form that JSON answers have."""
    raws = list(response.raw_output_contents)
    outputs = []
    for index, tensor in enumerate(response.outputs):
        if raws:
            assert not tensor.HasField("contents"), "raw and typed contents are mixed"
            data = from_bytes(tensor.datatype, raws[index])
        else:
            data = list(getattr(tensor.contents, CONTENTS[tensor.datatype]))
            data = [v.decode() for v in data] if tensor.datatype == "BYTES" else data
        outputs.append({"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape), "data": data})
    assert not raws or len(raws) == len(outputs), f"{len(raws)} raw contents for {len(outputs)} outputs"
    return {"outputs": outputs}


def refused(call: Any, sent: Any, *codes: grpc.StatusCode, timeout: float = SECONDS, **more: Any) -> str:
    """Assert that a call ends with one of these codes; return its text."""
    try:
        got = call(sent, timeout=timeout, **more)
    except grpc.RpcError as error:
        found: Any = error
        names = " or ".join(code.name for code in codes)
        assert found.code() in codes, f"{found.code().name} instead of {names}: {found.details()[:120]}"
        assert found.details(), "it says nothing"
        return str(found.details())
    raise AssertionError(f"it is answered: {str(got)[:80]}")


INVALID = (grpc.StatusCode.INVALID_ARGUMENT,)
UNKNOWN = (grpc.StatusCode.NOT_FOUND,)


@point(CALLS, "ServerLive, ServerReady, ModelReady")
def _(subject: Subject) -> None:
    assert subject.stub.ServerLive(pb.ServerLiveRequest(), timeout=SECONDS).live
    assert subject.stub.ServerReady(pb.ServerReadyRequest(), timeout=SECONDS).ready
    assert subject.stub.ModelReady(pb.ModelReadyRequest(name=subject.model().name), timeout=SECONDS).ready


@point(CALLS, "ServerMetadata and ModelMetadata say what REST says")
def _(subject: Subject) -> None:
    server = subject.stub.ServerMetadata(pb.ServerMetadataRequest(), timeout=SECONDS)
    rest = subject.client.get("/v2").json()
    assert (server.name, server.version, list(server.extensions)) == (rest["name"], rest["version"], rest["extensions"])
    for model in subject.models:
        found = subject.stub.ModelMetadata(pb.ModelMetadataRequest(name=model.name), timeout=SECONDS)
        assert found.name == model.name
        assert list(found.versions) == model.versions
        inputs = [(t.name, t.datatype, tuple(t.shape)) for t in found.inputs]
        assert inputs == model.inputs, f"inputs of {model.name} differ"
        outputs = [(t.name, t.datatype, tuple(t.shape)) for t in found.outputs]
        assert outputs == model.outputs, f"outputs of {model.name} differ"


@point(CALLS, "ModelConfig")
def _(subject: Subject) -> None:
    model = subject.model()
    config = subject.stub.ModelConfig(pb.ModelConfigRequest(name=model.name), timeout=SECONDS).config
    assert config.name == model.name
    assert [i.name for i in config.input] == [t.name for t in model.inputs]


@point(CALLS, "ModelStatistics counts what was answered over gRPC")
def _(subject: Subject) -> None:
    model = subject.model()

    def count() -> int:
        found = subject.stub.ModelStatistics(pb.ModelStatisticsRequest(name=model.name), timeout=SECONDS)
        return sum(one.inference_count for one in found.model_stats)

    before = count()
    subject.stub.ModelInfer(request(model, raw=False), timeout=SECONDS)
    until = time.monotonic() + 5
    while count() < before + 1:
        assert time.monotonic() < until, "inference_count did not grow"
        time.sleep(0.05)


@point(CALLS, "RepositoryIndex, and `ready`")
def _(subject: Subject) -> None:
    for ready in (False, True):
        index = subject.stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=ready), timeout=SECONDS)
        assert subject.model().name in {one.name for one in index.models}


@point(CALLS, "RepositoryModelUnload stops a model and RepositoryModelLoad brings it back", last=True)
def _(subject: Subject) -> None:
    model = subject.models[-1]
    more: dict[str, Any] = {"timeout": SECONDS, "metadata": subject.metadata}
    try:
        subject.stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name=model.name), **more)
    except grpc.RpcError as error:
        found: Any = error
        if found.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            raise NotAsked(f"{found.code().name}: it wants a --key") from None
        raise
    try:
        until = time.monotonic() + 10
        while subject.client.get(f"/v2/models/{model.name}/ready").status_code == 200:
            assert time.monotonic() < until, "it is still ready"
            time.sleep(0.05)
        assert not _ready(subject, model.name), "ModelReady still says so"
    finally:
        subject.stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=model.name), **more)
    until = time.monotonic() + 10
    while not _ready(subject, model.name):
        assert time.monotonic() < until, "it does not come back"
        time.sleep(0.05)


def _ready(subject: Subject, name: str) -> bool:
    try:
        return bool(subject.stub.ModelReady(pb.ModelReadyRequest(name=name), timeout=SECONDS).ready)
    except grpc.RpcError as error:
        found: Any = error
        if found.code() != grpc.StatusCode.NOT_FOUND:
            raise
        return False


@point(CALLS, "grpc.health.v1: the server and the service are SERVING")
def _(subject: Subject) -> None:
    assert subject.stub
    stub: Any = health_pb2_grpc.HealthStub(subject.channel)  # type: ignore[no-untyped-call]
    for service in ("", "inference.GRPCInferenceService"):
        found = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=SECONDS)
        assert found.status == health_pb2.HealthCheckResponse.SERVING, f"{service!r} is {found.status}"


@point(CALLS, "reflection lists the services and describes every message, as grpcurl asks")
def _(subject: Subject) -> None:
    assert subject.stub
    database = ProtoReflectionDescriptorDatabase(subject.channel)
    try:
        services = set(database.get_services())
        assert {"inference.GRPCInferenceService", "grpc.health.v1.Health"} <= services, f"lists {sorted(services)}"
        described = DescriptorPool(database).FindServiceByName("inference.GRPCInferenceService")
        methods = {method.name for method in described.methods}
        due = {method.name for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods}
        out_of_scope = {name for name in due if "SharedMemory" in name or name in ("TraceSetting", "LogSettings")}
        assert due - out_of_scope <= methods, f"lacks {sorted(due - out_of_scope - methods)}"
        assert described.methods_by_name["ModelInfer"].input_type.fields_by_name["raw_input_contents"].number == 7
    finally:
        database.close() if hasattr(database, "close") else None


@point(INFER, "typed contents, answered in typed contents")
def _(subject: Subject) -> None:
    model = subject.model()
    response = subject.stub.ModelInfer(request(model, raw=False), timeout=SECONDS)
    assert response.model_name == model.name
    assert not response.raw_output_contents, "the answer is raw"
    same(answer(response), subject.infer(model, model.json()))


@point(INFER, "raw contents, answered in raw contents")
def _(subject: Subject) -> None:
    for model in subject.models:
        if {"FP16", "BF16"}.intersection(t.datatype for t in model.inputs):
            continue
        response = subject.stub.ModelInfer(request(model, raw=True), timeout=SECONDS)
        assert len(response.raw_output_contents) == len(response.outputs), "the answer is not raw"
        same(answer(response), subject.infer(model, model.json()))


@point(INFER, "raw and typed contents are never mixed in a request: INVALID_ARGUMENT")
def _(subject: Subject) -> None:
    model = subject.model()
    mixed = request(model, raw=False)
    mixed.raw_input_contents.extend(request(model, raw=True).raw_input_contents)
    refused(subject.stub.ModelInfer, mixed, *INVALID)


@point(INFER, "every datatype, typed and raw")
def _(subject: Subject) -> None:
    model = subject.named("probe_types")
    sent = {t["name"].removeprefix("in_"): t["data"] for t in model.json(2)["inputs"]}
    for raw in (False, True):
        found = answer(subject.stub.ModelInfer(request(model, raw=raw, rows=2), timeout=SECONDS))
        for output in found["outputs"]:
            assert output["data"] == sent[output["name"].removeprefix("out_")], f"{output['name']} differs"


@point(INFER, "FP16, raw")
def _(subject: Subject) -> None:
    _halves(subject, "probe_fp16")


@point(INFER, "BF16, raw")
def _(subject: Subject) -> None:
    _halves(subject, "probe_bf16")


def _halves(subject: Subject, name: str) -> None:
    model = subject.named(name)
    sent = request(model, raw=True, rows=2)
    response = subject.stub.ModelInfer(sent, timeout=SECONDS)
    assert list(response.raw_output_contents) == list(sent.raw_input_contents)


@point(INFER, "an output without elements")
def _(subject: Subject) -> None:
    model = subject.named("probe_empty")
    for raw in (False, True):
        sent = pb.ModelInferRequest(model_name=model.name)
        tensor = sent.inputs.add(name=model.inputs[0].name, datatype="FP32", shape=[4])
        if raw:
            sent.raw_input_contents.append(np.zeros(4, np.float32).tobytes())
        else:
            tensor.contents.fp32_contents.extend([0] * 4)
        (output,) = subject.stub.ModelInfer(sent, timeout=SECONDS).outputs
        assert list(output.shape) == [1, 0]


@point(INFER, "outputs are those that are listed, in that order; id comes back")
def _(subject: Subject) -> None:
    model = next(
        (m for m in subject.models if len(m.outputs) > 1 and "BF16" not in {t.datatype for t in m.inputs}), None
    )
    if model is None:
        raise NotAsked("no model has two outputs")
    sent = request(model, raw=False, id="a-1")
    for tensor in reversed(model.outputs):
        sent.outputs.add(name=tensor.name)
    response = subject.stub.ModelInfer(sent, timeout=SECONDS)
    assert response.id == "a-1", f"its id is {response.id!r}"
    assert [o.name for o in response.outputs] == [t.name for t in reversed(model.outputs)]


@point(INFER, "a version can be asked for")
def _(subject: Subject) -> None:
    model = subject.model()
    for version in model.versions:
        response = subject.stub.ModelInfer(request(model, raw=False, model_version=version), timeout=SECONDS)
        assert response.model_version == version, f"{version} is answered by {response.model_version!r}"
    if not model.versions:
        raise NotAsked("the model has no versions")


@point(INFER, "parameters of every kind do no harm: bool, int64, string, double, uint64")
def _(subject: Subject) -> None:
    sent = request(subject.model(), raw=False)
    sent.parameters["a"].bool_param = True
    sent.parameters["b"].int64_param = -1
    sent.parameters["c"].string_param = "x"
    sent.parameters["d"].double_param = 1.5
    sent.parameters["e"].uint64_param = 2**64 - 1
    sent.inputs[0].parameters["f"].double_param = 0.5
    subject.stub.ModelInfer(sent, timeout=SECONDS)


@point(INFER, "classification")
def _(subject: Subject) -> None:
    for model in subject.models:
        for tensor in model.outputs:
            if tensor.datatype in ("FP32", "FP64") and len(tensor.shape) == 2 and tensor.shape[1] != 1:
                sent = request(model, raw=True)
                sent.outputs.add(name=tensor.name).parameters["classification"].int64_param = 2
                (found,) = answer(subject.stub.ModelInfer(sent, timeout=SECONDS))["outputs"]
                assert (found["datatype"], found["shape"]) == ("BYTES", [1, 2])
                assert found["data"][0].count(":") >= 1
                return
    raise NotAsked("no model has scores")


@point(INFER, "compressed messages")
def _(subject: Subject) -> None:
    model = subject.model()
    for coding in (grpc.Compression.Gzip, grpc.Compression.Deflate):
        response = subject.stub.ModelInfer(request(model, raw=False), timeout=SECONDS, compression=coding)
        assert response.model_name == model.name


@point(INFER, "the client's deadline is the request's: DEADLINE_EXCEEDED, and it is not run")
def _(subject: Subject) -> None:
    def late(slow: Any) -> None:
        refused(subject.stub.ModelInfer, slow, grpc.StatusCode.DEADLINE_EXCEEDED, timeout=0.1)

    _behind_a_slow_one(subject, late)


@point(INFER, "cancellation drops what is queued")
def _(subject: Subject) -> None:
    def left(slow: Any) -> None:
        others = [subject.stub.ModelInfer.future(slow, timeout=SECONDS) for _ in range(5)]
        time.sleep(0.1)
        for other in others:
            other.cancel()

    _behind_a_slow_one(subject, left)


def _behind_a_slow_one(subject: Subject, leave: Callable[[Any], None]) -> None:
    """Send requests that leave while another holds the model, and assert that only that one was run."""
    turns = _turns(subject)
    for _ in range(4):
        before = _ran(subject)
        slow = _turning(subject, turns)
        first = subject.stub.ModelInfer.future(slow, timeout=SECONDS)
        time.sleep(0.1)
        leave(slow)
        time.sleep(0.1)
        held = not first.done()
        first.result()
        if held:
            ran = _ran(subject) - before
            assert ran == 1, f"the model ran {ran - 1} times for who had left"
            return
        turns *= 2  # too short: the machine was busy when it was measured
    raise AssertionError("the slow request was never slow")


def _turning(subject: Subject, turns: int) -> Any:
    slow = subject.named("probe_slow")
    sent = pb.ModelInferRequest(model_name=slow.name)
    sent.inputs.add(name=slow.inputs[0].name, datatype="INT64", shape=[]).contents.int64_contents.append(turns)
    return sent


def _turns(subject: Subject) -> int:
    """Return how many turns of the slow probe take about 0.6 s."""
    subject.stub.ModelInfer(_turning(subject, 20), timeout=SECONDS)
    began = time.monotonic()
    subject.stub.ModelInfer(_turning(subject, 20), timeout=SECONDS)
    return max(20, int(0.6 * 20 / max(0.001, time.monotonic() - began)))


def _ran(subject: Subject) -> int:
    """Return how often the slow probe ran, once the count has come to rest."""
    last = -1
    until = time.monotonic() + 10
    while time.monotonic() < until:
        asked = pb.ModelStatisticsRequest(name="probe_slow")
        now = sum(one.execution_count for one in subject.stub.ModelStatistics(asked, timeout=SECONDS).model_stats)
        if now == last:
            return now
        last = now
        time.sleep(0.3)
    raise AssertionError("the statistics do not come to rest")


@point(STREAM, "several in flight, each answered once, by its id")
def _(subject: Subject) -> None:
    model = subject.model()
    ids = [f"r-{i}" for i in range(32)]
    responses = subject.stub.ModelStreamInfer(iter([request(model, raw=True, id=i) for i in ids]), timeout=SECONDS)
    found = []
    for response in responses:
        assert not response.error_message, response.error_message
        found.append(response.infer_response.id)
    assert sorted(found) == sorted(ids), f"{len(found)} answers to {len(ids)} requests"


@point(STREAM, "a wrong request is answered with its id and error_message, and the stream goes on")
def _(subject: Subject) -> None:
    model = subject.model()
    sent: queue.Queue[Any] = queue.Queue()

    def requests() -> Iterator[Any]:
        while (one := sent.get()) is not None:
            yield one

    responses = subject.stub.ModelStreamInfer(requests(), timeout=SECONDS)
    bad = request(model, raw=True, id="bad")
    bad.raw_input_contents[0] = b"x"
    try:
        sent.put(bad)
        answered = next(responses)
        assert answered.error_message, "there is no error_message"
        assert answered.infer_response.id == "bad", "its id is not in infer_response"
        sent.put(request(model, raw=True, id="good"))
        answered = next(responses)
        assert answered.infer_response.id == "good", answered.error_message
    finally:
        sent.put(None)


@point(STREAM, "a fast answer does not wait for a slow one before it")
def _(subject: Subject) -> None:
    model = subject.model(numbers=True)
    first = _turning(subject, _turns(subject))
    first.id = "slow"
    responses = subject.stub.ModelStreamInfer(iter([first, request(model, raw=True, id="fast")]), timeout=SECONDS)
    found = [response.infer_response.id for response in responses]
    assert found == ["fast", "slow"], f"the order is {found}"


@point(STREAM, "triton_final_response marks the only answer as the last")
def _(subject: Subject) -> None:
    sent = request(subject.model(), raw=True, id="1")
    sent.parameters["triton_enable_empty_final_response"].bool_param = True
    responses = list(subject.stub.ModelStreamInfer(iter([sent]), timeout=SECONDS))
    assert responses[-1].infer_response.parameters["triton_final_response"].bool_param, "there is no such mark"


def _no_inputs(sent: Any) -> None:
    del sent.inputs[:]
    del sent.raw_input_contents[:]


def _raw_twice(sent: Any) -> None:
    sent.raw_input_contents.append(sent.raw_input_contents[0])


def _set(**changes: Any) -> Any:
    def change(sent: Any) -> None:
        for name, value in changes.items():
            setattr(sent.inputs[0], name, value)

    return change


def _shape(*dims: int) -> Any:
    def change(sent: Any) -> None:
        sent.inputs[0].shape[:] = dims

    return change


def _blob(make: Any) -> Any:
    def change(sent: Any) -> None:
        sent.raw_input_contents[0] = make(sent.raw_input_contents[0])

    return change


def _same_twice(sent: Any) -> None:
    sent.inputs.append(sent.inputs[0])
    sent.raw_input_contents.append(sent.raw_input_contents[0])


def _output(name: str, times: int = 1) -> Any:
    def change(sent: Any) -> None:
        for _ in range(times):
            sent.outputs.add(name=name)

    return change


CASES: dict[str, Any] = {
    "no inputs": _no_inputs,
    "an unknown input": _set(name="no-such-input"),
    "an unknown datatype": _set(datatype="FP12"),
    "another datatype than the model's": _set(datatype="INT64"),
    "the same input twice": _same_twice,
    "a negative dimension": _shape(-1, -1),
    "a huge dimension": _shape(2**62, 4),
    "65 dimensions": _shape(*[1] * 65),
    "no dimensions": _shape(),
    "raw bytes too few": _blob(lambda b: b[:-1]),
    "raw bytes too many": _blob(lambda b: b + b"x"),
    "raw bytes empty": _blob(lambda b: b""),
    "more raw contents than inputs": _raw_twice,
    "an unknown output": _output("no-such-output"),
}


def _case(name: str) -> None:
    @point(WRONG, f"{name}: INVALID_ARGUMENT")
    def _(subject: Subject) -> None:
        sent = request(subject.model(numbers=True), raw=True)
        CASES[name](sent)
        refused(subject.stub.ModelInfer, sent, *INVALID)


for _name in CASES:
    _case(_name)


@point(WRONG, "typed contents: too few, too many, of another type, none: INVALID_ARGUMENT")
def _(subject: Subject) -> None:
    model = subject.model(numbers=True)
    field = CONTENTS[model.inputs[0].datatype]
    for change in (
        lambda c: getattr(c, field).pop(),
        lambda c: getattr(c, field).append(1),
        lambda c: c.int_contents.append(1),
        lambda c: c.Clear(),
    ):
        sent = request(model, raw=False)
        change(sent.inputs[0].contents)
        refused(subject.stub.ModelInfer, sent, *INVALID)


@point(WRONG, "an integer that overflows its type: INVALID_ARGUMENT")
def _(subject: Subject) -> None:
    model = subject.named("probe_types")
    for datatype, field, value in (("INT8", "int_contents", 300), ("UINT8", "uint_contents", 256)):
        sent = request(model, raw=False)
        tensor = next(t for t in sent.inputs if t.datatype == datatype)
        getattr(tensor.contents, field)[:] = [value, 0]
        refused(subject.stub.ModelInfer, sent, *INVALID)


@point(WRONG, "bytes that are no message: INVALID_ARGUMENT")
def _(subject: Subject) -> None:
    assert subject.stub
    call = subject.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    refused(call, b"\xff\xff\xff\xff", *INVALID)


@point(WRONG, "an unknown model or version: NOT_FOUND")
def _(subject: Subject) -> None:
    model = subject.model()
    unknown = request(model, raw=False)
    unknown.model_name = "no-such-model"
    refused(subject.stub.ModelInfer, unknown, *UNKNOWN)
    refused(subject.stub.ModelInfer, request(model, raw=False, model_version="987654"), *UNKNOWN)
    refused(subject.stub.ModelMetadata, pb.ModelMetadataRequest(name="no-such-model"), *UNKNOWN)
    refused(subject.stub.ModelMetadata, pb.ModelMetadataRequest(name=model.name, version="987654"), *UNKNOWN)


@point(WRONG, "a message over the limit: RESOURCE_EXHAUSTED, or it is answered")
def _(subject: Subject) -> None:
    model = subject.model()
    sent = request(model, raw=False)
    sent.parameters["padding"].string_param = "x" * (20 << 20)
    try:
        subject.stub.ModelInfer(sent, timeout=SECONDS)
    except grpc.RpcError as error:
        found: Any = error
        assert found.code() == grpc.StatusCode.RESOURCE_EXHAUSTED, f"{found.code().name}: {found.details()[:100]}"


@point(WRONG, "shared memory: refused by its call (UNIMPLEMENTED) and in a request (INVALID_ARGUMENT)")
def _(subject: Subject) -> None:
    codes = (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.NOT_FOUND)
    refused(subject.stub.SystemSharedMemoryStatus, pb.SystemSharedMemoryStatusRequest(), *codes)
    sent = request(subject.model(), raw=True)
    sent.inputs[0].parameters["shared_memory_region"].string_param = "mine"
    refused(subject.stub.ModelInfer, sent, *INVALID)
