"""Over random requests: the answer is what onnxruntime says, or a 4xx, and never anything else."""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any

import httpx2 as httpx
import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import MODELS, Server

calm = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
words = st.text(max_size=12)
NUMBERS = ("bill_length_mm", "bill_depth_mm", "flipper_length_mm", "body_mass_g")

iris_rows = st.lists(st.tuples(float32, float32, float32, float32).map(list), min_size=1, max_size=5)
penguin_rows = st.lists(
    st.fixed_dictionaries(
        {
            "island": st.sampled_from(["Biscoe", "Dream", "Torgersen", "Atlantis"]),
            "sex": st.none() | st.sampled_from(["male", "female"]) | words,
            **{name: st.none() | float32 for name in NUMBERS},
        }
    ),
    min_size=1,
    max_size=5,
)
texts = st.lists(words, min_size=1, max_size=5)


class Direct:
    """onnxruntime called directly."""

    def __init__(self, name: str, version: str = "1") -> None:
        self.session = ort.InferenceSession(str(MODELS / name / version / "model.onnx"))

    def __call__(self, **feeds: Any) -> list[Any]:
        return list(self.session.run(None, feeds))


IRIS, PENGUINS, DOCS = Direct("iris", "2"), Direct("penguins"), Direct("docs_topic")


def expected(model: str, rows: list[Any]) -> list[Any]:
    if model == "iris":
        return IRIS(features=np.array(rows, dtype=np.float32))
    if model == "docs_topic":
        (port,) = DOCS.session.get_inputs()
        return DOCS(**{port.name: np.array(rows, dtype=object).reshape(-1, 1)})
    feeds: dict[str, Any] = {
        name: np.array([np.nan if r[name] is None else r[name] for r in rows], dtype=np.float32).reshape(-1, 1)
        for name in NUMBERS
    }
    for name in ("island", "sex"):
        feeds[name] = np.array([r[name] or "" for r in rows], dtype=object).reshape(-1, 1)
    return PENGUINS(**feeds)


def check(model: str, rows: list[Any], answer: httpx.Response) -> None:
    assert answer.status_code == 200, answer.text
    labels, scores = expected(model, rows)
    predictions = answer.json()["predictions"]
    assert [p["label"] for p in predictions] == list(labels)
    for prediction, row in zip(predictions, scores, strict=True):
        got = [np.float32(v) if v is not None else np.float32(np.nan) for v in prediction["probabilities"].values()]
        finite = [v if np.isfinite(v) else np.float32(np.nan) for v in row]
        # Trees answer to the bit. A softmax in onnxruntime rounds otherwise at the end of a vector than inside it, so
        # a row's last digits depend on where in the batch it stands.
        np.testing.assert_allclose(got, finite, rtol=0 if model == "iris" else 1e-4, atol=0)


@calm
@given(st.data())
def test_any_valid_rows_give_what_onnxruntime_gives(server: Server, data: st.DataObject) -> None:
    """Whatever strangers' rows they run with, valid rows are answered, to the bit, as onnxruntime answers them."""
    drawn: list[tuple[str, list[Any]]] = data.draw(
        st.lists(
            st.one_of(
                st.tuples(st.just("iris"), iris_rows),
                st.tuples(st.just("penguins"), penguin_rows),
                st.tuples(st.just("docs_topic"), texts),
            ),
            min_size=1,
            max_size=12,
        )
    )

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=20) as client:
            calls = [client.post(f"/v1/models/{m}:predict", content=_body({"instances": rows})) for m, rows in drawn]
            return await asyncio.gather(*calls)

    for (model, rows), answer in zip(drawn, asyncio.run(ask()), strict=True):
        check(model, rows, answer)


