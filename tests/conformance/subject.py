"""The server that is asked: where it is, which models it has, and inputs made from their metadata."""

from __future__ import annotations

import json
import struct
from functools import cached_property
from typing import Any, NamedTuple

import grpc
import httpx2 as httpx
import ml_dtypes
import numpy as np
from tritonclient.grpc import service_pb2_grpc

LENGTH = "Inference-Header-Content-Length"
NUMPY = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "FP32": np.float32,
    "FP64": np.float64,
    "BYTES": np.object_,
}
BINARY_ONLY = ("FP16", "BF16")
SECONDS = 30


class NotAsked(Exception):
    """The point says nothing of this server: it has no such model, or no such door."""


class Tensor(NamedTuple):
    """An input or an output as the metadata has it; -1 where a dimension is free."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class Described:
    """A model by its own metadata."""

    def __init__(self, metadata: dict[str, Any]) -> None:
        self.name: str = metadata["name"]
        self.versions: list[str] = metadata.get("versions") or []
        self.inputs = [Tensor(t["name"], t["datatype"], tuple(t["shape"])) for t in metadata.get("inputs") or []]
        self.outputs = [Tensor(t["name"], t["datatype"], tuple(t["shape"])) for t in metadata.get("outputs") or []]
        self.batched = bool(self.inputs) and all(t.shape[:1] == (-1,) for t in self.inputs)
        self.path = f"/v2/models/{self.name}/infer"

    def arrays(self, rows: int = 1) -> list[np.ndarray[Any, Any]]:
        """Make valid inputs: small numbers, short texts; free dimensions behind the first are 1."""
        made = np.random.default_rng(7)
        arrays = []
        for tensor in self.inputs:
            shape = tuple(
                (rows if i == 0 and self.batched else 1) if d == -1 else d for i, d in enumerate(tensor.shape)
            )
            if tensor.datatype == "BYTES":
                array = np.full(shape, "text", dtype=np.object_)
            elif tensor.datatype == "BOOL":
                array = made.integers(0, 2, shape).astype(np.bool_)
            elif "INT" in tensor.datatype:
                array = made.integers(0, 4, shape).astype(NUMPY[tensor.datatype])
            else:
                array = made.random(shape).astype(NUMPY[tensor.datatype])
            arrays.append(array)
        return arrays

    def json(self, rows: int = 1, **more: Any) -> dict[str, Any]:
        """Make a request that is all JSON."""
        inputs = [
            {"name": t.name, "datatype": t.datatype, "shape": list(a.shape), "data": a.ravel().tolist()}
            for t, a in zip(self.inputs, self.arrays(rows), strict=True)
        ]
        return {"inputs": inputs, **more}

    def binary(self, rows: int = 1, **more: Any) -> tuple[dict[str, Any], list[bytes]]:
        """Make the JSON of a request whose inputs are all raw, and their bytes."""
        arrays = self.arrays(rows)
        blobs = [to_bytes(t.datatype, a) for t, a in zip(self.inputs, arrays, strict=True)]
        inputs = [
            {
                "name": t.name,
                "datatype": t.datatype,
                "shape": list(a.shape),
                "parameters": {"binary_data_size": len(blob)},
            }
            for t, a, blob in zip(self.inputs, arrays, blobs, strict=True)
        ]
        return {"inputs": inputs, **more}, blobs


def to_bytes(datatype: str, array: np.ndarray[Any, Any]) -> bytes:
    """Write a tensor as the protocol has it."""
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(v.encode())) + v.encode() for v in array.ravel())
    return array.tobytes()


def from_bytes(datatype: str, raw: bytes) -> list[Any]:
    """Read a tensor's elements."""
    if datatype == "BYTES":
        found, at = [], 0
        while at < len(raw):
            (size,) = struct.unpack_from("<I", raw, at)
            found.append(raw[at + 4 : at + 4 + size].decode())
            at += 4 + size
        return found
    return list(np.frombuffer(raw, NUMPY[datatype]).tolist())


class _Client(httpx.Client):
    """Asks once more where a server closed the connection behind the answer before, as some do behind an error."""

    def send(self, request: httpx.Request, **more: Any) -> httpx.Response:
        try:
            return super().send(request, **more)
        except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
            return super().send(request, **more)


