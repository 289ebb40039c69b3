"""Long requests that are not one matrix of floats, and long requests that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bodies import WIDTH
from benchmarks.long_requests import Long


def tensor(name: str, datatype: str, data: Any, shape: tuple[int, ...] = (1400, WIDTH), **more: Any) -> dict[str, Any]:
    """Make an input of a v2 request."""
    return {"name": name, "datatype": datatype, "shape": list(shape), "data": data, **more}


def long_documents() -> list[Long]:
    """Make a request of each form whose tensors are not one matrix of floats, or whose rows are not of numbers."""
    generator = np.random.default_rng(2)
    whole = generator.integers(-(10**9), 10**9, (1400, WIDTH))
    floats = generator.random((1400, WIDTH // 2)).round(7)
    flags = generator.random((2400, WIDTH)) < 0.5
    texts = [f'text {i} of "some" length, and so on: é {"x" * (i % 60)}' for i in range(1400 * 100)]
    words = [f"w{i}" for i in range(1400 * WIDTH)]
    row = load_row("penguins")
    forms: list[tuple[str, str, Any]] = [
        ("v2 JSON, INT64", "v2/models/integers", {"inputs": [tensor("numbers", "INT64", whole.ravel().tolist())]}),
        ("v2 JSON, INT64 nested", "v2/models/integers", {"inputs": [tensor("numbers", "INT64", whole.tolist())]}),
        ("v2 JSON, FP64 nested", "v2/models/doubles", {"inputs": [tensor("numbers", "FP64", whole.tolist())]}),
        (
            "v2 JSON, BOOL",
            "v2/models/flags",
            {"inputs": [tensor("flags", "BOOL", flags.ravel().tolist(), flags.shape)]},
        ),
        ("v2 JSON, BOOL nested", "v2/models/flags", {"inputs": [tensor("flags", "BOOL", flags.tolist(), flags.shape)]}),
        ("v2 JSON, BYTES", "v2/models/texts", {"inputs": [tensor("words", "BYTES", texts, (1400, 100))]}),
        ("v2 JSON, short BYTES", "v2/models/texts", {"inputs": [tensor("words", "BYTES", words)]}),
        (
            "v2 JSON, two inputs and more",
            "v2/models/pair",
            {
                "id": "one",
                "outputs": [{"name": "first_ids"}],
                "inputs": [
                    tensor("ids", "INT64", whole[:, : WIDTH // 2].ravel().tolist(), floats.shape, parameters={}),
                    tensor("numbers", "FP32", floats.ravel().tolist(), floats.shape),
                ],
            },
        ),
        ("V1 rows with strings", "v1/models/penguins", {"instances": [row] * 4000}),
        ("V1 rows with strings, by position", "v1/models/penguins", {"instances": [list(row.values())] * 4000}),
        ("V1 texts", "v1/models/docs_topic", {"instances": [f'an "array" of words {i} ' * 100 for i in range(4000)]}),
        ("V1, one long text", "v1/models/docs_topic", {"instances": ["an array " * 1_600_000]}),
    ]
    return [long_form(*form) for form in forms]


def wrong_documents() -> list[Long]:
    """Make long requests that are refused, each for another fault, most of them at the end."""
    rows = np.random.default_rng(3).random((1400, WIDTH)).round(7)
    cells, names = rows.ravel().tolist(), list(load_row("penguins"))
    right = json.dumps({"inputs": [tensor("features", "FP32", cells)]}).encode()
    integers = {"inputs": [tensor("numbers", "INT64", [*range(1400 * WIDTH - 1), 0.5])]}
    row = load_row("penguins")
    many = [row] * 100_000
    forms: list[tuple[str, str, Any, int]] = [
        ("no JSON at its end", "v2/models/wide", right[:-3] + b"x" + right[-3:], 400),
        ("NaN at its end", "v2/models/wide", right[:-4] + b", NaN" + right[-4:], 400),
        ("no UTF-8 at its end", "v2/models/wide", right[:-4] + b"\xff" + right[-4:], 400),
        (
            "a cell wrong at its end",
            "v2/models/wide",
            {"inputs": [tensor("features", "FP32", [*cells[:-1], "1"])]},
            400,
        ),
        ("a cell of INT64 wrong at its end", "v2/models/integers", integers, 400),
        ("a wrong count", "v2/models/wide", {"inputs": [tensor("features", "FP32", cells[:-1])]}, 400),
        ("a wrong datatype", "v2/models/wide", {"inputs": [tensor("features", "INT64", cells)]}, 400),
        ("a key twice at its end", "v2/models/wide", right[:-1] + b', "id": "1", "id": "1"}', 400),
        ("ragged", "v2/models/wide", {"inputs": [tensor("features", "FP32", [*rows[:-1].tolist(), [1]])]}, 400),
        ("a row of strings wrong at its end", "v1/models/penguins", {"instances": [*many, {**row, names[0]: 1}]}, 422),
        ("each row wrong", "v1/models/penguins", {"instances": [{**row, names[0]: 1}] * 100_000}, 422),
        ("each text wrong", "v1/models/docs_topic", {"instances": [1] * 3_000_000}, 422),
        (
            "a key of a row twice at the end",
            "v1/models/penguins",
            json.dumps({"instances": many}).encode()[:-3] + b', "sex": "x", "sex": "x"}]}',
            400,
        ),
        ("columns of strings for numbers", "v1/models/iris", {"inputs": {"petal_width": ["x"] * 3_000_000}}, 422),
        ("opening brackets", "v1/models/iris", b'{"instances": ' + b"[" * 15_000_000, 400),
        ("one string", "v1/models/iris", b'"' + b"x" * 15_000_000 + b'"', 400),
        ("one string without an end", "v1/models/iris", b'{"instances": ["' + b"x" * 15_000_000, 400),
        ("one number", "v1/models/iris", b'{"instances": [[' + b"1" * 15_000_000 + b"]]}", 400),
        ("a million keys", "v1/models/iris", {"instances": [{str(i): i for i in range(800_000)}]}, 400),
        ("a million members", "v1/models/iris", {str(i): i for i in range(800_000)}, 400),
        ("empty arrays", "v1/models/iris", b'{"instances": [' + b"[]," * 5_000_000 + b"[]]}", 422),
        ("spaces", "v1/models/iris", b" " * 15_000_000, 400),
    ]
    return [long_form(f"wrong: {what}", path, body, status) for what, path, body, status in forms]


def load_row(model: str) -> dict[str, Any]:
    """Return the example of a model that ships."""
    from serving.engine.session import OnnxSession  # noqa: PLC0415  needed here alone

    example = OnnxSession(Path("models") / model / "1" / "model.onnx", warm_rows=1).signature.example
    return dict(example or {})


def long_form(what: str, model: str, body: Any, status: int = 200) -> Long:
    """Make a request of a document."""
    whole = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()
    path = f"/{model}{':predict' if model.startswith('v1') else '/infer'}"
    return Long(f"{what}, {len(whole) / 1e6:.1f} MB", path, whole, {}, status)
