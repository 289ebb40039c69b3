"""Long documents of every form, right or wrong, are read in pieces as they are read whole."""

from __future__ import annotations

import copy
import json
import re
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import tensor_bytes
from serving.engine.signature import Feature, Signature, TensorSpec
from serving.errors import InvalidRequest, SignatureMismatch
from serving.http_api import long_json, open_inference, strict_json
from tests.http_api.test_long_bodies import (
    MODELS_READ,
    V1,
    calm,
    outcome,
    piecewise,
    same,
    spoilt,
    texts,
    v1_bodies,
    written,
)

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # the answer is an error that names it

PATHS = [frozenset({b"{[{["}), frozenset({b"{[", b"{{["})]


def _codec(*inputs: tuple[str, str, tuple[int, ...]], infinite: bool = False) -> open_inference.Codec:
    """Make a decoder for a model with inputs of any types."""
    signature = Signature(
        inputs=tuple(TensorSpec(name=name, datatype=kind, shape=(-1, *shape)) for name, kind, shape in inputs),
        outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1,)),),
        layout="columns",
        features=tuple(Feature(name=n, datatype=k, shape=s, allow_non_finite=infinite) for n, k, s in inputs),
    )
    return open_inference.Codec(SimpleNamespace(name="any", version="1", signature=signature))


KINDS = ["INT8", "INT64", "UINT8", "UINT64", "BOOL", "BYTES", "FP32", "FP64", "FP16"]
CODECS = {
    **{kind: _codec(("x", kind, (2,))) for kind in KINDS},
    "deep": _codec(("x", "INT32", (2, 3))),
    "deep flags": _codec(("x", "BOOL", (2, 1))),
    "deep texts": _codec(("x", "BYTES", (1, 2))),
    "infinite": _codec(("x", "FP32", (-1,)), infinite=True),
    "pair": _codec(("x", "FP32", (1,)), ("y", "INT64", ())),
    "mixed": _codec(("x", "BYTES", ()), ("y", "BOOL", ()), ("z", "FP64", (2,))),
}
SHAPES = {"deep": (2, 3), "deep flags": (2, 1), "deep texts": (1, 2)}
whole = st.integers(-300, 300) | st.integers(-(2**65), 2**65)
odd = st.sampled_from([None, 1.5, True, "1", 2**63, 2**64, -1, 10**30, 1e39, 10**390, [], [1], {}, {"a": 1}])
odd = odd.map(copy.deepcopy)
half = st.just("\ud800")
"""Half of a surrogate pair; V1 counts the columns of what it says of that in a text of its own."""
CELLS: dict[str, Any] = {
    "BOOL": st.booleans(),
    "BYTES": texts,
    "FP32": st.floats(-1e6, 1e6, width=32) | st.integers(-9, 9),
    "FP64": st.floats(allow_nan=False, allow_infinity=False),
    "FP16": st.integers(-9, 9),
    "INT64": st.integers(-(2**63), 2**63 - 1),
    "UINT64": st.integers(0, 2**64 - 1),
}


