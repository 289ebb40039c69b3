"""Long bodies are read in pieces: what that gives is what reading them whole gives, whatever the bytes."""

from __future__ import annotations

import gzip
import json
import os
import socket
import threading
import urllib.parse
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.engine.session import OnnxSession
from serving.errors import ServingError
from serving.http_api import (
    json_pieces,
    long_json,
    number_array,
    open_inference,
    open_inference_request,
    predict_v1,
    predict_v1_long,
    predict_v1_pieces,
)
from serving.pages import OWN_PAGES_FROM
from tests.conftest import MODELS, Server

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # the answer is an error that names it

EXAMPLES = int(os.environ.get("LONG_BODIES_EXAMPLES", "150"))
calm = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

numbers = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False, width=32), st.integers(-(2**70), 2**70), st.floats(allow_nan=False)
)
fair = st.floats(-1e6, 1e6, width=32) | st.integers(-1000, 1000)
tricky = st.sampled_from(['"', "\\", '},{"', '"],["', "],", '",', "\\u0041", "}", "é", "", "plain"])
texts = st.lists(tricky, max_size=3).map("".join)


def _model(name: str) -> Any:
    signature = OnnxSession(MODELS / name / "1" / "model.onnx", warm_rows=1).signature
    return SimpleNamespace(name=name, version="1", signature=signature)


MODELS_READ = {name: _model(name) for name in ("iris", "penguins", "docs_topic", "digits", "breast_cancer")}
V1 = {name: predict_v1.Codec(model) for name, model in MODELS_READ.items()}
V2 = {name: open_inference.Codec(model) for name, model in MODELS_READ.items()}


