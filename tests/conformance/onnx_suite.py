"""The ONNX project's own backend tests, served: `python -m tests.conformance.onnx_suite`.

The `onnx` package carries some 2,000 small models with inputs and the outputs that are due. Each that onnxruntime
itself answers within the suite's tolerance is served, and asked with the suite's inputs in four ways: V1, and the Open
Inference Protocol as JSON, as binary tensors and over gRPC; and every example that /openapi.json shows is sent back.
0 wrong, 0 refused without a reason that names the type, 0 server errors.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import httpx2 as httpx
import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper
from rich.console import Console
from rich.table import Table
from tritonclient.grpc import service_pb2, service_pb2_grpc

from serving.errors import ModelInvalid
from serving.protocols.strict_json import dumps
from serving.tensors import ONNX
from tests.conformance.direct import Direct
from tests.conformance.own import grpc_address
from tests.conformance.subject import LENGTH, NUMPY, from_bytes, to_bytes
from tests.conftest import Server

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "onnx_suite.json"
DATATYPE = {np.dtype(kind): name for name, kind in NUMPY.items() if name != "BYTES"}
WAYS = ("V1", "JSON", "binary", "gRPC")
TEXT = {"V1", "JSON"}
HALVES = ("FP16", "BF16")
"""Types that the protocol carries as raw bytes only."""
Arrays = dict[str, Any]


@dataclass
class Case:
    """One model of the suite, what goes in and what has to come out."""

    name: str
    content: bytes
    inputs: Arrays
    outputs: Arrays
    rtol: float
    atol: float

    def fault(self, name: str, got: Any, *, text: bool = False) -> str:
        """Say how an output differs from what is due; empty where it does not. text: JSON has null for the infinite."""
        due = np.asarray(self.outputs[name])
        if text and due.dtype.kind in "fV":
            due = np.where(np.isinf(due.astype(np.float64)), np.nan, due.astype(np.float64))
        got = np.asarray(got)
        if got.shape != due.shape:
            return f"{name}: shape {list(got.shape)} for {list(due.shape)}"
        if due.dtype.kind in "OUS":
            return "" if got.astype(str).tolist() == due.astype(str).tolist() else f"{name}: other strings"
        try:
            np.testing.assert_allclose(
                got.astype(np.float64), due.astype(np.float64), rtol=self.rtol, atol=self.atol, equal_nan=True
            )
        except AssertionError as error:
            return f"{name}: {' '.join(str(error).split())[:160]}"
        return ""


@dataclass
class Tally:
    """What became of the cases: by way, right, not asked, or the names and the texts of the others."""

    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    told: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))

    def note(self, way: str, case: str, verdict: str, text: str = "") -> None:
        self.counts[way][verdict] += 1
        if text:
            self.told[f"{way}: {verdict}"][case] = text

    def refuse(self, case: str, reason: str) -> None:
        """Note that a model is not served, and whether the reason is a type of one of its inputs or outputs."""
        self.note("served", case, "no, by type" if re.search(r"(in|out)put .* of type \S+\(", reason) else "no", reason)


class NotAsked(Exception):
    """The suite's inputs have no form in this way of asking."""


def suite() -> Iterator[Case]:
    """Make all cases that have their inputs at hand, and that onnxruntime answers within the suite's tolerance."""
    from onnx.backend.test.case.model import collect_testcases as of_models
    from onnx.backend.test.case.node import collect_testcases as of_nodes
    from onnx.backend.test.loader import load_model_tests

    made = of_nodes(None) + [case for case in of_models() if case.model is not None]
    for kind in ("simple", "pytorch-converted", "pytorch-operator"):
        made += load_model_tests(kind=kind)
    seen = set()
    for test in made:
        model = test.model or onnx.load(str(Path(test.model_dir) / "model.onnx"))
        for number, (given, due) in enumerate(_data(test, model)):
            name = f"{test.name}_{number}" if number else test.name
            if name in seen:
                continue
            seen.add(name)
            case = Case(name, model.SerializeToString(), given, due, test.rtol, test.atol)
            if _answers(case):
                yield case


