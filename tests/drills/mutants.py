"""Valid requests, broken: each is made from a random source of its own, so that its number makes it again."""

from __future__ import annotations

import copy
import gzip
import json
import zlib
from random import Random
from typing import Any, NamedTuple

import numpy as np

from tests.drills.differential import as_json, grpc_forms, raw
from tests.drills.direct import DTYPES, Direct
from tests.drills.wire import LENGTH, post

ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 1.5, -0.0, 1e308, 2**31, 2**32, 2**63, 2**64, 2**70, -(2**63), 10**399, 10**401),
    *("", "1", "\0", "\ud800", "x" * 300, "NaN", "../../etc/passwd", "%00", "<script>"),
    *([], {}, [[]], [{}], [1] * 65, [2**62] * 3, [0, 0], [-1, 4], {"a": 1}, list(DTYPES)),
]
TOKENS = [b"NaN", b"Infinity", b"1e999", b"-", b"nul", b"[", b"]", b"{", b"}", b'"', b",", b":", b"\0", b"\xff", b"//"]
CODINGS = ["br", "zstd", "gzip, gzip", "GZIP", "gzip;q=1", "", "x", "identity", "chunked"]
LENGTHS = ["", "-1", "+5", "0x10", "1e2", "1.0", "9" * 12, "9" * 40, " ", "\u00b2", "5 5", "0"]


class Mutant(NamedTuple):
    """A request over HTTP. `sent` is what its Content-Length says: None, the truth."""

    kind: str
    model: Direct
    headers: dict[str, str]
    body: bytes
    sent: str | None = None

    @property
    def wire(self) -> bytes:
        """The bytes that go over the wire."""
        return post(f"/v2/models/{self.model.name}/infer", self.body, length=self.sent, **self.headers)


class Valid(NamedTuple):
    """What a mutant over HTTP is made of, and what is to be done to it."""

    kind: str
    random: Random
    model: Direct
    headers: dict[str, str]
    document: dict[str, Any]
    blob: bytes


def tensors(model: Direct, random: Random) -> dict[str, Any]:
    """Make valid feeds."""
    rows, feeds = random.randint(1, min(3, model.most_rows)), {}
    for port in model.inputs:
        shape = [random.randint(1, 3) if d == -1 else d for d in port.shape]
        if model.batched:
            shape[0] = rows
        if port.datatype == "BYTES":
            array = np.empty(shape, object)
            array[...] = random.choice(["male", "sort an array", "", "\u00e9\u4e2d"])
        else:
            array = np.random.default_rng(random.getrandbits(32)).integers(0, 2, shape).astype(DTYPES[port.datatype])
        feeds[port.name] = array
    return feeds


def over_http(models: list[Direct], number: int) -> Mutant:
    """Make mutant `number`."""
    random = Random(number)
    model = random.choice(models)
    feeds = tensors(model, random)
    document: dict[str, Any] = {"id": "7", "inputs": [], "outputs": [{"name": p.name} for p in model.outputs]}
    if random.random() < 0.5:
        del document["outputs"]
    if random.random() < 0.5:
        document["parameters"] = {"binary_data_output": random.random() < 0.5}
    blobs = []
    for port in model.inputs:
        tensor = as_json(port, feeds[port.name], random.random() < 0.3)
        if port.datatype == "FP16" or random.random() < 0.5:
            blobs.append(raw(feeds[port.name]))
            del tensor["data"]
            tensor["parameters"] = {"binary_data_size": len(blobs[-1])}
        document["inputs"].append(tensor)
    headers = {"origin": "http://a"} if random.random() < 0.5 else {}  # which the fast path leaves to ASGI
    blob = b"".join(blobs)
    kind = random.choice(list(HTTP))
    return HTTP[kind](Valid(kind, random, model, headers, document, blob))


def _written(document: Any, random: Random) -> bytes:
    text = json.dumps(document)
    if random.random() < 0.2 and isinstance(document, dict) and document:
        key = random.choice(list(document))  # once more, with the same value: two parsers could differ
        text = text[:-1] + f', "{key}": {json.dumps(document[key])}}}'
    return text.encode()