class Subject:
    """A server. http: its URL. grpc: host:port, or None. key: what it wants of those who change it, or None.

    pid: of its process, where it was started for this.
    """

    def __init__(
        self, http: str, grpc: str | None = None, *, models: tuple[str, ...] = (), key: str | None = None
    ) -> None:
        self.url = http.rstrip("/")
        self.grpc = grpc
        self.key = key
        self._chosen = models
        self.headers = {"authorization": f"Bearer {key}"} if key else {}
        self.client = _Client(base_url=self.url, timeout=SECONDS, headers=self.headers)
        self._channel: Any = None
        self.pid: int | None = None

    def close(self) -> None:
        """Let its connections go."""
        self.client.close()
        if self._channel is not None:
            self._channel.close()

    @property
    def address(self) -> str:
        """host:port of its HTTP."""
        return self.url.split("://", 1)[1]

    @cached_property
    def models(self) -> list[Described]:
        """The models to ask about: those chosen, or all that the repository index or the list names."""
        described = []
        for name in self._chosen or self._listed():
            answer = self.client.get(f"/v2/models/{name}")
            if answer.status_code == 200 and (model := Described(answer.json())).inputs:
                described.append(model)
        return described

    def _listed(self) -> list[str]:
        answer = self.client.post("/v2/repository/index", json={"ready": True})
        if answer.status_code == 200:
            return list(dict.fromkeys(model["name"] for model in answer.json()))
        answer = self.client.get("/v2/models")
        if answer.status_code == 200:
            return list(answer.json()["models"])
        raise NotAsked("the server lists no models: give --model")

    def model(self, *, numbers: bool = False, batched: bool = False, inputs: int = 0, datatype: str = "") -> Described:
        """Return the first model that has what a point needs, and whose inputs JSON can carry if it names none."""
        for model in self.models:
            kinds = [t.datatype for t in model.inputs]
            fits = (
                (datatype in kinds if datatype else not set(BINARY_ONLY).intersection(kinds))
                and (not numbers or all(k in ("FP32", "FP64") for k in kinds))
                and (not batched or model.batched)
                and (not inputs or (len(kinds) == 1 if inputs == 1 else len(kinds) >= inputs))
            )
            if fits:
                return model
        raise NotAsked("no model of this server has what this point needs")

    def named(self, name: str) -> Described:
        """Return one of the probes that `--write-models` writes."""
        for model in self.models:
            if model.name == name:
                return model
        raise NotAsked(f"wants the model {name}: --write-models writes it")

    def post(self, path: str, document: Any = None, *blobs: bytes, **headers: str) -> httpx.Response:
        """POST JSON, with raw tensors behind it where there are some."""
        head = b"" if document is None else document if isinstance(document, bytes) else json.dumps(document).encode()
        if blobs:
            headers.setdefault(LENGTH, str(len(head)))
        raw = any(name.lower() == LENGTH.lower() for name in headers)
        headers.setdefault("content-type", "application/octet-stream" if raw else "application/json")
        return self.client.post(path, content=b"".join((head, *blobs)), headers=headers)

    def infer(self, model: Described, document: Any, *blobs: bytes, **headers: str) -> dict[str, Any]:
        """Predict; return the JSON of the answer, with the raw outputs read into `data`."""
        return read(self.post(model.path, document, *blobs, **headers))

    @property
    def stub(self) -> Any:
        """The calls, through the stubs that tritonclient ships."""
        if self.grpc is None:
            raise NotAsked("no --grpc address was given")
        if self._channel is None:
            self._channel = grpc.insecure_channel(self.grpc)
        return service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    @property
    def channel(self) -> Any:
        """The gRPC channel."""
        return self.stub and self._channel

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a gRPC call that changes the server carries."""
        return tuple(self.headers.items())


def read(answer: httpx.Response) -> dict[str, Any]:
    """Read an answer to a prediction: its JSON, with raw outputs as `data`."""
    assert answer.status_code == 200, f"{answer.status_code}: {answer.text[:200]}"
    length = answer.headers.get(LENGTH)
    if length is None:
        return dict(answer.json())
    document: dict[str, Any] = json.loads(answer.content[: int(length)])
    at = int(length)
    for output in document["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        if size is not None:
            output["data"] = from_bytes(output["datatype"], answer.content[at : at + size])
            at += size
    assert at == len(answer.content), f"{len(answer.content) - at} bytes lie behind the last output"
    return document


def bad(answer: httpx.Response, what: str = "") -> str | None:
    """Assert that a request was refused as its sender's fault: 400; 422, which some have it be, is noted."""
    assert answer.status_code in (400, 422), f"{what}{answer.status_code}: {answer.text[:120]}"
    return "422" if answer.status_code == 422 else None


def flat(values: Any) -> list[Any]:
    """Flatten nested lists."""
    return [one for value in values for one in flat(value)] if isinstance(values, list) else [values]


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Assert that two answers hold the same outputs; numbers to FP32, in which JSON may round them."""
    assert [o["name"] for o in one["outputs"]] == [o["name"] for o in other["outputs"]], "other outputs"
    for a, b in zip(one["outputs"], other["outputs"], strict=True):
        assert a["datatype"] == b["datatype"], f"{a['name']} is {a['datatype']} and {b['datatype']}"
        assert list(a["shape"]) == list(b["shape"]), f"{a['name']} has shapes {a['shape']} and {b['shape']}"
        left, right = flat(a["data"]), flat(b["data"])
        if a["datatype"].startswith(("FP", "BF")):
            assert np.allclose(np.array(left, float), np.array(right, float), rtol=1e-6, atol=1e-7), (
                f"{a['name']} differs"
            )
        else:
            assert left == right, f"{a['name']} differs: {left[:3]} and {right[:3]}"
