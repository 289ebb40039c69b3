"""The same tensors in every form that a client may send them, against onnxruntime called directly."""

from __future__ import annotations

import gzip
import json
import math
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.conftest import Server, running
from tests.drills.direct import DTYPES, Direct, Port, gathered
from tests.drills.drill import Report, drill
from tests.drills.wire import LENGTH, Answer, Connection, grpc_channel, post

TYPED = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    **{"INT64": "int64_contents", "UINT64": "uint64_contents", "BYTES": "bytes_contents"},
    **{"FP32": "fp32_contents", "FP64": "fp64_contents"},
}
FORMS_EACH = 11
"""What one example is sent as, about: some forms do not exist for some models."""

Feeds = dict[str, Any]
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)


@drill("differential", "JSON, binary, compressed, raw, gRPC and V1 say what onnxruntime says, to the bit")
def run(report: Report, *, comparisons: int = 30_000) -> None:
    """Send random tensors to random models in every form, by the fast path and by ASGI."""
    with tempfile.TemporaryDirectory() as folder:
        models = gathered(Path(folder))
        tally = Tally()
        for shared in ("--fast-path", "--no-fast-path"):
            with running(shared, "--grpc-port", "0", models=Path(folder)) as server:
                compare(tally, models, server, examples=-(-comparisons // (2 * FORMS_EACH * len(models))))
    report.at_least("comparisons", tally.same + tally.different, comparisons)
    report.at_least("models", len(tally.models), len(models))
    report.at_least("forms of a request", len(tally.forms), 18)
    report.exactly("answers that differ", tally.different, 0)
    report.control(
        f"of {tally.flipped:,} comparisons with one bit of one element turned, all are seen to differ",
        bool(tally.flipped) and tally.flips_seen == tally.flipped,
    )
    for text in tally.first:
        print(text)


def compare(tally: Tally, models: dict[str, Direct], server: Server, *, examples: int) -> None:
    """Send so many random examples of each model to one server."""
    http, stub = Connection(server.port), service_pb2_grpc.GRPCInferenceServiceStub(grpc_channel(server))

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def one(model: Direct, data: st.DataObject) -> None:
        feeds, missing = drawn(data, model, data.draw(st.integers(1, model.most_rows)))
        tally.example(model, feeds, missing, http, stub)

    for model in models.values():
        one(model)
    http.close()


class Tally:
    """Sends examples and counts how their answers compare."""

    def __init__(self) -> None:
        self.same = self.different = self.flipped = self.flips_seen = 0
        self.models: set[str] = set()
        self.forms: set[str] = set()
        self.first: list[str] = []

    def example(self, model: Direct, feeds: Feeds, missing: bool, http: Connection, stub: Any) -> None:
        """Send one example in every form that exists for it."""
        due = model(feeds)
        turned = flipped(due)
        self.models.add(model.name)
        for form, request in http_forms(model, feeds, missing):
            answer = http.ask(request)
            sent = f"{model.name} {feeds} answered {answer}"
            self._note(form, due, turned, lambda d, a=answer, f=form: same_http(f, model, d, a), sent)
        for form, message in grpc_forms(model, feeds):
            try:
                answer = stub.ModelInfer(message, timeout=20)
            except grpc.RpcError as error:
                answer = error
            sent = f"{model.name} {feeds} answered {answer}"
            self._note(form, due, turned, lambda d, a=answer: same_grpc(model, d, a), sent)

    def _note(self, form: str, due: Any, turned: Any, same: Any, sent: str) -> None:
        self.forms.add(form)
        if same(due):
            self.same += 1
        else:
            self.different += 1
            if len(self.first) < 5:
                self.first.append(f"{sent} as {form}\n  due {due}")
        if turned is not None:
            self.flipped += 1
            self.flips_seen += not same(turned)


def drawn(data: st.DataObject, model: Direct, rows: int) -> tuple[Feeds, bool]:
    """Draw valid tensors; also whether a value is missing, which JSON of the v2 protocol can't say."""
    missing = False
    feeds: Feeds = {}
    for port in model.inputs:
        shape = [data.draw(st.integers(1, 4)) if d == -1 else d for d in port.shape]
        if model.batched:
            shape[0] = rows
        size = int(np.prod(shape))
        elements = values(port.datatype)
        if model.may_be_missing(port):
            elements = elements | st.just(float("nan"))
        # Long rows repeat what was drawn: drawing is what an example costs.
        some = data.draw(st.lists(elements, min_size=min(size, 12), max_size=min(size, 12)))
        flat = (some * (size // len(some) + 1))[:size]
        array = np.empty(size, object) if port.datatype == "BYTES" else np.zeros(size, DTYPES[port.datatype])
        array[:] = flat
        feeds[port.name] = array.reshape(shape)
        missing |= array.dtype.kind == "f" and bool(np.isnan(array).any())
    return feeds, missing


def values(datatype: str) -> st.SearchStrategy[Any]:
    """Draw one finite element, edges included."""
    if datatype == "BYTES":
        return words
    if datatype == "BOOL":
        return st.booleans()
    if datatype.startswith("FP"):
        return st.floats(width=int(datatype[2:]), allow_nan=False, allow_infinity=False)  # type: ignore[arg-type]
    info = np.iinfo(DTYPES[datatype])
    return st.integers(int(info.min), int(info.max))


def flipped(outputs: list[Any], places: set[int] | None = None) -> list[Any] | None:
    """Turn one bit of one finite element (or add a letter to one string) of the outputs at `places`, or of any.

    None where there is none.
    """
    for index, array in enumerate(outputs):
        if places is not None and index not in places:
            continue
        flat = array.ravel().copy()
        for place, value in enumerate(flat):
            if isinstance(value, str):
                flat[place] = value + "x"
            elif flat.dtype.kind == "b":
                flat[place] = not value
            elif flat.dtype.kind == "f" and not np.isfinite(value):
                continue
            else:
                flat[place : place + 1].view(np.uint8)[0] ^= 1
                if not np.isfinite(flat[place]):
                    continue
            return [*outputs[:index], flat.reshape(array.shape), *outputs[index + 1 :]]
    return None


# --- what is sent -----------------------------------------------------------------------------------------------------


def http_forms(model: Direct, feeds: Feeds, missing: bool) -> Iterator[tuple[str, bytes]]:
    """Write a request in every form that HTTP has for it."""
    path = f"/v2/models/{model.name}/infer"
    halves = any(p.datatype == "FP16" for p in model.inputs)  # which have no JSON form in the protocol
    outputs = [{"name": p.name} for p in model.outputs]
    if not halves and not missing:
        for form, nested in (("JSON", False), ("nested JSON", True)):
            body = json.dumps({"inputs": [as_json(p, feeds[p.name], nested) for p in model.inputs]}).encode()
            yield form, post(path, body)
            if nested:
                continue
            yield "JSON, gzip", post(path, gzip.compress(body, 1), content_encoding="gzip", accept_encoding="gzip")
            yield "JSON, deflate", post(path, zlib.compress(body, 1), content_encoding="deflate")
        turned = {"inputs": [as_json(p, feeds[p.name], False) for p in model.inputs[::-1]], "outputs": outputs}
        body = json.dumps(turned).encode()
        yield "JSON, outputs listed, inputs turned round", post(path, body, origin="http://a")
    for form, options in (
        ("binary", {"parameters": {"binary_data_output": True}}),
        ("binary, JSON out", {}),
        ("binary, outputs listed", {"outputs": [{**o, "parameters": {"binary_data": True}} for o in outputs]}),
    ):
        size, body = as_binary([(p, feeds[p.name], True) for p in model.inputs], options)
        yield form, post(path, body, **{LENGTH: size})
    yield "binary, gzip", post(path, gzip.compress(body, 1), content_encoding="gzip", **{LENGTH: size})
    yield "binary, deflate", post(path, zlib.compress(body, 1), content_encoding="deflate", **{LENGTH: size})
    if len(model.inputs) > 1 and not missing:
        mixed = [(p, feeds[p.name], i % 2 == 0 or p.datatype == "FP16") for i, p in enumerate(model.inputs)]
        size, body = as_binary(mixed, {})
        yield "binary and JSON mixed", post(path, body, **{LENGTH: size})
    if len(model.inputs) == 1:
        (array,) = feeds.values()
        free = model.inputs[0].shape.count(-1)
        if array.dtype != object and free <= 1:
            yield "raw body", post(path, array.tobytes(), **{LENGTH: 0})
        elif array.size == 1:
            yield "raw body", post(path, array.item().encode(), **{LENGTH: 0})
    for form, document in v1_forms(model, feeds):
        yield form, post(f"/v1/models/{model.name}:predict", json.dumps(document).encode())


def as_json(port: Port, array: Any, nested: bool) -> dict[str, Any]:
    data = array.tolist() if nested else array.ravel().tolist()
    return {"name": port.name, "datatype": port.datatype, "shape": list(array.shape), "data": data}


def as_binary(tensors: list[tuple[Port, Any, bool]], options: dict[str, Any]) -> tuple[int, bytes]:
    """Write head and blobs; what is not binary stands in the head. Returns the head's length too."""
    inputs, blobs = [], []
    for port, array, binary in tensors:
        tensor = as_json(port, array, False)
        if binary:
            blobs.append(raw(array))
            del tensor["data"]
            tensor["parameters"] = {"binary_data_size": len(blobs[-1])}
        inputs.append(tensor)
    head = json.dumps({"inputs": inputs, **options}).encode()
    return len(head), b"".join([head, *blobs])


def raw(array: Any) -> bytes:
    """Write a tensor's bytes."""
    if array.dtype != object:
        return bytes(array.tobytes())
    texts = [text.encode() for text in array.ravel()]
    return b"".join(len(text).to_bytes(4, "little") + text for text in texts)


def v1_forms(model: Direct, feeds: Feeds) -> Iterator[tuple[str, dict[str, Any]]]:
    """Write rows by name and by position, and columns."""
    names = [feature["name"] for feature in model.features]
    if model.matrix:
        (matrix,) = feeds.values()
        columns = [[none_for_nan(v) for v in column] for column in matrix.T.tolist()]
    else:
        columns = []
        for feature, array in zip(model.features, feeds.values(), strict=True):
            column = array if model.batched else array[np.newaxis]
            cells = column.reshape(
                len(column), *[-1 if d == -1 else d for d in feature["shape"]][:1], *column.shape[2:]
            )
            columns.append([none_for_nan(v) for v in (cells if feature["shape"] else column.ravel()).tolist()])
    rows = [list(row) for row in zip(*columns, strict=True)]
    yield "V1, rows by name", {"instances": [dict(zip(names, row, strict=True)) for row in rows]}
    if len(names) > 1:
        yield "V1, rows by position", {"instances": rows}
    else:
        yield "V1, bare values", {"instances": [row[0] for row in rows]}
    yield "V1, columns", {"inputs": dict(zip(names, columns, strict=True))}


def none_for_nan(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def grpc_forms(model: Direct, feeds: Feeds) -> Iterator[tuple[str, Any]]:
    """Write a request with raw and with typed contents."""
    for form in ("gRPC raw", "gRPC typed"):
        request = service_pb2.ModelInferRequest(model_name=model.name, id="7")
        for port in model.inputs:
            array = feeds[port.name]
            tensor = request.inputs.add(name=port.name, datatype=port.datatype, shape=array.shape)
            if form == "gRPC raw":
                request.raw_input_contents.append(raw(array))
                continue
            if port.datatype == "FP16":
                return  # has no typed contents
            contents = array.ravel().tolist()
            contents = [text.encode() for text in contents] if port.datatype == "BYTES" else contents
            getattr(tensor.contents, TYPED[port.datatype]).extend(contents)
        yield form, request


# --- what comes back --------------------------------------------------------------------------------------------------


def same_http(form: str, model: Direct, due: list[Any], answer: Answer) -> bool:
    """Tell whether an answer says exactly `due`."""
    if answer.status != 200:
        return False
    if form.startswith("V1"):
        key = "outputs" if form == "V1, columns" else "predictions"
        got = json.loads(answer.content())[key]
        return same_columns(model, due, got) if key == "outputs" else same_rows(model, due, got)
    return same_v2(model, due, answer)


def same_v2(model: Direct, due: list[Any], answer: Answer, names: list[str] | None = None) -> bool:
    """Tell whether a v2 answer has the outputs (all), in order, each exactly as due; blobs leave nothing over."""
    body = answer.content()
    size = int(answer.headers.get(LENGTH, len(body)))
    blobs = body[size:]
    tensors = json.loads(body[:size])["outputs"]
    chosen = asked(model, due, names)
    if [t["name"] for t in tensors] != [p.name for p, _ in chosen]:
        return False
    for (port, array), tensor in zip(chosen, tensors, strict=True):
        if tensor["datatype"] != port.datatype or tensor["shape"] != list(array.shape):
            return False
        if "data" in tensor:
            if not same_json(array.ravel(), tensor["data"]):
                return False
            continue
        taken = tensor["parameters"]["binary_data_size"]
        if blobs[:taken] != raw(array):
            return False
        blobs = blobs[taken:]
    return not blobs


def asked(model: Direct, due: list[Any], names: list[str] | None) -> list[tuple[Port, Any]]:
    """Pick the outputs that a request names, in its order; all where it names none."""
    every = {port.name: (port, array) for port, array in zip(model.outputs, due, strict=True)}
    return [every[name] for name in names or every]


def same_grpc(model: Direct, due: list[Any], answer: Any, names: list[str] | None = None) -> bool:
    """Tell whether a gRPC answer has the outputs (all), in order, each exactly as due."""
    chosen = asked(model, due, names)
    if isinstance(answer, grpc.RpcError) or [t.name for t in answer.outputs] != [p.name for p, _ in chosen]:
        return False
    for index, ((port, array), tensor) in enumerate(zip(chosen, answer.outputs, strict=True)):
        if tensor.datatype != port.datatype or list(tensor.shape) != list(array.shape):
            return False
        if answer.raw_output_contents:
            if answer.raw_output_contents[index] != raw(array):
                return False
            continue
        contents = getattr(tensor.contents, TYPED[port.datatype])
        if port.datatype == "BYTES":
            contents = [text.decode() for text in contents]
        if len(contents) != array.size or not all(map(same_cell, array.ravel(), contents)):
            return False
    return True


def same_json(due: Any, got: Any) -> bool:
    """Tell whether nested JSON arrays are an array: floats to the bit, null exactly where one is not finite."""
    if not isinstance(due, np.ndarray) or due.ndim == 0:
        return same_cell(due[()] if isinstance(due, np.ndarray) else due, got, null=True)
    return isinstance(got, list) and len(got) == len(due) and all(map(same_json, due, got))


def same_cell(due: Any, got: Any, *, null: bool = False) -> bool:
    if isinstance(due, str):
        return type(got) is str and due == got
    if due.dtype.kind != "f":
        return type(got) is type(due.item()) and due == got
    if not np.isfinite(due):
        return got is None if null else np.array(got, due.dtype).tobytes() == due.tobytes()
    return type(got) in (float, int) and due.dtype.type(got).tobytes() == due.tobytes()


def same_rows(model: Direct, due: list[Any], got: list[Any]) -> bool:
    """Tell whether V1 predictions are `due`, row by row."""
    if not model.batched:  # one example, whose outputs stand whole
        return len(got) == 1 and same_columns(model, due, got[0], row=True)
    return len(got) == len(due[0]) and all(
        same_columns(model, [cut(output, row) for output in due], one, row=True) for row, one in enumerate(got)
    )


def cut(output: Any, row: int) -> Any:
    """Take one row of an output; a row of one element is that element."""
    taken = output[row]
    return taken[0] if output.ndim == 2 and output.shape[1] == 1 else taken


def same_columns(model: Direct, due: list[Any], got: Any, *, row: bool = False) -> bool:
    """Tell whether V1 columns (or one row of them) are `due`; classifiers answer by class name."""
    names = [p.name for p in model.outputs]
    if not row and not model.batched:
        due = [o[np.newaxis] for o in due]
    elif not row:
        due = [o.ravel() if o.ndim == 2 and o.shape[1] == 1 else o for o in due]
    classes = model.signature.get("classes")
    if classes and model.signature.get("label") and model.signature.get("scores"):
        label, scores = (due[names.index(model.signature[role])] for role in ("label", "scores"))
        if isinstance(classes[0], str) and not isinstance(label if row else label[0], str):
            label = classes[int(label)] if row else np.array([classes[i] for i in label], object)
        key = "scores" if model.signature["scores"] == "scores" else "probabilities"
        return (
            set(got) == {"label", key}
            and list(got[key]) == [str(c) for c in classes]
            and same_json(label, got["label"])
            and all(same_json(scores[..., i], got[key][str(c)]) for i, c in enumerate(classes))
        )
    if len(due) == 1:
        return same_json(due[0], got)
    return (
        isinstance(got, dict)
        and list(got) == names
        and all(same_json(d, got[n]) for n, d in zip(names, due, strict=True))
    )
