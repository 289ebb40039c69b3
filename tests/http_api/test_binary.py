"""Binary tensors over HTTP, written out by hand as the protocol's text has them."""

from __future__ import annotations

import gzip
import json
import struct
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest

ROW = [5.1, 3.5, 1.4, 0.2]
LENGTH = "inference-header-content-length"


def raw(document: dict[str, Any], *blobs: bytes, **headers: str) -> dict[str, Any]:
    head = json.dumps(document).encode()
    return {"content": b"".join((head, *blobs)), "headers": {LENGTH: str(len(head)), **headers}}


def iris(rows: int = 1, size: int | None = None, **more: Any) -> dict[str, Any]:
    size = rows * 16 if size is None else size
    tensor = {"name": "features", "datatype": "FP32", "shape": [rows, 4], "parameters": {"binary_data_size": size}}
    return {"inputs": [tensor], **more}


def split(answer: httpx.Response) -> tuple[dict[str, Any], bytes]:
    assert answer.status_code == 200, answer.text
    length = int(answer.headers[LENGTH])
    assert answer.headers["content-type"] == "application/octet-stream"
    return json.loads(answer.content[:length]), answer.content[length:]


def as_json(client: httpx.Client, path: str = "/v2/models/iris/infer", **more: Any) -> Any:
    body = {"inputs": [{"name": "features", "datatype": "FP32", "shape": [1, 4], "data": ROW}], **more}
    return client.post(path, json=body).json()


def test_raw_input_gives_the_answer_of_the_same_json(client: httpx.Client) -> None:
    """A tensor sent as raw bytes is answered as the same tensor in JSON; twice, since the head is kept."""
    for _ in range(2):
        answer = client.post("/v2/models/iris/infer", **raw(iris(), np.array(ROW, "<f4").tobytes()))
        assert answer.json() == as_json(client)


def test_a_head_seen_before_vouches_for_nothing(client: httpx.Client) -> None:
    """Each body behind a head that is known by now is checked as the first was, at any place in memory."""
    good = np.array(ROW, "<f4")
    for space in ("", " ", "  ", "   "):  # the numbers then lie at any remainder of their size
        document = iris(parameters={"binary_data_output": True}) | ({"outputs": []} if space else {})
        head = json.dumps(document).encode() + space.encode()

        def ask(blob: bytes, head: bytes = head) -> httpx.Response:
            return client.post("/v2/models/iris/infer", content=head + blob, headers={LENGTH: str(len(head))})

        answers = [ask(good.tobytes()) for _ in range(3)]
        assert {a.status_code for a in answers} == {200}
        assert len({a.content for a in answers}) == len({a.headers[LENGTH] for a in answers}) == 1
        for wrong, said in ((np.nan, "element 2 is not finite"), (np.inf, "element 2"), (-np.inf, "element 2")):
            answer = ask(np.array([1, 2, wrong, 4], "<f4").tobytes())
            assert answer.status_code == 400
            assert said in answer.json()["error"]
        assert ask(good.tobytes()[:-1]).status_code == ask(good.tobytes() + b"!").status_code == 400
        assert ask(np.array([3e38, 3e38, -3e38, 3e38], "<f4").tobytes()).status_code == 200  # whose sum overflows
        other = ask(np.array([6.5, 3.0, 5.5, 2.0], "<f4").tobytes())
        assert other.status_code == 200
        assert other.content != answers[0].content


def test_raw_outputs_are_blobs_in_their_order(client: httpx.Client) -> None:
    """binary_data_output gives every output as raw bytes behind the JSON; strings stand behind their lengths."""
    head, blobs = split(
        client.post(
            "/v2/models/iris/infer",
            json=None,
            **raw(iris(parameters={"binary_data_output": True}, id="a"), np.array(ROW, "<f4").tobytes()),
        )
    )
    sizes = [output["parameters"]["binary_data_size"] for output in head["outputs"]]
    assert head["id"] == "a"
    assert sum(sizes) == len(blobs)
    expected = {o["name"]: o["data"] for o in as_json(client)["outputs"]}
    label = blobs[: sizes[0]]
    assert struct.unpack_from("<I", label)[0] == len(label) - 4
    assert [label[4:].decode()] == expected["label"]
    np.testing.assert_array_equal(np.frombuffer(blobs[sizes[0] :], "<f4"), np.array(expected["probabilities"], "f4"))


def test_each_output_may_choose(client: httpx.Client) -> None:
    """One output raw and another as JSON, in the order asked for, whatever the request's default is."""
    outputs = [{"name": "probabilities", "parameters": {"binary_data": True}}, {"name": "label"}]
    body = {"inputs": [{"name": "features", "datatype": "FP32", "shape": [1, 4], "data": ROW}], "outputs": outputs}
    head, blobs = split(client.post("/v2/models/iris/infer", json=body))
    assert [o["name"] for o in head["outputs"]] == ["probabilities", "label"]
    assert len(blobs) == 12
    assert "data" in head["outputs"][1]


