"""Long ModelInfer messages: every number and string comes back, and what is wrong is told as with short ones."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from onnx import TensorProto, helper, save
from starlette.testclient import TestClient

from serving.protocols.infer_codec import cut_up, opening_of
from serving.protocols.infer_tensors import CONTENTS
from serving.protocols.messages import SERVICE, message
from serving.tensors import NUMPY
from tests.conftest import with_grpc

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
    app = with_grpc(models=models, max_queued_rows=1_000_000, drain_s=1, max_body_bytes=1 << 25)
    options = [("grpc.max_receive_message_length", -1)]
    with (
        TestClient(app),
        grpc.insecure_channel(f"127.0.0.1:{app.state.serving.companion.port}", options) as opened,
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


def values(datatype: str, count: int = COUNT) -> list[Any]:
    """Make numbers of all lengths that they may have on the wire."""
    random = np.random.default_rng(5)
    if datatype == "BYTES":
        return [b"x" * int(size) for size in random.integers(0, 40, count)]
    dtype = NUMPY[datatype]
    if datatype == "BOOL":
        return list((random.random(count) < 0.5).tolist())
    if dtype.kind == "f":
        return list(random.random(count).astype(dtype).tolist())
    limits = np.iinfo(dtype)
    some = random.integers(limits.min, limits.max, count, dtype=dtype, endpoint=True)
    some >>= random.integers(0, dtype.itemsize * 8, count).astype(dtype)
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
def test_long_typed_contents_come_back_as_they_were_sent(channel: grpc.Channel, datatype: str) -> None:
    """Every number and string of a long typed tensor is read and answered."""
    given = values(datatype)
    answer = channel.unary_unary(f"/{SERVICE}/ModelInfer")(asked(datatype, given).SerializeToString(), timeout=20)
    (tensor,) = Response.FromString(answer).outputs
    assert (tensor.name, tensor.datatype, list(tensor.shape)) == ("answered", datatype, [COUNT])
    assert list(getattr(tensor.contents, CONTENTS[datatype])) == given


@pytest.mark.parametrize(("datatype", "count"), [("FP32", 600_000), ("INT64", 40_000), ("BYTES", 40_000)])
@pytest.mark.parametrize("stream", [False, True])
def test_long_raw_contents_come_back_as_they_were_sent(
    channel: grpc.Channel, datatype: str, count: int, stream: bool
) -> None:
    """A long raw tensor, seen for the first time or known, is answered as it was sent, on streams too."""
    request = asked(datatype, values(datatype, count), raw=True)
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
    refused(channel, request.SerializeToString(), said)


def refused(channel: grpc.Channel, sent: bytes, said: str) -> None:
    with pytest.raises(grpc.RpcError) as refusal:
        channel.unary_unary(f"/{SERVICE}/ModelInfer")(sent, timeout=20)
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert said in refusal.value.details()


class Counted(bytes):
    """Bytes that count how often one of them is looked at."""

    looks = 0

    def __getitem__(self, at: Any) -> Any:
        Counted.looks += 1
        return super().__getitem__(at)


@pytest.mark.parametrize("field", [b"\x0a\x00", b"\x2a\x00", b"\x3a\x00"])
def test_finding_the_model_takes_no_look_at_each_of_a_million_fields(field: bytes) -> None:
    """It is done on the event loop, where a message of empty names or tensors would hold up everybody for seconds."""
    message = Counted(b"\x0a\x04echo" + field * 100_000)
    Counted.looks = 0
    assert cut_up(message) is None
    opening_of(message)
    assert Counted.looks < 5000


def test_bytes_that_are_no_message_are_refused(channel: grpc.Channel) -> None:
    """Long bytes that are no message, or name their model only at the end, where few would look, are told so."""
    sent = asked("INT64", values("INT64")).SerializeToString()
    refused(channel, sent[:-1], "no ModelInferRequest")
    opening, _, rest = sent.partition(b"\x1a\x01x")
    refused(channel, opening + rest + Request(model_version="7").SerializeToString(), "stand before all else")