def _data(test: Any, model: onnx.ModelProto) -> Iterator[tuple[Arrays, Arrays]]:
    initialised = {tensor.name for tensor in model.graph.initializer}
    names = [i.name for i in model.graph.input if i.name not in initialised or model.ir_version < 4]
    names = [name for name in names if name not in initialised]
    outputs = [o.name for o in model.graph.output]
    if test.data_sets:
        for given, due in test.data_sets:
            yield (
                dict(zip([i.name for i in model.graph.input], given, strict=False)),
                dict(zip(outputs, due, strict=False)),
            )
        return
    for folder in sorted(Path(test.model_dir).glob("test_data_set_*")):
        read = partial(_read, folder)
        yield read("input", names), read("output", outputs)


def _read(folder: Path, kind: str, names: list[str]) -> Arrays:
    found = {}
    for number, name in enumerate(names):
        path = folder / f"{kind}_{number}.pb"
        if path.exists():
            tensor = onnx.TensorProto()
            tensor.ParseFromString(path.read_bytes())
            found[name] = numpy_helper.to_array(tensor)
    return found


def _answers(case: Case) -> bool:
    """Tell whether onnxruntime itself gives what is due: only then is the server to be asked."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(case.content, options, providers=["CPUExecutionProvider"])
        if any(port.type not in ONNX for port in (*session.get_inputs(), *session.get_outputs())):
            return True  # it is to be refused, by the type
        if not all(isinstance(value, np.ndarray | np.generic | None) for value in case.inputs.values()):
            return False  # sequences and maps: no protocol here has them
        feeds = {i.name: np.asarray(case.inputs[i.name]) for i in session.get_inputs()}
        found = _run(session, feeds)
        return all(
            isinstance(value, np.ndarray) and not case.fault(o.name, value)
            for o, value in zip(session.get_outputs(), found, strict=True)
        )
    except Exception:
        return False


def _run(session: ort.InferenceSession, feeds: Arrays) -> list[Any]:
    """Run a model; onnxruntime takes and gives BF16 only as its own values."""
    bf16, names = NUMPY["BF16"], [o.name for o in session.get_outputs()]
    outputs = [o.type for o in session.get_outputs()]
    if "tensor(bfloat16)" not in outputs and all(array.dtype != bf16 for array in feeds.values()):
        return session.run(names, feeds)
    values = {
        name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), onnx.TensorProto.BFLOAT16)
        if array.dtype == bf16
        else ort.OrtValue.ortvalue_from_numpy(array)
        for name, array in feeds.items()
    }
    found = session.run_with_ort_values(names, values)
    return [
        np.frombuffer(ctypes.string_at(v.data_ptr(), v.tensor_size_in_bytes()), bf16).reshape(v.shape())
        if v.data_type() == "tensor(bfloat16)"
        else v.numpy()
        for v in found
    ]


def freed(case: Case) -> Case:
    """Make every dimension of the inputs free, and forget those of the outputs."""
    model = onnx.load_from_string(case.content)
    for value in model.graph.input:
        for at, dimension in enumerate(value.type.tensor_type.shape.dim):
            dimension.Clear()
            dimension.dim_param = f"{value.name}_{at}"
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    return Case(case.name, model.SerializeToString(), case.inputs, case.outputs, case.rtol, case.atol)


class Asker:
    """Asks one running server, by a client of HTTP and a stub of gRPC, or what stands for them."""

    def __init__(self, http: Any, stub: Any) -> None:
        self.http, self.stub = http, stub

    def ask(self, way: str, case: Case, described: dict[str, Any]) -> Arrays:
        """Return the outputs that the server gives. Raises NotAsked, or AssertionError with its refusal."""
        asking: Callable[[Case, dict[str, Any]], Arrays] = getattr(self, f"_{way.lower()}")
        return asking(case, described)

    def _post(self, path: str, **given: Any) -> httpx.Response:
        answer = self.http.post(path, **given)
        assert answer.status_code == 200, f"{answer.status_code} {answer.text[:300]}"
        return answer

    def _tensors(self, case: Case, described: dict[str, Any]) -> list[tuple[dict[str, Any], Any]]:
        made = []
        for name, datatype in ((t["name"], t["datatype"]) for t in described["inputs"]):
            array = np.asarray(case.inputs[name])
            if array.dtype.kind in "US":
                array = array.astype(object)
            made.append(({"name": name, "datatype": datatype, "shape": list(array.shape)}, array))
        return made

    def _json(self, case: Case, described: dict[str, Any]) -> Arrays:
        inputs = [{**head, "data": _listed(array.ravel())} for head, array in self._tensors(case, described)]
        answer = self._post(f"/v2/models/{case.name}/infer", content=json.dumps({"inputs": inputs})).json()
        return {o["name"]: _array(o["datatype"], o["shape"], o["data"]) for o in answer["outputs"]}

    def _binary(self, case: Case, described: dict[str, Any]) -> Arrays:
        made = [(head, to_bytes(head["datatype"], array)) for head, array in self._tensors(case, described)]
        inputs = [{**head, "parameters": {"binary_data_size": len(blob)}} for head, blob in made]
        head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
        body = head + b"".join(blob for _, blob in made)
        answer = self._post(f"/v2/models/{case.name}/infer", content=body, headers={LENGTH: str(len(head))})
        size = int(answer.headers[LENGTH])
        outputs, at = {}, size
        for o in json.loads(answer.content[:size])["outputs"]:
            raw = answer.content[at : at + o["parameters"]["binary_data_size"]]
            at += len(raw)
            outputs[o["name"]] = _array(o["datatype"], o["shape"], from_bytes(o["datatype"], raw))
        return outputs

    def _grpc(self, case: Case, described: dict[str, Any]) -> Arrays:
        request = service_pb2.ModelInferRequest(model_name=case.name)
        for head, array in self._tensors(case, described):
            request.inputs.add(name=head["name"], datatype=head["datatype"], shape=head["shape"])
            request.raw_input_contents.append(to_bytes(head["datatype"], array))
        try:
            answer = self.stub.ModelInfer(request, timeout=60)
        except grpc.RpcError as error:
            raise AssertionError(f"{error.code().name} {error.details()[:300]}") from None
        return {
            o.name: _array(o.datatype, list(o.shape), from_bytes(o.datatype, raw))
            for o, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
        }

    def _v1(self, case: Case, described: dict[str, Any]) -> Arrays:
        features = self.http.get(f"/v1/models/{case.name}").json()["features"]
        arrays = {t["name"]: np.asarray(case.inputs[t["name"]]) for t in described["inputs"]}
        names = [feature["name"] for feature in features]
        for tensor in described["inputs"]:
            shape = arrays[tensor["name"]].shape
            if 0 in shape and -1 in tensor["shape"][shape.index(0) + 1 :]:
                raise NotAsked("lists do not tell the dimensions behind an empty one")
        rows = None
        if set(names) != set(arrays):  # one matrix, a feature a column
            (matrix,) = arrays.values()
            rows = len(matrix)
            instances = [_listed(row) for row in matrix]
        elif features and all(arrays[f["name"]].ndim > len(f.get("shape") or ()) for f in features):
            rows = len(arrays[names[0]])
            if any(len(array) != rows for array in arrays.values()):
                raise NotAsked("inputs of different lengths are no rows")
            shapes = {f["name"]: tuple(f.get("shape") or ()) for f in features}
            instances = [
                {n: _listed(np.reshape(a[i], ()) if shapes[n] == () else a[i]) for n, a in arrays.items()}
                for i in range(rows)
            ]
        else:
            instances = [{n: _listed(a) for n, a in arrays.items()}]
        if rows == 0:
            raise NotAsked("no rows")
        answer = self._post(f"/v1/models/{case.name}:predict", content=json.dumps({"instances": instances})).json()
        predictions = answer["predictions"]
        outputs = described["outputs"]
        found = {}
        for o in outputs:
            mine = [p[o["name"]] if isinstance(p, dict) and o["name"] in p else p for p in predictions]
            due = case.outputs[o["name"]].shape
            value = mine[0] if rows is None else mine
            made = _array(o["datatype"], None, value)
            if made.size == np.prod(due) and (rows is not None or not made.size):
                made = made.reshape(due)  # [rows, 1] is a scalar a row, and lists end at the first that is empty
            found[o["name"]] = made
        return found


def _listed(array: Any) -> Any:
    """Write an array for JSON. Raises NotAsked where it has what JSON has not."""
    array = np.asarray(array)
    if array.dtype.kind in "OUS":
        return np.vectorize(lambda v: v.decode() if isinstance(v, bytes) else str(v), otypes=[object])(array).tolist()
    if array.dtype.kind in "fV":
        array = array.astype(np.float64)
        if not np.isfinite(array).all():
            if np.isinf(array).any():
                raise NotAsked("infinity has no form in JSON")
            return np.where(np.isnan(array), None, array).tolist()  # type: ignore[attr-defined]
    return array.tolist()


def _array(datatype: str, shape: list[int] | None, data: Any) -> Any:
    if datatype == "BYTES":
        made = np.asarray(data, dtype=object)
    else:
        kind = np.float64 if "F" in datatype else NUMPY[datatype]
        filled = np.asarray(data, dtype=object)
        made = np.where(filled == None, np.nan, filled).astype(kind) if filled.dtype == object else filled  # noqa: E711
    return made if shape is None else made.reshape(shape)


def check(cases: list[Case], tally: Tally) -> None:
    """Serve a folder of them, and ask."""
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            version = Path(folder) / case.name / "1"
            version.mkdir(parents=True)
            (version / "model.onnx").write_bytes(case.content)
        with _serving(Path(folder)) as server:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(grpc_address(server)))
            asker = Asker(httpx.Client(base_url=server.url, timeout=60), stub)
            problems = _settled(asker, len(cases))
            for case in cases:
                answer = asker.http.get(f"/v2/models/{case.name}")
                if answer.status_code != 200:
                    tally.refuse(case.name, problems.get(case.name, f"{answer.status_code}"))
                    continue
                tally.note("served", case.name, "yes")
                for way in WAYS:
                    _judge(asker, way, case, answer.json(), tally)
            answer = asker.http.get("/openapi.json")
            if answer.status_code != 200:
                tally.note("openapi", "all", "server error", answer.text[:300])
                return
            for path, operations in answer.json()["paths"].items():
                if path.endswith((":predict", "/infer")) and "{" not in path:
                    content = operations["post"]["requestBody"]["content"]["application/json"]
                    _example(asker, path, path, content.get("example"), tally)


def check_directly(cases: list[Case], tally: Tally) -> None:
    """Ask each through the codecs, in this process: what a server adds (gate, queue, sockets) is left out."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        for case in cases:
            path.write_bytes(case.content)
            try:
                model = Direct(path)
            except ModelInvalid as error:
                tally.refuse(case.name, error.message)
                continue
            tally.note("served", case.name, "yes")
            for way in WAYS:
                _judge(Asker(model, model), way, case, model.described, tally)
            for at, example in model.examples().items():
                _example(Asker(model, model), f"{case.name} {at}", at, example, tally)


