"""Long answers are written by the piece: what that gives is, to the byte, what writing them whole gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from serving.engine import ports
from serving.engine.ports import Ports, Wanted
from serving.engine.signature import Feature, Signature, TensorSpec
from serving.http_api import array_json, open_inference_answer, predict_v1_answer
from serving.http_api.codec import Blobs, Mixed
from serving.http_api.open_inference_answer import Writer
from serving.http_api.open_inference_request import Context
from serving.http_api.predict_v1_answer import Answers
from serving.tensor_bytes import Filling
from serving.tensors import NUMPY, Array

calm = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

DATATYPES = ("FP32", "FP64", "FP16", "BF16", "INT64", "INT8", "UINT64", "BOOL", "BYTES")
texts = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(
    ['"', "\\", "é\u2028", "\x00" * 30, "x" * 99]
)


@st.composite
def tensors(draw: st.DrawFn, datatype: str, shape: tuple[int, ...]) -> Array:
    """Make a tensor of any values, those that are not finite among them; strings may be marked as long."""
    if datatype == "BYTES":
        strings = draw(arrays.arrays(object, shape, elements=texts))
        if not draw(st.booleans()):
            return strings
        filling = Filling(shape)
        filling.add(strings)
        return filling.array
    if datatype in ("FP16", "BF16"):
        whole = draw(arrays.arrays(np.float32, shape, elements=st.floats(-70, 70, width=32)))
        return whole.astype(NUMPY[datatype])
    return draw(arrays.arrays(NUMPY[datatype], shape))


@st.composite
def answers(draw: st.DrawFn) -> tuple[Signature, tuple[Array, ...]]:
    """Make a signature and outputs that fit it: some outputs of any shapes, rows or none."""
    rows = draw(st.integers(1, 7))
    batch = draw(st.sampled_from(["dynamic", "none"]))
    specs, outputs = [], []
    for index in range(draw(st.integers(1, 3))):
        datatype = draw(st.sampled_from(DATATYPES))
        inner = tuple(draw(st.lists(st.integers(1, 4), max_size=2)))
        shape = (rows, *inner) if batch == "dynamic" else draw(st.sampled_from([(rows, *inner), inner]))
        if datatype == "BF16" and not shape:
            shape = (1,)
        specs.append(TensorSpec(name=f'o"{index}', datatype=datatype, shape=(-1,) * len(shape)))
        outputs.append(draw(tensors(datatype, shape)))
    return _signature(specs, batch=batch), tuple(outputs)


def _signature(outputs: list[TensorSpec], **more: Any) -> Signature:
    return Signature(
        inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 1)),),
        outputs=tuple(outputs),
        layout="columns",
        features=(Feature(name="x", datatype="FP32"),),
        **more,
    )


@st.composite
def classified(draw: st.DrawFn) -> tuple[Signature, tuple[Array, ...]]:
    """Make the answers of a classifier that names its classes, or numbers them."""
    rows, width = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    classes: Any = draw(st.sampled_from([tuple(f"kind {i}%" for i in range(width)), tuple(range(width))]))
    datatype = draw(st.sampled_from(["INT64", "BYTES"])) if isinstance(classes[0], str) else "INT64"
    label = np.array(draw(st.lists(st.integers(-1, width), min_size=rows, max_size=rows)))
    if datatype == "BYTES":
        label = np.array([classes[i % width] if i >= 0 else "other" for i in label.tolist()], object)
    scores = draw(arrays.arrays(draw(st.sampled_from([np.float32, np.float64])), (rows, width)))
    specs = [
        TensorSpec(name="label", datatype=datatype, shape=(-1,)),
        TensorSpec(name="scores", datatype="FP32" if scores.dtype == np.float32 else "FP64", shape=(-1, width)),
    ]
    return _signature(specs, label="label", scores="scores", classes=classes), (label, scores)


def body(made: bytes | Blobs | Mixed) -> tuple[bytes, Any]:
    """Return what is sent, and its headers."""
    headers = made.headers if isinstance(made, Mixed) else None
    inside = made.body if isinstance(made, Mixed) else made
    if not isinstance(inside, Blobs):
        return inside, headers
    joined = b"".join(inside.parts)
    assert inside.size == len(joined)
    return joined, headers


def same(write: Any, piece: int) -> None:
    """Assert that what writes an answer gives the same by the piece and whole."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (predict_v1_answer, open_inference_answer):
            patch.setattr(module, "LONG_ANSWER_BYTES", 1 << 40)
        whole = write()
        for module in (predict_v1_answer, open_inference_answer):
            patch.setattr(module, "LONG_ANSWER_BYTES", -1)
        for module in (predict_v1_answer, array_json):
            patch.setattr(module, "PIECE", piece)
        patch.setattr(array_json, "CHARACTERS", piece)
        patch.setattr(array_json, "_PART_BYTES", 4 * piece)
        patch.setattr(ports, "_PIECE", piece)
        long = write()
    assert not isinstance(long, bytes)
    assert body(long) == body(whole)


