"""Files that were made to harm, or damaged on the way: the gate says no, with a reason, and its caller is unharmed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import random
import shutil
import tempfile
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from serving.gate.findings import Limits
from serving.gate.gate import Gate
from serving.repository.manifest import MODEL_FILE
from tests.conftest import MODELS
from tests.drills.drill import Report, drill

IRIS = MODELS / "iris" / "1" / MODEL_FILE
SEEDS = [MODELS / name / MODEL_FILE for name in ("iris/1", "iris/2", "penguins/1", "diabetes/1")]


def linear(location: str | None = None) -> onnx.ModelProto:
    """Make a small model with its weights inside, or said to lie at `location`."""
    tensor = numpy_helper.from_array(np.ones((4, 2), dtype=np.float32), "w")
    if location is not None:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", "32")):
            tensor.external_data.add(key=key, value=value)
    return model([helper.make_node("MatMul", ["x", "w"], ["y"])], [tensor])


def model(nodes: list[onnx.NodeProto], tensors: list[onnx.TensorProto] = [], domain: str = "") -> onnx.ModelProto:  # noqa: B006
    """Make a model from x [N, 4] to y [N, 2] of these nodes."""
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        tensors,
    )
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def endless() -> onnx.ModelProto:
    """Make a loop that turns for 300 years."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["cond"], ["cond_out"]), helper.make_node("Sin", ["state"], ["state_out"])],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("cond", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("cond_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state_out", TensorProto.FLOAT, None),
        ],
    )
    turns = numpy_helper.from_array(np.array(2**62, dtype=np.int64), "turns")
    go = numpy_helper.from_array(np.array(True), "go")
    return model([helper.make_node("Loop", ["turns", "go", "x"], ["y"], body=body)], [turns, go])


def huge() -> onnx.ModelProto:
    """Make a model that asks for 100 GB at each run."""
    many = numpy_helper.from_array(np.array([25_000_000_000], dtype=np.int64), "many")
    return model(
        [
            helper.make_node("Shape", ["x"], ["shape"]),
            helper.make_node("ReduceMin", ["shape"], ["one"], keepdims=1),
            helper.make_node("Mul", ["one", "many"], ["size"]),
            helper.make_node("ConstantOfShape", ["size"], ["y"]),
        ],
        [many],
    )


def with_iris(old: str, new: str) -> bytes:
    """Write iris with something else in its own description."""
    proto = onnx.load(str(IRIS))
    for entry in proto.metadata_props:
        assert old in entry.value
        entry.value = entry.value.replace(old, new, 1)
    return proto.SerializeToString()


