"""REST: raw tensors behind the JSON, and compression."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import numpy as np

from tests.conformance.point import point
from tests.conformance.subject import LENGTH, NotAsked, Subject, bad, from_bytes, read, same, to_bytes

BINARY = "REST: binary tensors"
CODING = "REST: compression"


@point(BINARY, "raw inputs are answered as the same JSON")
def _(subject: Subject) -> None:
    model = subject.model(numbers=True)
    document, blobs = model.binary(3 if model.batched else 1)
    same(subject.infer(model, document, *blobs), subject.infer(model, model.json(3 if model.batched else 1)))


@point(BINARY, "raw strings, each behind its length")
def _(subject: Subject) -> None:
    model = subject.model(datatype="BYTES")
    document, blobs = model.binary()
    same(subject.infer(model, document, *blobs), subject.infer(model, model.json()))


@point(BINARY, "binary_data_output: every output is raw, sizes add up")
def _(subject: Subject) -> None:
    model = subject.model()
    document, blobs = model.binary(parameters={"binary_data_output": True})
    answer = subject.post(model.path, document, *blobs)
    assert LENGTH in answer.headers, f"{answer.status_code}, without {LENGTH}"
    found = read(answer)
    assert all("binary_data_size" in o.get("parameters", {}) for o in found["outputs"]), "an output is not raw"
    same(found, subject.infer(model, model.json()))


@point(BINARY, "JSON in, raw out")
def _(subject: Subject) -> None:
    model = subject.model()
    answer = subject.post(model.path, model.json(parameters={"binary_data_output": True}))
    assert LENGTH in answer.headers, f"{answer.status_code}, without {LENGTH}"
    same(read(answer), subject.infer(model, model.json()))


@point(BINARY, "binary_data of an output wins over the request's")
def _(subject: Subject) -> None:
    model = next(
        (m for m in subject.models if len(m.outputs) > 1 and m.inputs[0].datatype not in ("FP16", "BF16")), None
    )
    if model is None:
        raise NotAsked("no model has two outputs")
    first, second = (t.name for t in model.outputs[:2])
    outputs = [{"name": first, "parameters": {"binary_data": False}}, {"name": second}]
    answer = subject.infer(model, model.json(outputs=outputs, parameters={"binary_data_output": True}))
    sizes = ["binary_data_size" in output.get("parameters", {}) for output in answer["outputs"]]
    assert sizes == [False, True], f"raw: {sizes}"


@point(BINARY, "JSON and raw inputs in one request: blobs in input order")
def _(subject: Subject) -> None:
    model = subject.model(inputs=3)
    document, blobs = model.binary()
    plain = model.json()
    document["inputs"][1] = plain["inputs"][1]
    same(subject.infer(model, document, *[b for i, b in enumerate(blobs) if i != 1]), subject.infer(model, plain))


@point(BINARY, "header 0: the body is the only input, raw")
def _(subject: Subject) -> None:
    model = subject.model(numbers=True, inputs=1)
    array = model.arrays()[0]
    answer = subject.post(model.path, array.tobytes(), **{LENGTH: "0"})
    found = read(answer)
    same(found, subject.infer(model, model.json()))


@point(BINARY, "an output without elements has size 0")
def _(subject: Subject) -> None:
    model = subject.named("probe_empty")
    blob = np.zeros(4, np.float32).tobytes()
    document, _ = model.binary(parameters={"binary_data_output": True})
    (output,) = subject.infer(model, document, blob)["outputs"]
    assert output["shape"] == [1, 0]
    assert output["parameters"]["binary_data_size"] == 0


@point(BINARY, "FP16 in and out")
def _(subject: Subject) -> None:
    _halves(subject, "probe_fp16")


@point(BINARY, "BF16 in and out")
def _(subject: Subject) -> None:
    _halves(subject, "probe_bf16")


def _halves(subject: Subject, name: str) -> None:
    model = subject.named(name)
    document, blobs = model.binary(2, parameters={"binary_data_output": True})
    (output,) = subject.infer(model, document, *blobs)["outputs"]
    assert output["data"] == from_bytes(model.inputs[0].datatype, blobs[0])


@point(BINARY, "every datatype, raw both ways, unchanged")
def _(subject: Subject) -> None:
    model = subject.named("probe_types")
    document, blobs = model.binary(2, parameters={"binary_data_output": True})
    sent = {t["name"].removeprefix("in_"): blob for t, blob in zip(document["inputs"], blobs, strict=True)}
    for output in subject.infer(model, document, *blobs)["outputs"]:
        raw = to_bytes(output["datatype"], np.array(output["data"], object if output["datatype"] == "BYTES" else None))
        due = from_bytes(output["datatype"], sent[output["name"].removeprefix("out_")])
        assert output["data"] == due, f"{output['name']} differs: {raw[:16]!r}"


_LIES: dict[str, Any] = {
    "a byte short": lambda d, b: (d, [b[0][:-1], *b[1:]]),
    "a byte left over": lambda d, b: (d, [*b, b"x"]),
    "size 0 where there should be bytes": lambda d, b: (_sized(d, 0), b[1:]),
    "size smaller than the shape takes": lambda d, b: (_sized(d, len(b[0]) - 1), [b[0][:-1], *b[1:]]),
    "size negative": lambda d, b: (_sized(d, -1), b),
    "size huge": lambda d, b: (_sized(d, 2**62), b),
    "size a string": lambda d, b: (_sized(d, "4"), b),
    "data and a size": lambda d, b: ({**d, "inputs": [{**d["inputs"][0], "data": [1.0]}, *d["inputs"][1:]]}, b),
}


def _sized(document: dict[str, Any], size: Any) -> dict[str, Any]:
    first, *others = document["inputs"]
    return {**document, "inputs": [{**first, "parameters": {"binary_data_size": size}}, *others]}


def _lie(name: str) -> None:
    @point(BINARY, f"{name}: 400")
    def _(subject: Subject) -> str | None:
        model = subject.model(numbers=True)
        document, blobs = _LIES[name](*model.binary())
        head = json.dumps(document).encode()
        answer = subject.client.post(model.path, content=b"".join((head, *blobs)), headers={LENGTH: str(len(head))})
        return bad(answer)


for _name in _LIES:
    _lie(_name)


@point(BINARY, "a header that is longer than the body, negative, or no number: 400")
def _(subject: Subject) -> None:
    model = subject.model(numbers=True)
    document, blobs = model.binary()
    for length in ("100000", "-1", "1e3", "x", "99999999999999999999999"):
        answer = subject.post(model.path, document, *blobs, **{LENGTH: length})
        bad(answer, f"{length}: ")


@point(BINARY, "string lengths that lie: 400")
def _(subject: Subject) -> None:
    model = subject.model(datatype="BYTES")
    where = next(i for i, t in enumerate(model.inputs) if t.datatype == "BYTES")
    for blob in (b"\3\0\0\0ab", b"\2\0\0\0ab\0", b"\1\0\0\0a\1\0\0\0b", b"\xff\xff\xff\xffab"):
        document, blobs = model.binary()
        document["inputs"][where]["parameters"]["binary_data_size"] = len(blob)
        blobs[where] = blob
        answer = subject.post(model.path, document, *blobs)
        bad(answer, f"{blob!r}: ")


def _coded(body: bytes, coding: str) -> bytes:
    return gzip.compress(body) if coding == "gzip" else zlib.compress(body)


def _in(coding: str) -> None:
    @point(CODING, f"{coding} in, JSON")
    def _json(subject: Subject) -> None:
        model = subject.model()
        body = _coded(json.dumps(model.json()).encode(), coding)
        answer = subject.post(model.path, body, **{"content-encoding": coding})
        same(read(answer), subject.infer(model, model.json()))

    @point(CODING, f"{coding} in, raw: the header counts uncompressed bytes")
    def _raw(subject: Subject) -> None:
        model = subject.model(numbers=True)
        document, blobs = model.binary()
        head = json.dumps(document).encode()
        body = _coded(b"".join((head, *blobs)), coding)
        answer = subject.post(model.path, body, **{"content-encoding": coding, LENGTH: str(len(head))})
        same(read(answer), subject.infer(model, model.json()))

    @point(CODING, f"{coding} out, for who accepts it, of a large answer")
    def _out(subject: Subject) -> None:
        model = subject.model(numbers=True, batched=True)
        document, blobs = model.binary(2000, parameters={"binary_data_output": True})
        answer = subject.post(model.path, document, *blobs, **{"accept-encoding": coding})
        assert answer.headers.get("content-encoding") == coding, (
            f"its coding is {answer.headers.get('content-encoding')}"
        )
        same(read(answer), subject.infer(model, document, *blobs, **{"accept-encoding": "identity"}))

    @point(CODING, f"{coding} that is broken: 400")
    def _broken(subject: Subject) -> None:
        model = subject.model()
        whole = _coded(json.dumps(model.json()).encode(), coding)
        for body in (b"{}", whole[:-6]):
            answer = subject.post(model.path, body, **{"content-encoding": coding})
            bad(answer)


for _coding in ("gzip", "deflate"):
    _in(_coding)


@point(CODING, "no coding, for who accepts none")
def _(subject: Subject) -> None:
    model = subject.model(batched=True)
    answer = subject.post(model.path, model.json(2000), **{"accept-encoding": "identity"})
    assert answer.headers.get("content-encoding", "identity") == "identity"


@point(CODING, "an unknown coding is 415")
def _(subject: Subject) -> None:
    answer = subject.post(subject.model().path, subject.model().json(), **{"content-encoding": "zstd"})
    assert answer.status_code == 415, f"{answer.status_code}: {answer.text[:100]}"