@calm
@given(answers() | classified(), st.integers(1, 12))
def test_v1_by_the_piece_is_v1(given: tuple[Signature, tuple[Array, ...]], piece: int) -> None:
    """Rows and columns of numbers, strings, several outputs and classes by name are the same bytes by the piece."""
    signature, outputs = given
    made = Answers(signature, "m", "1")
    same(lambda: made.rows(outputs), piece)
    same(lambda: made.columns(outputs), piece)


@calm
@given(answers() | classified(), st.data(), st.integers(1, 12))
def test_v2_by_the_piece_is_v2(given: tuple[Signature, tuple[Array, ...]], data: st.DataObject, piece: int) -> None:
    """Outputs as JSON, raw, and as classes, all or some of them, are the same bytes by the piece."""
    signature, outputs = given
    writer = Writer(SimpleNamespace(name="m", version="1"), Ports(signature))  # type: ignore[arg-type]
    wanted = None
    if data.draw(st.booleans()):
        wanted = tuple(
            Wanted(
                index,
                data.draw(st.booleans()),
                0 if spec.datatype in ("BYTES", "BOOL") else data.draw(st.integers(0, 3)),
            )
            for index, spec in enumerate(signature.outputs)
        )
    context = Context(data.draw(st.none() | st.just("id")), wanted)
    same(lambda: writer.write(outputs, context), piece)


@pytest.mark.parametrize("wanted", [None, (Wanted(0, True, 0),), (Wanted(0, False, 5),)])
def test_nothing_long_is_written_at_once(monkeypatch: pytest.MonkeyPatch, wanted: Any) -> None:
    """What writes JSON never gets all of a long answer, whatever its outputs are."""
    seen: list[int] = []
    writes = array_json.dumps

    def dumps(value: Any) -> bytes:
        seen.append(value.size if isinstance(value, np.ndarray) else len(value))
        return writes(value)

    monkeypatch.setattr(array_json, "dumps", dumps)
    monkeypatch.setattr(open_inference_answer, "_data", None)
    outputs = (np.random.default_rng(0).random((30, 5000)), np.zeros((30, 5000), ml_dtypes.bfloat16))
    specs = [
        TensorSpec(name="a", datatype="FP64", shape=(-1, 5000)),
        TensorSpec(name="b", datatype="BF16", shape=(-1, 5000)),
    ]
    writer = Writer(SimpleNamespace(name="m", version="1"), Ports(_signature(specs)))  # type: ignore[arg-type]
    assert len(body(writer.write(outputs, Context(None, wanted)))[0]) > 1000
    answers = Answers(_signature(specs), "m", "1")
    monkeypatch.setattr(predict_v1_answer, "dumps", None)
    for written in (answers.rows(outputs), answers.columns(outputs)):
        assert len(body(written)[0]) > 1_000_000
    assert max(seen) <= array_json.PIECE