def craft(folder: Path) -> dict[str, str]:
    """Write one folder for each kind of harm; return what its reason must say, by name."""
    good = IRIS.read_bytes()
    files: dict[str, tuple[bytes, str]] = {
        "truncated": (good[: len(good) // 2], "cut short"),
        "empty": (b"", "not an ONNX file"),
        "text": (b"this is no model\n" * 50, "not an ONNX file"),
        "pickle": (pickle.dumps({"weights": [1, 2, 3]}), "Python pickle"),
        "zip": (b"PK\x03\x04" + bytes(100), "zip archive"),
        "parent": (linear("../w.bin").SerializeToString(), "inside the model's own folder"),
        "absolute": (linear("/etc/passwd").SerializeToString(), "inside the model's own folder"),
        "link": (linear("w.bin").SerializeToString(), "link"),
        "short": (linear("short.bin").SerializeToString(), "half copied"),
        "missing": (linear("missing.bin").SerializeToString(), "not there"),
        "endless": (endless().SerializeToString(), "s of processor time|did not end"),
        "huge": (huge().SerializeToString(), "more memory"),
        "custom": (
            model([helper.make_node("Steal", ["x"], ["y"], domain="evil")], [], "evil").SerializeToString(),
            "evil",
        ),
        "invalid": (model([helper.make_node("Relu", ["nowhere"], ["y"])]).SerializeToString(), "not valid ONNX"),
        "inputs": (with_iris('"FP32"', '"FP64"'), "declares inputs"),
        "outputs": (with_iris('"name":"label"', '"name":"labels"'), "label"),
        "golden": (with_iris('"outputs":{"label":["', '"outputs":{"label":["not '), "golden row"),
    }
    for name, (content, _) in files.items():
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "1" / MODEL_FILE).write_bytes(content)
    (folder / "parent" / "w.bin").write_bytes(bytes(32))
    (folder / "elsewhere").write_bytes(bytes(32))
    (folder / "link" / "1" / "w.bin").symlink_to(folder / "elsewhere")
    (folder / "short" / "1" / "short.bin").write_bytes(bytes(31))
    return {name: reason for name, (_, reason) in files.items()}


def mutated(seed: bytes, chance: random.Random) -> bytes:
    """Damage a file: some bytes flipped, cut, doubled, filled or moved."""
    content = bytearray(seed)
    for _ in range(chance.choice((1, 1, 2, 8, 64))):
        at = chance.randrange(len(content))
        length = min(chance.choice((1, 2, 4, 16, 256)), len(content) - at)
        kind = chance.randrange(6)
        if kind == 0:
            content[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            content[at : at + length] = chance.randbytes(length)
        elif kind == 2:
            del content[at : at + length]
        elif kind == 3:
            content[at:at] = content[at : at + length]
        elif kind == 4:
            content[at : at + length] = chance.choice((b"\0", b"\xff", b"\x7f")) * length
        else:
            content[at : at + length] = content[(other := chance.randrange(len(content))) : other + length]
        if not content:
            return b"\0"
    return bytes(content)


def _load_plainly(path: str, begun: Event) -> None:
    from serving.engine.session import OnnxSession

    begun.set()
    OnnxSession(Path(path), warm_rows=1)


@drill("hostile_models", "a bad model file is refused with a reason, and whoever asks the gate is unharmed")
def hostile_models(
    report: Report,
    *,
    mutations: int = 2000,
    control_s: float = 10.0,
    gate: Gate | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Examine every crafted file, and `mutations` damaged ones; the gate's caller must live on and get an answer."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        gate = gate or stack.enter_context(Gate(Limits(memory_bytes=2 * 2**30, cpu_s=5, wall_s=60)))
        _crafted(report, gate, folder, progress)
        _damaged(report, gate, folder, mutations, progress)
        report.exactly("after all that, a good model passes", gate.examine(IRIS.parent).ok, 1)
        context = multiprocessing.get_context("spawn")
        begun = context.Event()
        endless_path = str(folder / "endless" / "1" / MODEL_FILE)
        child = context.Process(target=_load_plainly, args=(endless_path, begun), daemon=True)
        child.start()
        begun.wait(60)
        child.join(control_s)
        report.control("the endless model in a process without the gate does not end", child.is_alive())
        child.kill()
        child.join()


def _crafted(report: Report, gate: Gate, folder: Path, progress: Callable[[str], None]) -> None:
    due = craft(folder)
    as_due = 0
    for name, reason in due.items():
        found = gate.examine(folder / name / "1")
        said = "; ".join(found.reasons)
        progress(f"{name}: {said}")
        as_due += not found.ok and any(part in said for part in reason.split("|"))
    report.exactly("crafted files refused, each with its own reason", as_due, len(due), f"of {len(due)}")


def _damaged(report: Report, gate: Gate, folder: Path, mutations: int, progress: Callable[[str], None]) -> None:
    chance = random.Random(7)
    seeds = [path.read_bytes() for path in SEEDS]
    refused = passed = silent = gate_lost = killed = 0
    place = folder / "damaged"
    place.mkdir()
    caller = os.getpid()
    for index in range(mutations):
        (place / MODEL_FILE).write_bytes(mutated(seeds[index % len(seeds)], chance))
        found = gate.examine(place)
        said = "; ".join(found.reasons)
        refused += not found.ok
        passed += found.ok
        silent += not found.ok and not said.strip()
        gate_lost += "gate's own process" in said
        killed += "ended its process" in said
        if "ended its process" in said:
            progress(f"{index}: {said}")
    report.exactly("damaged files examined", refused + passed, mutations)
    report.exactly("refused without a reason", silent, 0)
    report.exactly("times that the gate's own process was lost", gate_lost, 0)
    report.exactly("the asking process is the one that began", os.getpid() == caller, 1)
    report.at_least("refused", refused, mutations * 0.5)
    report.at_least("that ended the process they were looked at in", killed, 0)