def _whole(kind: str, model: Direct, headers: dict[str, str], head: bytes, blob: bytes) -> Mutant:
    if blob or LENGTH in headers:
        headers = {LENGTH: str(len(head)), **headers}
    return Mutant(kind, model, headers, head + blob)


def _nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in items for found in _nodes(item, (*path, key)))]


def _tampered(valid: Valid) -> Mutant:
    """Put something odd, or nothing, or the same twice, in a random place of the document."""
    kind, random, model, headers, document, blob = valid
    document = copy.deepcopy(document)
    for _ in range(random.choice([1, 1, 2])):
        path = random.choice([p for p in _nodes(document) if p] or [()])
        if not path:
            break
        owner = document
        for key in path[:-1]:
            owner = owner[key]
        match random.choice(["odd", "odd", "gone", "twice", "deep", "datatype"]):
            case "odd":
                owner[path[-1]] = copy.deepcopy(random.choice(ODD))
            case "gone":
                del owner[path[-1]]
            case "twice" if isinstance(owner, list):
                owner.insert(path[-1], copy.deepcopy(owner[path[-1]]))
            case "deep":
                for _ in range(random.choice([1, 2, 64])):
                    owner[path[-1]] = [owner[path[-1]]]
            case _:
                inputs = document.get("inputs")
                if isinstance(inputs, list) and inputs and isinstance(inputs[0], dict):
                    inputs[0]["datatype"] = random.choice(list(DTYPES))
    return _whole(kind, model, headers, _written(document, random), blob)


def _flipped(data: bytes, random: Random) -> bytes:
    made = bytearray(data)
    for _ in range(random.randint(1, 3)):
        if made:
            made[random.randrange(len(made))] ^= 1 << random.randrange(8)
    return bytes(made)


def _head_bits(valid: Valid) -> Mutant:
    kind, random, model, headers, document, blob = valid
    return _whole(kind, model, headers, _flipped(json.dumps(document).encode(), random), blob)


def _blob_bits(valid: Valid) -> Mutant:
    kind, random, model, headers, document, blob = valid
    return _whole(kind, model, headers, json.dumps(document).encode(), _flipped(blob, random))


def _token(valid: Valid) -> Mutant:
    kind, random, model, headers, document, blob = valid
    head = json.dumps(document).encode()
    start = random.randrange(len(head))
    end = start + random.randrange(4)
    return _whole(kind, model, headers, head[:start] + random.choice(TOKENS) + head[end:], blob)


def _sized(valid: Valid) -> Mutant:
    """Cut, double or lengthen the document, the blobs or all of it."""
    kind, random, model, headers, document, blob = valid
    head = json.dumps(document).encode()
    cut = random.randrange(max(1, len(blob)))
    head, blob = random.choice(
        [
            (head[: random.randrange(len(head))], blob),
            (head + head, blob),
            (head, blob[:cut]),
            (head, blob + blob),
            (head, blob + bytes(random.randint(1, 9))),
            (head + b" " * 9, blob),
            (head + b"\0", blob),
            (b"[" * random.choice([100, 1000, 100_000]) + head, blob),
            (b"", blob),
        ]
    )
    return _whole(kind, model, headers, head, blob)


def _length(valid: Valid) -> Mutant:
    """Lie about how much of the body is JSON."""
    kind, random, model, headers, document, blob = valid
    head = json.dumps(document).encode()
    near = [str(len(head) + d) for d in (-1, 1, len(blob), len(blob) + 1, 0)]
    return Mutant(kind, model, {**headers, LENGTH: random.choice([*LENGTHS, *near])}, head + blob)


