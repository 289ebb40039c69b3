"""Rows of a few bytes that have a graph take gigabytes: refused by the model's limit, and nobody else notices."""

from __future__ import annotations

import math
import os
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx2 as httpx
import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from serving.engine.runtime import write_prepared
from serving.engine.session import OnnxSession
from serving.errors import InferenceFailed, QueueFull
from serving.protocols.messages import message
from tests.conftest import MODELS, Server, running
from tests.drills.wire import resident, workers

Wait = Callable[[Callable[[], bool]], None]

MIB = 2**20
LIMIT = 64 * MIB
SAFE = 1024 * MIB
"""Most private memory for the worker, so that a limit that does not hold costs the machine nothing."""
ROW = [5.1, 3.5, 1.4, 0.2]


def constant(name: str, value: Any, kind: Any) -> Any:
    return numpy_helper.from_array(np.array(value, dtype=kind), name)


def graph(nodes: list[Any], constants: list[Any], output: int = TensorProto.FLOAT) -> ModelProto:
    """Make a model of one number `n` whose nodes end at `big`, and which answers how many numbers that has."""
    nodes = [helper.make_node(kind, given, made, **more) for kind, given, made, more in nodes]
    nodes.append(helper.make_node("Size", ["big"], ["size"]))
    nodes.append(helper.make_node("Unsqueeze", ["size", "zero"], ["y"]))
    made = helper.make_graph(
        nodes,
        "asks",
        [helper.make_tensor_value_info("n", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [1])],
        [constant("zero", [0], np.int64), *constants],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


ONE = constant("one", [1], np.int64)
FLOAT = constant("float", [1], np.float32)
SCALAR = constant("first", 0, np.int64)
STEP = constant("step", 1, np.int64)
ZEROS = ("ConstantOfShape", ["n"], ["zeros"], {})
RANGE = ("Range", ["first", "last", "step"], ["range"], {})
LAST = ("Squeeze", ["n"], ["last"], {})

ASKING: dict[str, tuple[ModelProto, int]] = {
    "filled": (graph([("ConstantOfShape", ["n"], ["big"], {})], []), 2_000_000_000),
    "expand": (graph([("Expand", ["float", "n"], ["big"], {})], [FLOAT]), 2_000_000_000),
    "tile": (graph([("Tile", ["float", "n"], ["big"], {})], [FLOAT]), 1_000_000_000),
    "range": (graph([LAST, ("Range", ["first", "last", "step"], ["big"], {})], [SCALAR, STEP]), 1_000_000_000),
    "pad": (
        graph([("Concat", ["zero", "n"], ["pads"], {"axis": 0}), ("Pad", ["float", "pads"], ["big"], {})], [FLOAT]),
        2_000_000_000,
    ),
    "resize": (graph([("Resize", ["float", "", "", "n"], ["big"], {"mode": "nearest"})], [FLOAT]), 2_000_000_000),
    "one_hot": (
        graph(
            [("OneHot", ["zero", "n", "values"], ["big"], {})],
            [constant("values", [0, 1], np.float32)],
        ),
        2_000_000_000,
    ),
    "outer": (
        graph(
            [
                LAST,
                RANGE,
                ("Unsqueeze", ["range", "zero"], ["row"], {}),
                ("Unsqueeze", ["range", "one"], ["column"], {}),
                ("Mul", ["row", "column"], ["big"], {}),
            ],
            [SCALAR, STEP, ONE],
        ),
        40_000,
    ),
    "non_zero": (
        graph(
            [
                ("ConstantOfShape", ["n"], ["ones"], {"value": constant("v", [True], np.bool_)}),
                ("NonZero", ["ones"], ["big"], {}),
            ],
            [],
        ),
        500_000_000,
    ),
}
"""By the operator that makes it: a model, and the number for which it takes 4 to 13 GB."""


def put(root: Path, name: str, model: ModelProto) -> None:
    (root / name / "1").mkdir(parents=True)
    (root / name / "1" / "model.onnx").write_bytes(model.SerializeToString())


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the graphs above, each with a limit, and of one that may have more."""
    root = tmp_path_factory.mktemp("models")
    for name, (model, _) in ASKING.items():
        put(root, name, model)
    put(root, "roomy", ASKING["filled"][0])
    (root / "roomy" / "model.toml").write_text(f"[limits]\nmemory_bytes = {1024 * MIB}\n")
    texts = graph([("Expand", ["text", "n"], ["big"], {})], [])
    texts.graph.input.append(helper.make_tensor_value_info("text", TensorProto.STRING, [1]))
    put(root, "texts", texts)
    shutil.copytree(MODELS / "iris" / "1", root / "iris" / "1")
    with running("--model-memory-bytes", str(LIMIT), "--grpc-port", "0", models=root) as server:
        (worker,) = workers(server)
        own, _ = resource.prlimit(worker, resource.RLIMIT_DATA)
        assert SAFE <= own < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        resource.prlimit(worker, resource.RLIMIT_DATA, (SAFE, SAFE))
        yield server


def ask(server: Server, name: str, n: int) -> httpx.Response:
    body = {"inputs": [{"name": "n", "datatype": "INT64", "shape": [1], "data": [n]}]}
    return httpx.post(f"{server.url}/v2/models/{name}/infer", json=body, timeout=60)


def held(server: Server) -> float:
    return resident(workers(server)[0])


def test_a_row_that_asks_for_gigabytes_is_refused(asked: Server, eventually: Wait) -> None:
    """Whatever operator makes them, and however asked: an error that names the limit, and no memory stays.

    The worker lives, and answers others rightly meanwhile.
    """
    (worker,) = workers(asked)
    before = held(asked)
    url, wrong, done = f"{asked.url}/v1/models/iris:predict", [], threading.Event()
    first = httpx.post(url, json={"instances": [ROW]}, timeout=60).json()

    def others() -> None:
        with httpx.Client(timeout=60) as client:
            while not done.is_set():
                answer = client.post(url, json={"instances": [ROW]})
                if answer.status_code != 200 or answer.json() != first:
                    wrong.append(answer.text)

    thread = threading.Thread(target=others)
    thread.start()
    try:
        for name, (_, n) in ASKING.items():
            assert ask(asked, name, 10).json()["outputs"][0]["data"][0] >= 10, name
            refused = ask(asked, name, n)
            assert refused.status_code == 400, (name, refused.text)
            assert f"limit of {LIMIT} bytes" in refused.text, (name, refused.text)
            refused = httpx.post(f"{asked.url}/v1/models/{name}:predict", json={"instances": [n]}, timeout=60)
            assert refused.status_code == 422, (name, refused.text)
            assert f"limit of {LIMIT} bytes" in refused.text, (name, refused.text)
    finally:
        done.set()
        thread.join()
    assert not wrong
    assert workers(asked) == [worker]
    eventually(lambda: held(asked) < before + 64)


def test_memory_beside_the_arena_is_bounded_by_the_process(asked: Server, eventually: Wait) -> None:
    """A graph that repeats a text, whose letters no arena counts, is refused at what its worker may have at most."""
    (worker,) = workers(asked)
    before = held(asked)
    body = {
        "inputs": [
            {"name": "n", "datatype": "INT64", "shape": [1], "data": [1_000_000]},
            {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a" * 10_000]},
        ]
    }
    refused = httpx.post(f"{asked.url}/v2/models/texts/infer", json=body, timeout=60)
    assert refused.status_code == 400
    assert "than the server has left" in refused.text
    eventually(lambda: held(asked) < before + 64)
    answer = httpx.post(f"{asked.url}/v1/models/iris:predict", json={"instances": [ROW]}, timeout=60)
    assert answer.status_code == 200
    assert workers(asked) == [worker]


def test_callers_of_grpc_are_told_too(asked: Server) -> None:
    """The limit stands in the status of a call."""
    address = asked.output().split("gRPC: ")[1].split()[0]
    request_of, response_of = message("ModelInferRequest"), message("ModelInferResponse")
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=request_of.SerializeToString,
            response_deserializer=response_of.FromString,
        )
        request = request_of(
            model_name="filled",
            inputs=[{"name": "n", "datatype": "INT64", "shape": [1], "contents": {"int64_contents": [2_000_000_000]}}],
        )
        with pytest.raises(grpc.RpcError) as raised:
            call(request, timeout=60)
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert f"limit of {LIMIT} bytes" in raised.value.details()


def test_memory_of_an_unusual_run_is_given_back(asked: Server, eventually: Wait) -> None:
    """A run within its limit that takes hundreds of MiB is answered, and nothing of that stays, though nobody asks."""
    before = held(asked)
    assert ask(asked, "roomy", 100_000_000).status_code == 200
    (line,) = [line for line in Path(f"/proc/{workers(asked)[0]}/status").read_text().splitlines() if "VmHWM" in line]
    assert int(line.split()[1]) / 1024 > before + 300
    eventually(lambda: held(asked) < before + 64)


def test_a_limit_changes_while_the_model_serves(asked: Server, eventually: Wait) -> None:
    """The limit of one model is taken from its file without a restart; one that makes no sense is named."""
    file = asked.models / "tile" / "model.toml"
    assert ask(asked, "tile", 50_000_000).status_code == 400
    file.write_text(f"[limits]\nmemory_bytes = {512 * MIB}\n")
    eventually(lambda: ask(asked, "tile", 50_000_000).status_code == 200)
    file.write_text("[limits]\nmemory_bytes = 5\n")
    eventually(lambda: "limits.memory_bytes" in httpx.get(f"{asked.url}/v1/models").text)
    assert ask(asked, "tile", 50_000_000).status_code == 200
    file.unlink()
    eventually(lambda: ask(asked, "tile", 50_000_000).status_code == 400)


def test_runs_of_many_sizes_fit_one_after_another(tmp_path: Path) -> None:
    """What a limit allows alone it allows after runs of any other sizes."""
    (tmp_path / "model.onnx").write_bytes(ASKING["filled"][0].SerializeToString())
    session = OnnxSession(tmp_path / "model.onnx", memory_bytes=LIMIT)
    for size in (*range(1_000_000, 16_000_000, 1_000_000), 3_000_000, 16_000_000):
        assert session.run((np.array([size]),))[0].tolist() == [size]


def test_who_finds_the_memory_taken_may_come_back(tmp_path: Path) -> None:
    """Two runs that fit alone, and not together: each is answered rightly, or told to come back."""
    (tmp_path / "model.onnx").write_bytes(ASKING["filled"][0].SerializeToString())
    session = OnnxSession(tmp_path / "model.onnx", memory_bytes=LIMIT)
    together = threading.Barrier(2)

    def ask_in_turn() -> list[Any]:
        found: list[Any] = []
        for _ in range(40):
            together.wait(60)
            try:
                found.append(session.run((np.array([12_000_000]),))[0].tolist())
            except QueueFull as error:
                found.append(error.message)
        return found

    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(ask_in_turn) for _ in range(2))
        found = first.result() + second.result()
    busy = "other requests have the memory that this model may take: come back later"
    assert all(answer in ([12_000_000], busy) for answer in found)
    assert [12_000_000] in found
    assert busy in found


@pytest.fixture
def others_load() -> Iterator[None]:
    """Have the process take memory, and let it go, as the loading of other models does."""
    done = threading.Event()

    def take() -> None:
        while not done.is_set():
            np.ones(32 << 20, np.uint8)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(take)
        yield
        done.set()


@pytest.mark.usefixtures("others_load")
@pytest.mark.parametrize("form", ["whole", "external", "prepared", "computed"])
def test_weights_do_not_count(tmp_path: Path, form: str) -> None:
    """A model's runs may take what its limit says, wherever its weights are, and though they are more than that."""
    width, limit = 12_500, 10_000_000  # 50 MB of weights
    weights = np.ones((1000, width), np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    constants = [numpy_helper.from_array(weights, "w")]
    if form == "computed":
        nodes.insert(0, helper.make_node("ConstantOfShape", ["shape"], ["w"]))
        constants = [constant("shape", [1000, width], np.int64)]
    made = helper.make_model(
        helper.make_graph(
            nodes,
            "weighty",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 1000])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", width])],
            constants,
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    path = tmp_path / "model.onnx"
    onnx.save(made, str(path), save_as_external_data=form == "external", location="model.data")
    if form == "prepared":
        path = tmp_path / "prepared" / "model.onnx"
        path.parent.mkdir()
        write_prepared(tmp_path / "model.onnx", path)
    session = OnnxSession(path, warm_rows=1, prepared=form == "prepared", memory_bytes=limit)
    fits = math.floor(limit / (4 * width))
    session.run((np.zeros((fits - 10, 1000), np.float32),))
    session.give_back()
    with pytest.raises(InferenceFailed, match=f"limit of {limit} bytes"):
        session.run((np.zeros((fits + 10, 1000), np.float32),))