@st.composite
def v2_documents(draw: st.DrawFn) -> tuple[str, bytes]:
    """Write a request, most often a right one: its members in any order, some of them more than is needed."""
    name = draw(st.sampled_from(sorted(CODECS)))
    inputs = []
    rows = draw(st.integers(1, 9))
    wrong = draw(st.integers(0, 2)) == 0
    for spec in CODECS[name]._reader._ports.inputs:
        shape = [rows, *(2 if dim == -1 else dim for dim in spec.shape[1:])]
        size = int(np.prod(shape))
        cell = CELLS.get(spec.datatype, st.integers(0, 127))
        few = draw(st.lists(cell, min_size=1, max_size=12))
        data: Any = (few * (size // len(few) + 1))[:size]
        if wrong:
            data[draw(st.integers(0, size - 1))] = draw(odd | whole | half)
        if draw(st.booleans()):
            for dim in reversed(shape[1:]):
                data = [data[i : i + dim] for i in range(0, len(data), dim)]
        tensor = {"name": spec.name, "shape": shape, "datatype": spec.datatype, "data": data}
        tensor |= draw(st.sampled_from([{}, {}, {"parameters": {}}, {"more": [[1, 2], {"a": []}]}]))
        inputs.append(dict(draw(st.permutations(list(tensor.items())))))
    document = {"inputs": inputs, **draw(st.sampled_from([{}, {"id": "one"}, {"outputs": [{"name": "y"}]}]))}
    return name, written(draw, dict(draw(st.permutations(list(document.items())))))


@calm
@given(v2_documents(), st.integers(8, 400))
def test_any_tensors_in_pieces_are_tensors(given: tuple[str, bytes], size: int) -> None:
    """Tensors of any type, several of them, in any order, are the arrays, or the error, of reading them whole."""
    same(CODECS[given[0]], given[1], size)


@calm
@given(spoilt(v2_documents()), st.integers(8, 400))
def test_spoilt_tensors_in_pieces_are_refused_alike(given: tuple[str, bytes], size: int) -> None:
    """A document that is no JSON, or no request, is refused in the same words and at the same place."""
    same(CODECS[given[0]], given[1], size)


@st.composite
def doubled(draw: st.DrawFn, bodies: st.SearchStrategy[tuple[str, bytes]]) -> tuple[str, bytes]:
    """Put the first key of an object there once more."""
    name, body = draw(bodies)
    places = [found.span(1) for found in re.finditer(rb'\{[ \n]*("(?:[^"\\]|\\.)*")', body)]
    if places:
        start, end = draw(st.sampled_from(places))
        body = body[:start] + body[start:end] + b":1," + body[start:]
    return name, body


@st.composite
def wrong_rows(draw: st.DrawFn) -> tuple[str, bytes]:
    """Write rows or columns some of whose cells are wrong, and members beside them."""
    name, body = draw(v1_bodies())
    document = json.loads(body)
    (top,) = document
    rows = document[top] if isinstance(document[top], list) else list(document[top].values())
    for _ in range(draw(st.integers(0, 3))):
        row = rows[draw(st.integers(0, len(rows) - 1))]
        if isinstance(row, dict):
            row[draw(st.sampled_from([*row, "unknown", ""]))] = draw(odd)
        elif isinstance(row, list) and row:
            row[draw(st.integers(0, len(row) - 1))] = draw(odd)
        else:
            rows[draw(st.integers(0, len(rows) - 1))] = draw(odd)
    if isinstance(document[top], dict) and draw(st.integers(0, 3)) == 0:
        document[top][draw(st.sampled_from(["unknown", *document[top]]))] = draw(odd)
    more = draw(st.sampled_from([{}, {"parameters": {"a": [1]}}, {"signature_name": "serving_default"}, {"b": [1]}]))
    return name, written(draw, {**more, **document} if draw(st.booleans()) else {**document, **more})


@calm
@given(wrong_rows() | doubled(wrong_rows()), st.integers(8, 400))
def test_wrong_rows_in_pieces_are_refused_alike(given: tuple[str, bytes], size: int) -> None:
    """Wrong cells are counted and named as they are in a short body, and members beside the rows are judged alike."""
    same(V1[given[0]], given[1], size)


keys = st.sampled_from(["a", "b", "", "data", "é", "\\", "x" * 300, "y" * 300])
values = st.recursive(
    half
    | st.none()
    | st.booleans()
    | whole
    | texts
    | st.floats(allow_nan=False)
    | st.sampled_from(["\u20ac\U0001f600\n" * 9]),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=40,
)


@st.composite
def documents(draw: st.DrawFn) -> tuple[str, bytes]:
    """Write any JSON."""
    form = draw(st.sampled_from(["any", "rows", "columns", "tensors"]))
    if form == "any":
        document: Any = draw(values)
    elif form == "rows":
        document = {"instances": draw(st.lists(values, max_size=9))}
    elif form == "columns":
        document = {"inputs": draw(st.dictionaries(keys, st.lists(values, max_size=9), max_size=3))}
    else:
        document = {"inputs": [{"data": draw(st.lists(values, max_size=9)), "p": draw(values)}]}
    return form, written(draw, document)


def listed(value: Any) -> Any:
    """Put the elements of long arrays in their place."""
    if isinstance(value, long_json.Long):
        return listed([each for piece in value.pieces() for each in strict_json.loads(piece)])
    if isinstance(value, list):
        return [listed(each) for each in value]
    return {key: listed(each) for key, each in value.items()} if isinstance(value, dict) else value


def read(body: bytes, size: int, paths: frozenset[bytes]) -> Any:
    with piecewise(size):
        try:
            return repr(listed(long_json.read(body, paths)))
        except InvalidRequest as error:
            return error.message


def read_whole(body: bytes) -> Any:
    try:
        return repr(strict_json.loads(body))
    except InvalidRequest as error:
        return error.message


@calm
@given(documents() | spoilt(documents()) | doubled(documents()), st.integers(1, 400), st.sampled_from(PATHS))
def test_any_json_in_pieces_is_json(given: tuple[str, bytes], size: int, paths: frozenset[bytes]) -> None:
    """Any document, JSON or not, is what the strict reader makes of it, or is refused in its words."""
    assert read(given[1] or b" ", size, paths) == read_whole(given[1] or b" ")


LONGEST = 3_000_000


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"[" * LONGEST, "nested too deeply"),
        (b'{"instances": ' + b"[" * LONGEST, "nested too deeply"),
        (b'"' + b"x" * LONGEST + b'"', "beside its arrays of rows or data"),
        (b'{"instances": ["' + b"x" * LONGEST, "unterminated string starting at at line 1, column 16"),
        (b'{"instances": ["' + b"x" * LONGEST + b'\n"]}', "invalid control character at at line 1, column 3000017"),
        (b'{"instances": [' + b"1" * LONGEST + b"]}", "a number has over 400 digits"),
        (b'{"instances": [0.' + b"1" * LONGEST + b"]}", "a value in the body has over 262144 bytes"),
        (json.dumps({str(i): i for i in range(300_000)}).encode(), "beside its arrays of rows or data"),
        (json.dumps({"instances": [{str(i): i for i in range(300_000)}]}).encode(), "over 65536 members"),
        (b"[" + b"[]," * LONGEST + b"[]]", "beside its arrays of rows or data"),
        (b'{"instances": [1' + (b" " * 200 + b"1") * 20_000 + b"]}", "expecting ',' delimiter"),
        (b" " * LONGEST, f"expecting value at line 1, column {LONGEST + 1}"),
        (b'{"instances": [1' + b"\n" * LONGEST + b"x]}", f"expecting ',' delimiter at line {LONGEST + 1}, column 1"),
        (b'{"instances": [{"a": [' + b"1," * LONGEST + b'1], "b": 1, "b": 1}]}', "the key 'b' stands twice"),
    ],
)
def test_hopeless_documents_are_refused_soon(body: bytes, told: str) -> None:
    """What no piece can be cut from is refused with a reason, in time that grows with its length alone."""
    for codec in (V1["iris"], CODECS["FP32"]):
        began = time.monotonic()
        error = outcome(codec, body)
        assert told in error[1] or "beside its arrays of rows or data" in error[1] or "V1" in told
        assert time.monotonic() - began < 20