@contextmanager
def _serving(models: Path) -> Iterator[Server]:
    large = ("--max-json-bytes", str(64 << 20), "--max-body-bytes", str(64 << 20), "--max-queued-rows", "100000")
    server = Server("--grpc-port", "0", "--log-level", "error", *large, models=models)
    try:
        yield server.wait(1800)
    finally:
        server.stop()


def _settled(asker: Asker, number: int) -> dict[str, str]:
    """Wait until each model of the folder is served or refused, and return why those that are refused are."""
    until = time.monotonic() + 600
    while True:
        listed = asker.http.get("/v1/models").json()
        problems = {p["model"] if "model" in p else p["name"]: p["reason"] for p in listed["problems"]}
        if len(listed["models"]) + len(problems) >= number:
            return problems
        assert time.monotonic() < until, f"{len(listed['models'])} of {number} are served"
        time.sleep(0.2)


def _judge(asker: Asker, way: str, case: Case, described: dict[str, Any], tally: Tally) -> None:
    try:
        found = asker.ask(way, case, described)
    except NotAsked as error:
        tally.note(way, case.name, "not asked", str(error))
        return
    except AssertionError as error:
        text = str(error)
        if way in TEXT and "has no JSON form" in text and any(f"{kind} has" in text for kind in HALVES):
            tally.note(way, case.name, "not asked", text)
            return
        broken = text[:1] == "5" or text.startswith(("INTERNAL", "UNKNOWN", "UNAVAILABLE"))
        tally.note(way, case.name, "server error" if broken else "refused", text)
        return
    except Exception as error:
        tally.note(way, case.name, "not asked", f"{type(error).__name__}: {error}")
        return
    faults = [told for name, value in found.items() if (told := case.fault(name, value, text=way in TEXT))]
    tally.note(way, case.name, "wrong" if faults else "right", "; ".join(faults))


