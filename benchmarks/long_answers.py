"""Strings of many megabytes in requests, and answers of many megabytes in all forms; models of long_models."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np

from benchmarks.bodies import WIDTH
from benchmarks.long_requests import Long
from serving.tensors import NUMPY

_LENGTH = "inference-header-content-length"
_JSON_MB = 15


def long_answers() -> list[Long]:
    """Make one of each form; what is said of megabytes are those of the answer, but for strings that are only read."""
    return [*_strings(), *_v2(), *_v1(), *_calls()]


def _texts(count: int) -> list[bytes]:
    """Make strings of 1 to 20 bytes."""
    sizes = np.random.default_rng(2).integers(1, 21, count)
    return [b"%0*d" % (size, i % 10 ** min(size, 9)) for i, size in enumerate(sizes.tolist())]


def _packed(texts: list[bytes]) -> bytes:
    return b"".join([struct.pack("<I", len(text)) + text for text in texts])


def _tensor(datatype: str, shape: tuple[int, int], raw: bytes | None = None) -> dict[str, Any]:
    tensor: dict[str, Any] = {"name": "asked", "datatype": datatype, "shape": list(shape)}
    if raw is not None:
        tensor["parameters"] = {"binary_data_size": len(raw)}
    return tensor


def _binary(what: str, model: str, datatype: str, shape: tuple[int, int], raw: bytes, **outputs: Any) -> Long:
    """Make a v2 request with a raw tensor."""
    head = json.dumps({"inputs": [_tensor(datatype, shape, raw)], **outputs}).encode()
    return Long(what, f"/v2/models/{model}/infer", head + raw, {_LENGTH: str(len(head))})


def _strings() -> list[Long]:
    """Make the forms of 16 MB of strings over HTTP: read, and answered."""
    shape = (1090, WIDTH)
    raw = _packed(_texts(shape[0] * WIDTH))
    long_texts = _packed([b"%08000d" % i for i in range(2000)])
    size = f"{len(raw) / 1e6:.0f} MB"
    as_bytes = {"parameters": {"binary_data_output": True}}
    return [
        _binary(f"v2 binary strings, {size}", "words", "BYTES", shape, raw),
        _binary(f"v2 binary strings, {size}, answered in JSON", "same_bytes", "BYTES", shape, raw),
        _binary(f"v2 binary strings, {size}, answered in as much", "same_bytes", "BYTES", shape, raw, **as_bytes),
        _binary("v2 binary strings of 8,000, 16 MB, answered in JSON", "same_text", "BYTES", (2000, 1), long_texts),
        _binary(
            "v2 binary strings of 8,000, answered in as much", "same_text", "BYTES", (2000, 1), long_texts, **as_bytes
        ),
    ]


def _values(datatype: str, count: int) -> Any:
    random = np.random.default_rng(3)
    if datatype == "BOOL":
        return random.random(count) < 0.5
    if NUMPY[datatype].kind in "iu":
        return random.integers(0, 1 << 30, count).astype(NUMPY[datatype])
    return random.random(count).astype(NUMPY[datatype])


def _v2() -> list[Long]:
    """Make the forms whose answers are numbers in JSON, classes, and several outputs."""
    made = []
    for datatype, width in (("INT64", 11), ("BOOL", 5.5), ("FP16", 8), ("BF16", 10), ("FP64", 19)):
        rows = min(int(_JSON_MB * 1e6 / width) // WIDTH, 16_000_000 // WIDTH // NUMPY[datatype].itemsize)
        raw = _values(datatype, rows * WIDTH).tobytes()
        made.append(
            _binary(f"v2 {datatype}, answered in JSON", f"same_{datatype.lower()}", datatype, (rows, WIDTH), raw)
        )
    raw = _values("FP32", 3900 * WIDTH).tobytes()
    for classes in (1, 300):
        asked = {"outputs": [{"name": "answered", "parameters": {"classification": classes}}]}
        made.append(_binary(f"v2, {classes} classes of 3,900 rows", "same_fp32", "FP32", (3900, WIDTH), raw, **asked))
    few = _values("FP32", 600)
    made.append(_binary("v2, three outputs in JSON", "several", "FP32", (600, 1), few.tobytes()))
    asked = {"inputs": [{**_tensor("BYTES", (1000, 1)), "data": ["some text"] * 1000}]}
    made.append(
        Long("v2, short strings grown to 12 MB of JSON", "/v2/models/more_bytes/infer", json.dumps(asked).encode(), {})
    )
    return made


def _v1() -> list[Long]:
    """Make the forms of V1 answers: short requests, answers of many megabytes."""
    made = []

    def ask(what: str, model: str, values: Any) -> None:
        for form, body in (("rows", {"instances": values}), ("columns", {"inputs": {"asked": values}})):
            made.append(Long(f"V1 {form}, {what}", f"/v1/models/{model}:predict", json.dumps(body).encode(), {}))

    random = np.random.default_rng(4)
    ask("floats", "more_fp32", random.random(1400).round(7).tolist())
    ask("whole numbers", "more_int64", random.integers(1, 1 << 30, 1400).tolist())
    ask("true and false", "more_bool", (random.random(2700) < 0.5).tolist())
    ask("strings", "more_bytes", ["some text"] * 1200)
    ask("several outputs", "several", random.random(600).tolist())
    ask("1,024 classes by name", "classes", random.random(700).tolist())
    ask("3 classes by name", "few_classes", random.random(4000).tolist())
    return made


def _calls() -> list[Long]:
    """Make the forms over gRPC."""
    from serving.grpc_api.messages import message  # noqa: PLC0415  needed here alone
    from serving.grpc_api.tensors import CONTENTS  # noqa: PLC0415

    def made(what: str, model: str, datatype: str, shape: tuple[int, int], **given: Any) -> Long:
        tensor: dict[str, Any] = _tensor(datatype, shape)
        if "typed" in given:
            tensor["contents"] = {CONTENTS[datatype]: given.pop("typed")}
        request = message("ModelInferRequest")(model_name=model, inputs=[tensor], **given).SerializeToString()
        return Long(f"gRPC {what}, {len(request) / 1e6:.0f} MB", "", request, {})

    shape = (1090, WIDTH)
    texts = _texts(shape[0] * WIDTH)
    raw = [_packed(texts)]
    forms = [
        made("raw strings", "words", "BYTES", shape, raw_input_contents=raw),
        made("typed strings", "words", "BYTES", shape, typed=texts),
        made("raw strings, answered in as much", "same_bytes", "BYTES", shape, raw_input_contents=raw),
        made("typed strings, answered in as much", "same_bytes", "BYTES", shape, typed=texts),
    ]
    long_texts = [b"%08000d" % i for i in range(2000)]
    forms.append(made("typed strings of 8,000, answered", "same_text", "BYTES", (2000, 1), typed=long_texts))
    for datatype, rows in (("INT64", 3000), ("INT32", 3000), ("UINT64", 3000), ("BOOL", 15000), ("FP64", 1950)):
        values = _values(datatype, min(rows, 4096) * WIDTH)
        shape = (min(rows, 4096), WIDTH)
        forms.append(
            made(f"typed {datatype}, answered in as much", f"same_{datatype.lower()}", datatype, shape, typed=values)
        )
    floats = [_values("FP32", 3900 * WIDTH).tobytes()]
    for classes in (1, 300):
        outputs = [{"name": "answered", "parameters": {"classification": {"int64_param": classes}}}]
        forms.append(
            made(
                f"{classes} classes of 3,900 rows",
                "same_fp32",
                "FP32",
                (3900, WIDTH),
                raw_input_contents=floats,
                outputs=outputs,
            )
        )
    outputs = [{"name": "answered", "parameters": {"classification": {"int64_param": 1}}}]
    forms.append(
        made(
            "1 class of 250 rows, raw",
            "same_fp32",
            "FP32",
            (250, WIDTH),
            raw_input_contents=[floats[0][: 250 * WIDTH * 4]],
            outputs=outputs,
        )
    )
    return forms