@pytest.mark.parametrize("escaped", [True, False])
@pytest.mark.parametrize("shift", range(13))
def test_long_texts_are_read(escaped: bool, shift: int) -> None:
    """A text of megabytes, with escapes and characters of several bytes anywhere, means what it says."""
    text = "x" * shift + 'a "text" with é and \\ and \U0001f600\U0001f600\n' * 50_000
    body = json.dumps({"instances": [text, "short"]}, ensure_ascii=escaped).encode()
    assert V1["docs_topic"].decode([], body).inputs[0].ravel().tolist() == [text, "short"]
    tensor = {"name": "x", "shape": [1, 2], "datatype": "BYTES", "data": [[text, "short"]]}
    body = json.dumps({"inputs": [tensor]}, ensure_ascii=escaped).encode()
    assert CODECS["BYTES"].decode([], body).inputs[0].ravel().tolist() == [text, "short"]


def test_whole_numbers_that_do_not_fit_are_named() -> None:
    """A whole number that does not fit the tensor's type is refused by its place, and never wrapped."""
    tensor = {"name": "x", "shape": [20_000, 2], "datatype": "INT8", "data": [1] * 39_999 + [200]}
    error = outcome(CODECS["INT8"], json.dumps({"inputs": [tensor]}).encode())
    assert error[1] == "/inputs/0/data: element 39999 does not fit INT8 (-128 to 127)"


def test_long_spaces_are_read() -> None:
    """Spaces of any length may stand between the tokens."""
    body = json.dumps({"instances": ["a", "b"]}).encode()
    for token in (b"[", b",", b":", b"}"):
        body = body.replace(token, b"\n" * 300_000 + token + b" " * 300_000)
    assert V1["docs_topic"].decode([], body).inputs[0].ravel().tolist() == ["a", "b"]