def _coding(valid: Valid) -> Mutant:
    """Lie about the body's coding, or break it."""
    kind, random, model, headers, document, blob = valid
    head = json.dumps(document).encode()
    headers = {**headers, LENGTH: str(len(head))} if blob else headers
    squeezed = gzip.compress(head + blob, 1, mtime=0)
    coding, body = random.choice(
        [
            (random.choice(CODINGS), head + blob),
            ("gzip", head + blob),
            ("gzip", squeezed),
            ("deflate", squeezed),
            ("deflate", zlib.compress(head + blob)),
            ("gzip", zlib.compress(head + blob)),
            ("gzip", squeezed[: random.randrange(len(squeezed))]),
            ("gzip", _flipped(squeezed, random)),
            ("gzip", squeezed + squeezed),
            ("gzip", squeezed + b"x"),
            ("gzip", gzip.compress(squeezed)),
        ]
    )
    return Mutant(kind, model, {**headers, "content-encoding": coding}, body)


def _announced(valid: Valid) -> Mutant:
    """Lie about the body's length."""
    kind, random, model, headers, document, blob = valid
    whole = _whole(kind, model, headers, json.dumps(document).encode(), blob)
    size = len(whole.body)
    lie = random.choice(
        [size + 1, size + 5000, random.randrange(size), 2**40, 2**64, -1, "x", "1e2", "+3", f"{size}, {size}"]
    )
    return whole._replace(sent=str(lie))


HTTP = {
    "document": _tampered,
    "bits of the JSON": _head_bits,
    "bits of the blobs": _blob_bits,
    "tokens": _token,
    "sizes": _sized,
    "length of the JSON": _length,
    "coding": _coding,
    "Content-Length": _announced,
}


def over_grpc(models: list[Direct], number: int) -> tuple[str, bytes]:
    """Make mutant `number` as the bytes of a ModelInferRequest, and say what was done to it."""
    random = Random(number)
    model = random.choice(models)
    _, request = random.choice(list(grpc_forms(model, tensors(model, random))))
    kind = random.choice(["wire", "cut", "shape", "datatype", "name", "raw", "contents", "twice", "fewer", "outputs"])
    tensor = random.choice(request.inputs)
    match kind:
        case "wire":
            return kind, _flipped(request.SerializeToString(), random)
        case "cut":
            whole = request.SerializeToString()
            return kind, random.choice(
                [whole[: random.randrange(len(whole))], whole + whole, whole + b"\xff\xff", b"\x07"]
            )
        case "shape":
            odd = [[], [-1], [0], [1] * 65, [2**62, 4], [2**63 - 1] * 2, [-(2**63)], [*tensor.shape, 1]]
            odd += [[*tensor.shape[:-1], last] for last in (0, -1, 2, 2**40)]
            shape = random.choice(odd)
            del tensor.shape[:]
            tensor.shape.extend(shape)
        case "datatype":
            tensor.datatype = random.choice([*DTYPES, "", "FP8", "fp32", "x" * 1000])
        case "name":
            target, field = random.choice([(tensor, "name"), (request, "model_name"), (request, "model_version")])
            setattr(target, field, random.choice(["", "x", "\0", "../iris", "x" * 10_000, request.inputs[0].name]))
        case "raw":
            raws = list(request.raw_input_contents) or [b"\0"]
            at = random.randrange(len(raws))
            raws[at] = random.choice([b"", raws[at] * 2, raws[at][:-1], raws[at] + b"\0", _flipped(raws[at], random)])
            del request.raw_input_contents[:]
            request.raw_input_contents.extend(raws)
        case "contents":
            field = random.choice(tensor.contents.DESCRIPTOR.fields).name
            odd = b"\xff" if field.startswith("bytes") else random.choice([0, 1]) if field.startswith("bool") else 300
            getattr(tensor.contents, field).append(odd)
        case "twice":
            request.inputs.append(tensor)
        case "fewer":
            request.inputs.pop()
        case "outputs":
            names = random.choices([p.name for p in model.outputs] + ["x"], k=random.randint(1, 3))
            request.outputs.extend(type(request).InferRequestedOutputTensor(name=name) for name in names)
    return kind, request.SerializeToString()
