"""Long ModelInfer messages are taken apart: what that gives is what protobuf gives, whatever the bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, save
from starlette.testclient import TestClient

from serving.engine.session import OnnxSession
from serving.errors import ServingError
from serving.grpc_api import long_message, prediction
from serving.grpc_api.infer_wire import Wire
from serving.grpc_api.messages import SERVICE, message
from serving.grpc_api.server import GrpcServer
from serving.grpc_api.tensors import CONTENTS
from serving.http_api.app import create_app
from serving.settings import Settings
from serving.tensors import NUMPY
from tests.conftest import MODELS

Request, Response = message("ModelInferRequest"), message("ModelInferResponse")
KINDS = {
    "INT64": TensorProto.INT64,
    "INT8": TensorProto.INT8,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "BOOL": TensorProto.BOOL,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}
COUNT = 80_000


@pytest.fixture(scope="module")
def channel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[grpc.Channel]:
    """Serve, for each datatype, a model that answers what it is asked."""
    models = tmp_path_factory.mktemp("echoes")
    for datatype, kind in KINDS.items():
        _echo(models / datatype.lower() / "1", kind)
    app = create_app(
        Settings(models=models, max_queued_rows=200_000),
        companion=lambda fleet, metrics, access, bodies: GrpcServer(
            fleet, metrics, access=access, bodies=bodies, address="127.0.0.1:0", deadline=10, grace=1, max_bytes=1 << 25
        ),
    )
    options = [("grpc.max_receive_message_length", -1)]
    with (
        TestClient(app),
        grpc.insecure_channel(f"127.0.0.1:{app.state.companion.port}", options) as opened,
    ):
        yield opened


def _echo(folder: Path, kind: int) -> None:
    given, answered = (helper.make_tensor_value_info(name, kind, ["rows"]) for name in ("asked", "answered"))
    graph = helper.make_graph([helper.make_node("Identity", ["asked"], ["answered"])], "echo", [given], [answered])
    folder.mkdir(parents=True)
    save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=8),
        folder / "model.onnx",
    )


def values(datatype: str) -> list[Any]:
    """Make numbers of all lengths that they may have on the wire."""
    random = np.random.default_rng(5)
    if datatype == "BYTES":
        return [b"x" * int(size) for size in random.integers(0, 40, COUNT)]
    dtype = NUMPY[datatype]
    if datatype == "BOOL":
        return list((random.random(COUNT) < 0.5).tolist())
    if dtype.kind == "f":
        return list(random.random(COUNT).astype(dtype).tolist())
    limits = np.iinfo(dtype)
    some = random.integers(limits.min, limits.max, COUNT, dtype=dtype, endpoint=True)
    some >>= random.integers(0, dtype.itemsize * 8, COUNT).astype(dtype)
    return [limits.min, limits.max, *some[2:].tolist()]


def asked(datatype: str, given: list[Any], *, raw: bool = False) -> Any:
    request = Request(model_name=datatype.lower(), id="x")
    tensor = request.inputs.add(name="asked", datatype=datatype, shape=[len(given)])
    if raw:
        request.raw_input_contents.append(packed(datatype, given))
    else:
        getattr(tensor.contents, CONTENTS[datatype]).extend(given)
    return request


def packed(datatype: str, given: list[Any]) -> bytes:
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(text)) + text for text in given)
    return np.array(given, NUMPY[datatype]).tobytes()


@pytest.mark.parametrize("datatype", KINDS)
def test_long_typed_contents_come_back_as_they_were_sent(
    channel: grpc.Channel, datatype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number and string of a long typed tensor is read and answered, and protobuf never gets them all at once."""
    monkeypatch.setattr(long_message, "_read", _small(long_message._read))
    monkeypatch.setattr(long_message, "_read_contents", _small(long_message._read_contents))
    given = values(datatype)
    answer = channel.unary_unary(f"/{SERVICE}/ModelInfer")(asked(datatype, given).SerializeToString(), timeout=20)
    (tensor,) = Response.FromString(answer).outputs
    assert (tensor.name, tensor.datatype, list(tensor.shape)) == ("answered", datatype, [COUNT])
    assert list(getattr(tensor.contents, CONTENTS[datatype])) == given


def _small(reading: Any) -> Any:
    def read(data: bytes) -> Any:
        assert len(data) < 10_000
        return reading(data)

    return read