def test_unknown_columns_beside_long_ones_are_counted() -> None:
    """All unknown names are counted, however many there are; the first are named."""
    columns: dict[str, Any] = {name: [1.0, "x"] * 10_000 for name in MODELS_READ["iris"].signature.example}
    columns |= {f"unknown {i}": [1] for i in range(50)}
    error, message, details = outcome(V1["iris"], json.dumps({"inputs": columns}).encode())
    assert error is SignatureMismatch
    assert message.endswith("(and 40049 more)")
    assert [detail.path for detail in details[:2]] == ["/inputs/sepal_length/1", "/inputs/sepal_length/3"]
    del columns["sepal_length"], columns["sepal_width"], columns["petal_length"]
    columns["petal_width"] = [1.0] * 20_000
    error, message, details = outcome(V1["iris"], json.dumps({"inputs": columns}).encode())
    assert message.endswith("(and 52 more)")
    assert details[3].path == "/inputs/unknown 0"


def test_thousands_of_inputs_are_read() -> None:
    """A model may have thousands of inputs; a request for it is long, and none of its tensors is."""
    names = [f"feature_number_{i}" for i in range(3000)]
    codec = _codec(*[(name, "FP32", (1,)) for name in names])
    data = {"shape": [10, 1], "datatype": "FP32", "data": np.linspace(0, 1, 10).tolist(), "parameters": {}}
    body = json.dumps({"inputs": [{"name": name, **data} for name in names]}).encode()
    inputs = codec.decode([], body).inputs
    assert len(inputs) == 3000
    assert all(np.allclose(array.ravel(), data["data"]) for array in inputs)


def test_a_long_head_before_raw_tensors_is_read() -> None:
    """A request whose JSON is long, with raw tensors behind it, is read as one with a short head is."""
    numbers = np.arange(30_000).reshape(-1, 1)
    inputs = [
        {"name": "x", "shape": [30_000, 1], "datatype": "FP32", "data": numbers.tolist()},
        {"name": "y", "shape": [30_000], "datatype": "INT64", "parameters": {"binary_data_size": 240_000}},
    ]
    head = json.dumps({"inputs": inputs}).encode()
    body = memoryview(head + numbers.astype(np.int64).tobytes())
    x, y = CODECS["pair"].decode([(b"inference-header-content-length", b"%d" % len(head))], body).inputs
    np.testing.assert_array_equal(x, numbers.astype(np.float32))
    np.testing.assert_array_equal(y, numbers.ravel())


def test_long_tensors_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that holds the interpreter for all of a body comes to see a long one."""
    size = 40_000
    data = {"x": [f"t{i}" for i in range(size)], "y": [i % 3 == 0 for i in range(size)], "z": [[1.5, 2]] * size}
    shapes, kinds = {"x": [size], "y": [size], "z": [size, 2]}, {"x": "BYTES", "y": "BOOL", "z": "FP64"}
    inputs = [{"data": data[k], "shape": shapes[k], "datatype": kinds[k], "name": k} for k in "yzx"]
    strict, longest = strict_json.parse, []
    monkeypatch.setattr(strict_json, "parse", lambda text, *a: longest.append(len(text)) or strict(text, *a))
    decoded = CODECS["mixed"].decode([], json.dumps({"inputs": inputs}).encode())
    assert [array.tolist() for array in decoded.inputs] == [data["x"], data["y"], data["z"]]
    assert max(longest) < long_json.PIECE_BYTES


def test_texts_are_let_go_of_on_a_thread() -> None:
    """An array of many strings goes on a thread of its own, whoever lets go of it."""
    array = tensor_bytes.joined([np.array([f"text {i}" for i in range(20_000)], object) for _ in range(3)])
    kept = np.empty(1, object)
    kept[0] = watched = _Watched()
    array[0], array[-1] = watched, watched
    del watched, kept
    assert not _Watched.gone
    del array
    until = time.monotonic() + 10
    while not _Watched.gone and time.monotonic() < until:
        time.sleep(0.001)
    assert _Watched.gone == ["give-back"]


class _Watched:
    gone: list[str] = []  # noqa: RUF012  of the one test

    def __del__(self) -> None:
        import threading

        self.gone.append(threading.current_thread().name)
