"""Requests of many megabytes, one of each form, and requests whose answers have as many."""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.datasets import load_breast_cancer

from benchmarks.bodies import WIDTH, binary_body, json_body


@dataclass(frozen=True)
class Long:
    """A request of many bytes, or whose answer has many; without a path it goes over gRPC."""

    what: str
    path: str
    body: bytes
    headers: dict[str, str]
    status: int = 200


def long_requests() -> list[Long]:
    """Make one of each form."""
    wide, forest, length = "/v2/models/wide/infer", "/v1/models/forest:predict", "inference-header-content-length"
    rows = np.random.default_rng(1).random((1400, WIDTH)).round(7)
    flat = json_body(rows)
    nested = {"name": "features", "datatype": "FP32", "shape": list(rows.shape), "data": rows.tolist()}
    raw, head = binary_body(np.zeros((3900, WIDTH)))
    numbers, numbers_head = binary_body(rows)
    as_json = numbers[:numbers_head].replace(b"true", b"false")
    data = load_breast_cancer()
    names = [str(name) for name in data.feature_names]
    cells = np.resize(data.data, (4000, 30)) * 1.000123
    by_name = {"instances": [dict(zip(names, row, strict=True)) for row in cells[:3900].tolist()]}
    columns = {"inputs": dict(zip(names, cells.T.tolist(), strict=True))}

    def made(what: str, path: str, body: Any, **headers: str) -> Long:
        whole = body if isinstance(body, bytes) else json.dumps(body).encode()
        return Long(
            f"{what}, {len(whole) / 1e6:.0f} MB", path, whole, {k.replace("_", "-"): v for k, v in headers.items()}
        )

    return [
        made("v2 JSON", wide, flat),
        made("v2 JSON, nested", wide, {"inputs": [nested]}),
        made("v2 JSON, gzip", wide, gzip.compress(flat, 1), content_encoding="gzip"),
        made("v2 binary", wide, raw, **{length: str(head)}),
        made(
            "v2 binary, deflate",
            wide,
            zlib.compress(numbers, 1),
            content_encoding="deflate",
            **{length: str(numbers_head)},
        ),
        made("V1 by name", forest, by_name),
        made("V1 by position", forest, {"instances": cells.tolist()}),
        made("V1 columns", forest, columns),
        made(
            "v2 binary, answered in 15 MB of JSON",
            "/v2/models/echo/infer",
            as_json + numbers[numbers_head:],
            **{length: str(len(as_json))},
        ),
        made(
            "the same answer, gzip",
            "/v2/models/echo/infer",
            as_json + numbers[numbers_head:],
            accept_encoding="gzip",
            **{length: str(len(as_json))},
        ),
        made("v2 binary, answered in as much", "/v2/models/echo/infer", raw, **{length: str(head)}),
        made("V1 by position, answered in 15 MB", "/v1/models/echo:predict", {"instances": rows.tolist()}),
        *long_calls(rows),
    ]


def long_calls(rows: np.ndarray) -> list[Long]:
    """Make the forms of ModelInfer: raw and typed, read and answered."""
    floats = np.resize(rows, (3900, WIDTH)).astype(np.float32)

    def made(what: str, model: str, **contents: Any) -> Long:
        from serving.grpc_api.messages import message  # noqa: PLC0415  needed here alone

        tensor = {"name": "features", "datatype": "FP32", "shape": list(floats.shape)}
        if "typed" in contents:
            tensor["contents"] = {"fp32_contents": contents.pop("typed")}
        request = message("ModelInferRequest")(model_name=model, inputs=[tensor], **contents).SerializeToString()
        return Long(f"gRPC {what}, {len(request) / 1e6:.0f} MB", "", request, {})

    raw, typed = [floats.tobytes()], floats.ravel()
    return [
        made("raw", "wide", raw_input_contents=raw),
        made("typed", "wide", typed=typed),
        made("raw, answered in as much", "echo", raw_input_contents=raw),
        made("typed, answered in as much", "echo", typed=typed),
    ]