@pytest.mark.parametrize("datatype", ["FP32", "INT64", "BYTES"])
@pytest.mark.parametrize("stream", [False, True])
def test_long_raw_contents_come_back_as_they_were_sent(
    channel: grpc.Channel, datatype: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long raw tensor, seen for the first time or known, is answered in parts that are the tensor, on streams too."""
    monkeypatch.setattr(prediction, "RAW_INLINE_ANSWER_BYTES", 0)
    monkeypatch.setattr(prediction, "RAW_INLINE_BYTES", 0)
    request = asked(datatype, values(datatype), raw=True)
    expected = list(request.raw_input_contents)
    sent = request.SerializeToString()
    for _ in range(2):
        if stream:
            ask = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
            found = [message("ModelStreamInferResponse").FromString(a) for a in ask(iter([sent, sent]), timeout=20)]
            assert [one.infer_response.parameters["triton_final_response"].bool_param for one in found] == [True, True]
            answers = [one.infer_response for one in found]
        else:
            answers = [Response.FromString(channel.unary_unary(f"/{SERVICE}/ModelInfer")(sent, timeout=20))]
        for answer in answers:
            assert answer.id == "x"
            assert list(answer.raw_output_contents) == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.inputs[0].shape.__setitem__(0, COUNT + 1), f"has {COUNT} elements"),
        (lambda r: r.inputs[0].contents.fp32_contents.append(1.0), "INT64 goes into int64_contents"),
        (lambda r: r.raw_input_contents.append(bytes(8)), "raw_input_contents is there too"),
        (lambda r: setattr(r.inputs[0], "datatype", "FP32"), "takes INT64"),
    ],
)
def test_wrong_long_messages_are_refused_in_words(channel: grpc.Channel, change: Any, said: str) -> None:
    """What is wrong with a long message is told as with a short one."""
    request = asked("INT64", values("INT64"))
    change(request)
    with pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary(f"/{SERVICE}/ModelInfer")(request.SerializeToString(), timeout=20)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert said in refused.value.details()


def outcome(wire: Wire, sent: bytes) -> Any:
    """Return what is read of a message, or that it is refused."""
    try:
        request, bulk = long_message.parsed(sent)
        decoded = wire.decode(request, bulk, None)
    except ServingError:
        return None
    return [(a.shape, a.tolist() if a.dtype.hasobject else a.tobytes()) for a in decoded.inputs], decoded[1:]


WIRES = {
    name: Wire(
        SimpleNamespace(
            name=name,
            version="1",
            signature=OnnxSession(MODELS / name / "1" / "model.onnx", warm_rows=1).signature,
        )  # type: ignore[arg-type]
    )
    for name in ("iris", "penguins")
}


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_apart_is_whole(data: st.DataObject) -> None:
    """A message that is taken apart, whole or spoilt anywhere, gives what protobuf alone gives, or is refused too."""
    name = data.draw(st.sampled_from(sorted(WIRES)))
    wire = WIRES[name]
    rows = data.draw(st.integers(1, 20))
    request = Request(model_name=name)
    raw = data.draw(st.booleans())
    for spec in wire._ports.inputs:
        shape = [rows if dim == -1 else dim for dim in spec.shape]
        tensor = request.inputs.add(name=spec.name, datatype=spec.datatype, shape=shape)
        size = int(np.prod(shape))
        texts = spec.datatype == "BYTES"
        content: Any = [b"Torgersen", b"Dream"] * size if texts else np.arange(size, dtype=np.float32).tolist()
        if raw:
            request.raw_input_contents.append(packed(spec.datatype, content[:size]))
        else:
            getattr(tensor.contents, CONTENTS[spec.datatype]).extend(content[:size])
    sent = request.SerializeToString()
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, len(sent)))
        put = data.draw(st.binary(max_size=3) | st.sampled_from([b"\x2a\x00", b"\x42\x01a", b"\x32\x04abcd", b"\x80"]))
        sent = sent[:at] + put + sent[at + data.draw(st.integers(0, 3)) :]
    whole = outcome(wire, sent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_message, "_SHORT_BYTES", data.draw(st.integers(0, 20)))
        patch.setattr(long_message, "_PIECE_BYTES", 8 * data.draw(st.integers(1, 5)))
        assert outcome(wire, sent) == whole