@contextmanager
def piecewise(size: int) -> Iterator[None]:
    """Make every body long, and pieces so small that a few rows are many of them."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (json_pieces, number_array, long_json):
            patch.setattr(module, "PIECE_BYTES", size)
        for module in (predict_v1, open_inference, open_inference_request):
            patch.setattr(module, "INLINE_BYTES", 0)
        patch.setattr(long_json, "LONG_BYTES", size // 8)
        patch.setattr(predict_v1_pieces, "_CELLS", 3)
        for module in (long_json, predict_v1_long):
            patch.setattr(module, "LONG_ELEMENT", size)
        patch.setattr(open_inference, "_SHORT_BYTES", 0)
        yield


def outcome(codec: Any, body: bytes) -> Any:
    """Return what a decoder makes of a body, in a form that can be compared."""
    try:
        decoded = codec.decode([], body)
    except ServingError as error:
        return type(error), error.message, error.details
    feeds = [(a.dtype, a.shape, a.tolist() if a.dtype.hasobject else a.tobytes()) for a in decoded.inputs]
    return feeds, decoded.rows, decoded.context or None


def same(codec: Any, body: bytes, size: int) -> None:
    whole = outcome(codec, body)
    with piecewise(size):
        assert outcome(codec, body) == whole


@st.composite
def cells(draw: st.DrawFn, feature: Any) -> Any:
    if feature.shape:
        return np.zeros(feature.shape).tolist()
    if feature.datatype == "BYTES":
        known = st.sampled_from(feature.categories or ("a",))
        return draw(known | texts | (st.none() if feature.nullable else texts))
    return draw(st.one_of(fair, fair, fair, numbers, st.none() if feature.nullable else fair))


@st.composite
def v1_bodies(draw: st.DrawFn) -> tuple[str, bytes]:
    name = draw(st.sampled_from(sorted(MODELS_READ)))
    features = MODELS_READ[name].signature.features
    count = draw(st.integers(1, 6))
    rows = [{f.name: draw(cells(f)) for f in features} for _ in range(count)]
    form = draw(st.sampled_from(["named", "positional", "columns", "single"]))
    document: Any = {"instances": rows}
    if form == "positional":
        document = {"instances": [list(row.values()) for row in rows]}
    elif form == "single":
        document = {"instances": [next(iter(row.values())) for row in rows]}
    elif form == "columns":
        document = {"inputs": {f.name: [row[f.name] for row in rows] for f in features}}
    return name, written(draw, document)


def written(draw: st.DrawFn, document: Any) -> bytes:
    separators = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", " : ")]))
    text = json.dumps(document, separators=separators, ensure_ascii=draw(st.booleans()))
    text = text.replace("[", draw(st.sampled_from(["[", "[ "]))) if draw(st.integers(0, 9)) == 0 else text
    return text.encode("utf-8", "surrogatepass")


@st.composite
def v2_bodies(draw: st.DrawFn) -> tuple[str, bytes]:
    name = draw(st.sampled_from(["iris", "digits", "breast_cancer"]))
    (spec,) = MODELS_READ[name].signature.inputs
    shape = tuple(draw(st.integers(1, 5)) if dim == -1 else dim for dim in spec.shape)
    size = int(np.prod(shape))
    few = draw(st.lists(st.one_of(fair, fair, fair, numbers), min_size=1, max_size=12))
    data: Any = (few * (size // len(few) + 1))[:size]
    if draw(st.booleans()):
        for dim in reversed(shape[1:]):
            data = [data[i : i + dim] for i in range(0, len(data), dim)]
    tensor = {"name": spec.name, "shape": list(shape), "datatype": spec.datatype, "data": data}
    if draw(st.integers(0, 4)) == 0:
        tensor = dict(reversed(tensor.items()))
    return name, written(draw, {"inputs": [tensor]})


@st.composite
def spoilt(draw: st.DrawFn, bodies: st.SearchStrategy[tuple[str, bytes]]) -> tuple[str, bytes]:
    """Cut something out of a body, or put something in."""
    name, body = draw(bodies)
    tokens = b'[ ] { } , : " \\ 1 null true NaN -1e999 "a" [] {} 1, ,1 ],[ },{ ,[1] \xff'.split(b" ")
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(body)))
        body = body[:at] + draw(st.sampled_from([b"", *tokens])) + body[at + draw(st.integers(0, 3)) :]
    return name, body


@calm
@given(v1_bodies(), st.integers(1, 400))
def test_v1_in_pieces_is_v1(given: tuple[str, bytes], size: int) -> None:
    """Rows and columns read in pieces are the arrays, or the error to the letter, of reading them whole."""
    same(V1[given[0]], given[1], size)


@calm
@given(spoilt(v1_bodies()), st.integers(1, 400))
def test_spoilt_v1_in_pieces_is_refused_alike(given: tuple[str, bytes], size: int) -> None:
    """What is no JSON, or does not fit the model, is refused in the same words."""
    same(V1[given[0]], given[1], size)


@calm
@given(v2_bodies(), st.integers(40, 400))
def test_v2_in_pieces_is_v2(given: tuple[str, bytes], size: int) -> None:
    """A tensor read in pieces, flat or nested, is the array, or the error, of reading it whole."""
    same(V2[given[0]], given[1], size)


@calm
@given(spoilt(v2_bodies()), st.integers(40, 400))
def test_spoilt_v2_in_pieces_is_refused_alike(given: tuple[str, bytes], size: int) -> None:
    """Ragged, misplaced or doubled brackets and commas, and all else, are refused in the same words."""
    same(V2[given[0]], given[1], size)


@pytest.mark.parametrize("form", ["named", "positional", "columns"])
@pytest.mark.parametrize("name", ["iris", "penguins"])
def test_pieces_are_what_is_read(monkeypatch: pytest.MonkeyPatch, name: str, form: str) -> None:
    """A long body that is right never comes to a reader that holds the interpreter for all of it."""
    example = MODELS_READ[name].signature.example
    document = {
        "named": {"instances": [example] * 3000},
        "positional": {"instances": [list(example.values())] * 3000},
        "columns": {"inputs": {key: [value] * 3000 for key, value in example.items()}},
    }[form]
    body = bytearray(json.dumps(document).encode())
    expected = outcome(V1[name], bytes(body))
    monkeypatch.setattr(predict_v1.strict_json, "loads", None)
    monkeypatch.setattr(predict_v1, "orjson", None)
    monkeypatch.setattr(V1[name], "_named", None)
    monkeypatch.setattr(V1[name], "_positional", None)
    assert outcome(V1[name], body) == expected
    assert expected[1] == 3000


@pytest.mark.parametrize("nested", [False, True])
def test_tensors_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch, nested: bool) -> None:
    """A long tensor that is right, flat or nested, never comes to a reader that holds the interpreter for all of it."""
    images = np.random.default_rng(0).random((300, 8, 8)).astype(np.float32)
    data = images.tolist() if nested else images.ravel().tolist()
    tensor = {"name": "image", "shape": list(images.shape), "datatype": "FP32", "data": data}
    monkeypatch.setattr(V2["digits"], "_reader", None)
    decoded = V2["digits"].decode([], json.dumps({"inputs": [tensor]}).encode())
    np.testing.assert_array_equal(decoded.inputs[0], images)


def test_long_answers_come_whole_and_in_turn(server: Server) -> None:
    """A client that pipelines and reads slowly gets every long answer whole, none inside another."""
    rows = np.random.default_rng(3).random((4000, 4)).round(3).tolist()
    address = urllib.parse.urlsplit(server.url)
    bodies = [json.dumps({"instances": rows[:count]}).encode() for count in (4000, 1, 4000, 2)]
    alone = [httpx.post(f"{server.url}/v1/models/iris:predict", content=body).content for body in bodies]
    assert len(alone[0]) > 8 * len(alone[1])
    head = b"POST /v1/models/iris:predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(20)
        sock.connect((address.hostname, address.port))
        sending = threading.Thread(
            target=sock.sendall, args=(b"".join(head % len(body) + body for body in bodies),), daemon=True
        )
        sending.start()
        answers = sock.makefile("rb", buffering=1024)
        for expected in alone:
            assert answers.readline() == b"HTTP/1.1 200 OK\r\n"
            length = 0
            while (line := answers.readline()) != b"\r\n":
                if line.startswith(b"content-length:"):
                    length = int(line.split()[1])
            assert answers.read(length) == expected
        sending.join(20)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_long_inflated_body_ends_where_it_says(client: httpx.Client, coding: str) -> None:
    """A long compressed body is read to its end; one that is cut, or has something behind it, is a 400."""
    body = json.dumps({"instances": [[5.1, 3.5, 1.4, 0.2]] * 4000}).encode() + b" " * 1_000_000
    packed = zlib.compress(body) if coding == "deflate" else gzip.compress(body)

    def ask(content: bytes) -> httpx.Response:
        return client.post("/v1/models/iris:predict", content=content, headers={"content-encoding": coding})

    assert len(ask(packed).json()["predictions"]) == 4000
    for spoilt in (packed[:-1], packed[: len(packed) // 2], packed + b"!", packed + packed):
        answer = ask(spoilt)
        assert answer.status_code == 400
        assert "cut short or has something behind it" in answer.json()["error"]


ROWS = np.random.default_rng(4).random((4000, 4))


def test_a_body_of_megabytes_is_read_as_a_short_one_is(client: httpx.Client) -> None:
    """Rows, columns and tensors in megabytes of text, right or wrong, in one length or in chunks, are read alike."""
    rows = ROWS.tolist()
    names = list(MODELS_READ["iris"].signature.example)
    tensor = {"name": "features", "datatype": "FP32", "shape": list(ROWS.shape), "data": rows}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/v1/models/iris:predict", {"instances": rows}),
        ("/v1/models/iris:predict", {"instances": [dict(zip(names, row, strict=True)) for row in rows]}),
        ("/v1/models/iris:predict", {"inputs": dict(zip(names, ROWS.T.tolist(), strict=True))}),
        ("/v1/models/iris:predict", {"instances": rows, "signature_name": "serving_default"}),
        ("/v2/models/iris/infer", {"inputs": [tensor]}),
        ("/v2/models/iris/infer", {"inputs": [tensor], "parameters": {}}),
    ]
    found = []
    for path, document in asked:
        body = json.dumps(document, separators=("," + " " * 64, ":")).encode()
        assert len(body) > OWN_PAGES_FROM
        whole = client.post(path, content=body)
        assert whole.status_code == 200, whole.text[:300]
        chunks = client.post(path, content=(body[at : at + 65_536] for at in range(0, len(body), 65_536)))
        assert chunks.content == whole.content
        found.append(whole.content)
        spoilt = client.post(path, content=body[:-200_000] + b"x" + body[-199_999:])
        assert spoilt.status_code == 400
        assert "is not JSON" in spoilt.json()["error"]
    assert found[0] == found[1] == found[3]
    assert found[4] == found[5]