def _example(asker: Asker, name: str, path: str, example: Any, tally: Tally) -> None:
    """Send an example back that the documentation shows."""
    if example is None:
        tally.note("examples", name, "none")
        return
    sent = asker.http.post(path, content=dumps(example))
    verdict = "right" if sent.status_code == 200 else "server error" if sent.status_code >= 500 else "refused"
    tally.note("examples", name, verdict, "" if verdict == "right" else f"{sent.status_code} {sent.text[:300]}")


def main(arguments: list[str]) -> int:
    """Ask, print the table, keep the results; 1 where anything is wrong or broke the server."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.onnx_suite", description=__doc__)
    parser.add_argument("--chunk", type=int, default=150, help="models in a folder; 0: all in one")
    parser.add_argument("--free", action="store_true", help="with every dimension free")
    parser.add_argument("--direct", action="store_true", help="through the codecs in this process: two minutes for all")
    parser.add_argument("--every", type=int, default=1, help="only each so manyth case")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--verbose", action="store_true", help="print each refusal")
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    console = Console(width=170, highlight=False, markup=False)
    cases = [case for case in suite() if given.only in case.name][:: given.every]
    if given.free:
        cases = [free for free in map(freed, cases) if _answers(free)]
    console.print(f"{len(cases)} cases that onnxruntime answers within the suite's tolerance")
    tally = Tally()
    size = given.chunk or len(cases)
    for start in range(0, len(cases), size):
        (check_directly if given.direct else check)(cases[start : start + size], tally)
    table = Table(title="the ONNX backend suite", title_justify="left")
    verdicts = ("yes", "no, by type", "no", "right", "wrong", "refused", "server error", "not asked", "none")
    for column in ("", *verdicts):
        table.add_column(column)
    for way, counts in tally.counts.items():
        table.add_row(way, *(str(counts[verdict] or "") for verdict in verdicts))
    console.print(table)
    if given.verbose:
        for kind, texts in sorted(tally.told.items()):
            console.print(f"\n{kind}:")
            for name, text in texts.items():
                console.print(f"  {name}: {text}")
    if not given.only:
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        how = "every dimension free" if given.free else "as it is"
        how += ", directly" if given.direct else f", one in {given.every}" if given.every > 1 else ""
        kept[how] = {
            "onnx": onnx.__version__,
            "onnxruntime": ort.__version__,
            "cases": len(cases),
            "counts": {way: dict(counts) for way, counts in tally.counts.items()},
            "told": tally.told,
        }
        RESULTS.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    bad = sum(counts[verdict] for counts in tally.counts.values() for verdict in ("wrong", "server error"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
