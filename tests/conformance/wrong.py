"""REST: whatever is wrong with a request is its sender's to mend: 400 (or 422, as some have it), never 500."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

from tests.conformance.point import point
from tests.conformance.subject import Subject, bad

WRONG = "REST: wrong requests"


def _first(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    def change(document: dict[str, Any]) -> dict[str, Any]:
        document["inputs"][0].update(changes)
        return document

    return change


def _without(name: str) -> Callable[[dict[str, Any]], Any]:
    def change(document: dict[str, Any]) -> dict[str, Any]:
        del document["inputs"][0][name]
        return document

    return change


def _cells(value: Any) -> Callable[[dict[str, Any]], Any]:
    def change(document: dict[str, Any]) -> dict[str, Any]:
        document["inputs"][0]["data"] = [value] * len(document["inputs"][0]["data"])
        return document

    return change


def _short(document: dict[str, Any]) -> Any:
    document["inputs"][0]["data"] = document["inputs"][0]["data"][:-1]
    return document


def _long(document: dict[str, Any]) -> Any:
    document["inputs"][0]["data"].append(0)
    return document


def _ragged(document: dict[str, Any]) -> Any:
    data = document["inputs"][0]["data"]
    document["inputs"][0]["data"] = [data, data[:-1]]
    document["inputs"][0]["shape"][0] = 2
    return document


def _twice(document: dict[str, Any]) -> Any:
    document["inputs"].append(copy.deepcopy(document["inputs"][0]))
    return document


def _outputs(*names: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda document: {**document, "outputs": [{"name": name} for name in names]}


# Each takes a right request of a model with numbers, and returns a wrong one: JSON, or the bytes themselves.
CASES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "an empty body": lambda d: b"",
    "no JSON": lambda d: b"{",
    "JSON with something behind it": lambda d: json.dumps(d).encode() + b"]",
    "bytes that are no UTF-8": lambda d: b'{"inputs": "\xff"}',
    "an array": lambda d: [d],
    "a string": lambda d: "inputs",
    "null": lambda d: b"null",
    "a hundred thousand brackets": lambda d: b"[" * 100_000,
    "no inputs": lambda d: {},
    "inputs empty": lambda d: {"inputs": []},
    "inputs no array": lambda d: {"inputs": d["inputs"][0]},
    "inputs null": lambda d: {"inputs": None},
    "an input that is a number": lambda d: {"inputs": [1]},
    "an input without a name": _without("name"),
    "an input without a shape": _without("shape"),
    "an input without a datatype": _without("datatype"),
    "an input without data": _without("data"),
    "an unknown input": _first(name="no-such-input"),
    "a name that is a number": _first(name=1),
    "the same input twice": _twice,
    "an unknown datatype": _first(datatype="FP12"),
    "another datatype than the model's": _first(datatype="INT8", data=[]),
    "a shape that is no array": _first(shape="1"),
    "a negative dimension": _first(shape=[-1, -1]),
    "a huge dimension": _first(shape=[2**62, 4]),
    "a dimension over 64 bits": _first(shape=[2**70, 4]),
    "a product that overflows": _first(shape=[2**32, 2**32]),
    "65 dimensions": _first(shape=[1] * 65),
    "a dimension that is a float": _first(shape=[1.5, 4]),
    "a dimension that is a string": _first(shape=["1", "4"]),
    "an element too few": _short,
    "an element too many": _long,
    "ragged rows": _ragged,
    "data that is a number": _first(data=1),
    "data that is null": _first(data=None),
    "numbers as strings": _cells("1.0"),
    "null for a number": _cells(None),
    "an object for a number": _cells({}),
    "NaN, which is no JSON": lambda d: json.dumps(_cells(float("nan"))(d)).encode(),
    "a number beyond its type": lambda d: json.dumps(_cells(7)(d)).replace(" 7", " 1e999").encode(),
    "outputs no array": lambda d: {**d, "outputs": 1},
    "an unknown output": _outputs("no-such-output"),
    "an output without a name": lambda d: {**d, "outputs": [{}]},
    "parameters no object": lambda d: {**d, "parameters": [1]},
    "id that is a number": lambda d: {**d, "id": 7},
    "a timeout that is a string": lambda d: {**d, "parameters": {"timeout": "soon"}},
    "a classification that is a string": lambda d: {
        **d,
        "outputs": [{"name": "?", "parameters": {"classification": "all"}}],
    },
    "a shared memory region": lambda d: {
        "inputs": [
            {k: v for k, v in d["inputs"][0].items() if k != "data"}
            | {"parameters": {"shared_memory_region": "mine", "shared_memory_byte_size": 16}}
        ]
    },
}


def _case(name: str) -> None:
    @point(WRONG, f"{name}: 400")
    def _(subject: Subject) -> str | None:
        model = subject.model(numbers=True)
        document = CASES[name](model.json())
        if isinstance(document, dict):
            for output in document["outputs"] if isinstance(document.get("outputs"), list) else ():
                if output.get("name") == "?":
                    output["name"] = model.outputs[-1].name
        answer = subject.post(model.path, document if isinstance(document, bytes) else json.dumps(document).encode())
        return bad(answer)


for _name in CASES:
    _case(_name)


@point(WRONG, "the same output twice: 400")
def _(subject: Subject) -> str | None:
    model = subject.model(numbers=True)
    name = model.outputs[0].name
    answer = subject.post(model.path, model.json(outputs=[{"name": name}, {"name": name}]))
    return bad(answer)


@point(WRONG, "an input that is missing: 400")
def _(subject: Subject) -> str | None:
    model = subject.model(inputs=2)
    document = model.json()
    document["inputs"].pop()
    answer = subject.post(model.path, document)
    return bad(answer)


@point(WRONG, "an integer that overflows its type is refused, not wrapped: 400")
def _(subject: Subject) -> None:
    model = subject.named("probe_types")
    for datatype in ("INT8", "UINT8", "INT32", "INT64", "UINT64"):
        for value in (-(2**63) - 1, 2**64, 300 if datatype.endswith("8") else 2**70):
            document = model.json()
            tensor = next(t for t in document["inputs"] if t["datatype"] == datatype)
            tensor["data"] = [value, 0]
            answer = subject.post(model.path, document)
            bad(answer, f"{value} as {datatype}: ")


@point(WRONG, "a fraction for an integer, a number for a BOOL, a number for BYTES: 400")
def _(subject: Subject) -> None:
    model = subject.named("probe_types")
    for datatype, value in (("INT32", 1.5), ("INT64", True), ("BOOL", 1), ("BOOL", 2), ("BYTES", 1), ("FP32", True)):
        document = model.json()
        tensor = next(t for t in document["inputs"] if t["datatype"] == datatype)
        tensor["data"] = [value, value]
        answer = subject.post(model.path, document)
        bad(answer, f"{value} as {datatype}: ")


@point(WRONG, "FP16 as JSON, which the protocol has not: 400")
def _(subject: Subject) -> str | None:
    model = subject.named("probe_fp16")
    answer = subject.post(model.path, model.json())
    return bad(answer)


@point(WRONG, "a body over the limit: 413, or it is answered")
def _(subject: Subject) -> None:
    model = subject.model(numbers=True)
    answer = subject.post(model.path, b" " * (20 << 20) + json.dumps(model.json()).encode())
    assert answer.status_code in (200, 413), f"{answer.status_code}: {answer.text[:120]}"


@point(WRONG, "GET where a POST is due: 405")
def _(subject: Subject) -> None:
    answer = subject.client.get(subject.model().path)
    assert answer.status_code == 405, f"{answer.status_code}: {answer.text[:120]}"


@point(WRONG, "the server answers as before")
def _(subject: Subject) -> None:
    for model in subject.models:
        if not {"FP16", "BF16"}.intersection(t.datatype for t in model.inputs):
            subject.infer(model, model.json())