def test_raw_and_json_inputs_mix(client: httpx.Client) -> None:
    """Blobs belong to the inputs that announce one, in order; inputs in JSON between them are skipped."""
    row = {
        "island": "Biscoe",
        "sex": "male",
        "bill_length_mm": 40.0,
        "bill_depth_mm": 18.0,
        "flipper_length_mm": 190.0,
        "body_mass_g": 4000.0,
    }
    inputs: list[dict[str, Any]] = []
    blobs = []
    for name, value in row.items():
        datatype = "BYTES" if isinstance(value, str) else "FP32"
        tensor: dict[str, Any] = {"name": name, "datatype": datatype, "shape": [1, 1]}
        if name in ("island", "bill_depth_mm"):
            blob = struct.pack("<I", 6) + b"Biscoe" if name == "island" else struct.pack("<f", 18)
            blobs.append(blob)
            tensor["parameters"] = {"binary_data_size": len(blob)}
        else:
            tensor["data"] = [value]
        inputs.append(tensor)
    mixed = client.post("/v2/models/penguins/infer", **raw({"inputs": inputs}, *blobs))
    named = client.post("/v1/models/penguins:predict", json={"instances": [row]})
    assert mixed.status_code == 200, mixed.text
    assert mixed.json()["outputs"][0]["data"] == [named.json()["predictions"][0]["label"]]


def test_nothing_but_the_tensor(client: httpx.Client) -> None:
    """Header 0: the body is the only input's bytes, its shape is inferred, and all outputs come back raw."""
    head, _ = split(
        client.post("/v2/models/iris/infer", content=np.array(ROW * 3, "<f4").tobytes(), headers={LENGTH: "0"})
    )
    assert head["outputs"][1]["shape"] == [3, 3]
    head, _ = split(client.post("/v2/models/docs_topic/infer", content=b"sort an array", headers={LENGTH: "0"}))
    assert head["outputs"][0]["shape"] == [1]


def test_the_length_is_of_the_inflated_json(client: httpx.Client) -> None:
    """Under gzip the header still counts uncompressed bytes, both ways."""
    rows = 600
    made = raw(iris(rows, parameters={"binary_data_output": True}), np.array(ROW * rows, "<f4").tobytes())
    for coding in ("gzip", "deflate"):
        headers = {**made["headers"], "content-encoding": "gzip", "accept-encoding": coding}
        answer = client.post("/v2/models/iris/infer", content=gzip.compress(made["content"]), headers=headers)
        head, blobs = split(answer)
        assert sum(o["parameters"]["binary_data_size"] for o in head["outputs"]) == len(blobs)
        assert len(blobs) > 10_000


def test_classification_gives_value_index_label(client: httpx.Client) -> None:
    """`classification: k` turns scores into the k best of each row as value:index:label, best first."""
    outputs = [{"name": "probabilities", "parameters": {"classification": 2}}]
    (output,) = as_json(client, outputs=outputs)["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [1, 2])
    value, index, label = output["data"][0].split(":")
    assert (index, label) == ("0", "setosa")
    assert float(value) > 0.9


BAD = {
    "short": raw(iris(), b"\0" * 15),
    "left over": raw(iris(), b"\0" * 17),
    "size against shape": raw(iris(size=12), b"\0" * 12),
    "no blob announced": raw(
        {"inputs": [{"name": "features", "datatype": "FP32", "shape": [1, 4], "data": ROW}]}, b"x"
    ),
    "both": raw({"inputs": [{**iris()["inputs"][0], "data": ROW}]}, b"\0" * 16),
    "not finite": raw(iris(), np.array([1, np.inf, 2, 3], "<f4").tobytes()),
    "negative size": raw(iris(size=-16), b"\0" * 16),
    "huge size": raw(iris(size=2**70), b"\0" * 16),
    "length too long": {**raw(iris(), b"\0" * 16), "headers": {LENGTH: "100000"}},
    "length negative": {**raw(iris(), b"\0" * 16), "headers": {LENGTH: "-1"}},
    "length no number": {**raw(iris(), b"\0" * 16), "headers": {LENGTH: "1e2"}},
    "shared memory": raw(
        {
            "inputs": [
                {"name": "features", "datatype": "FP32", "shape": [1, 4], "parameters": {"shared_memory_region": "x"}}
            ]
        }
    ),
    "priority": raw(iris(parameters={"priority": 4}), b"\0" * 16),
    "timeout": raw(iris(parameters={"timeout": -1}), b"\0" * 16),
    "classes of strings": raw(
        iris(outputs=[{"name": "label", "parameters": {"classification": 1}}]), np.array(ROW, "<f4").tobytes()
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_lies_about_bytes_are_bad_requests(client: httpx.Client, case: str) -> None:
    """Whatever a request says wrongly of its bytes is a 400 that says so, and the connection lives on."""
    answer = client.post("/v2/models/iris/infer", **BAD[case])
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]
    assert client.post("/v2/models/iris/infer", **raw(iris(), b"\0" * 16)).status_code == 200


@pytest.mark.parametrize(
    "blob", [b"", b"\3\0\0\0ab", b"\2\0\0\0ab\0", b"\1\0\0\0a\1\0\0\0b", b"\1\0\0\0\xff", b"\xff\xff\xff\xffab"]
)
def test_broken_strings_are_bad_requests(client: httpx.Client, blob: bytes) -> None:
    """BYTES whose lengths, count or UTF-8 are wrong are 400."""
    tensor = {"name": "text", "datatype": "BYTES", "shape": [1, 1], "parameters": {"binary_data_size": len(blob)}}
    answer = client.post("/v2/models/docs_topic/infer", **raw({"inputs": [tensor]}, blob))
    assert answer.status_code == 400, answer.text