@calm
@given(rows=iris_rows)
def test_dialects_and_forms_agree(client: httpx.Client, rows: list[list[float]]) -> None:
    """v2 flat, v2 nested and V1 give the same numbers."""
    labels, scores = expected("iris", rows)
    flat = [v for row in rows for v in row]
    for data in (flat, rows):
        tensor = {"name": "features", "datatype": "FP32", "shape": [len(rows), 4], "data": data}
        answer = client.post("/v2/models/iris/infer", content=_body({"inputs": [tensor]}))
        assert answer.status_code == 200, answer.text
        by_name = {o["name"]: o["data"] for o in answer.json()["outputs"]}
        assert by_name["label"] == list(labels)
        assert np.array_equal(np.float32(by_name["probabilities"]), scores.ravel())


GOOD = [
    ("/v1/models/iris:predict", b'{"instances":[{"sepal_length":5.1,"sepal_width":3.5,"petal_length":1.4,'
     b'"petal_width":0.2},[1,2,3,4]]}'),
    ("/v1/models/penguins:predict", b'{"instances":[{"island":"Biscoe","sex":null,"bill_length_mm":39.1,'
     b'"bill_depth_mm":18.7,"flipper_length_mm":181,"body_mass_g":3750}]}'),
    ("/v1/models/docs_topic:predict", b'{"instances":["Return the sorted array."]}'),
    ("/v2/models/iris/infer", b'{"inputs":[{"name":"features","datatype":"FP32","shape":[1,4],"data":[1,2,3,4]}]}'),
    ("/v2/models/digits/infer", b'{"id":"x","inputs":[{"name":"image","datatype":"FP32","shape":[1,8,8],"data":['
     + b",".join([b"1"] * 64) + b']}],"outputs":[{"name":"label"}]}'),
]  # fmt: skip
TOKENS = [
    *(b"null", b"NaN", b"1e999", b"-0", b"true", b"[", b"]", b"{", b"}", b'"', b",", b":", b"[]", b"{}", b"-1", b"0.1"),
    *(b"\\u0000", b"\xff", b"99999999999999999999"),
]


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, bytes]:
    path, body = draw(st.sampled_from(GOOD))
    made = bytearray(body)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(made)))
        kind = draw(st.sampled_from(["insert", "cut", "token", "flip"]))
        if kind == "insert":
            made[at:at] = draw(st.binary(min_size=1, max_size=4))
        elif kind == "token":
            made[at : at + draw(st.integers(0, 4))] = draw(st.sampled_from(TOKENS))
        elif kind == "cut":
            del made[at : at + draw(st.integers(1, 20))]
        elif at < len(made):
            made[at] ^= 1 << draw(st.integers(0, 7))
    return path, bytes(made)


@settings(calm, max_examples=400)
@given(request=mutated() | st.tuples(st.sampled_from([path for path, _ in GOOD]), st.binary(max_size=200)))
def test_any_bytes_give_a_4xx_or_an_answer(client: httpx.Client, request: tuple[str, bytes]) -> None:
    """No bytes make a 5xx: a refusal is a 4xx with a text, and what is answered is valid JSON by RFC 8259."""
    path, body = request
    answer = client.post(path, content=body)
    assert answer.status_code < 500, answer.text
    if answer.status_code == 200:
        sent = json.loads(body, parse_constant=_never)
        got = answer.json()
        if path.startswith("/v1"):
            rows = sent["instances"] if "instances" in sent else next(iter(sent["inputs"].values()))
            assert len(got.get("predictions", rows)) == len(rows)
    else:
        assert answer.json()["error"]


def _never(token: str) -> Any:
    raise AssertionError(f"{token} is no JSON")


def _body(value: Any) -> bytes:
    """Write JSON with numbers that are float32 as a client of float32 would."""
    return json.dumps(value).encode()


@pytest.mark.parametrize("number", [3.4028234663852886e38, 1e-45, -0.0, 16777217.0, 0.1])
def test_floats_arrive_as_the_nearest_float32(client: httpx.Client, number: float) -> None:
    """Edge values of float32 are what the model sees, in both dialects."""
    row = [number, 3.5, 1.4, 0.2]
    nearest = [struct.unpack("f", struct.pack("f", v))[0] for v in row]
    check("iris", [nearest], client.post("/v1/models/iris:predict", json={"instances": [row]}))
