"""No version serves before the gate has looked at it, and nothing that a model does there harms who asked."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper
from rich.console import Console

from serving.errors import NotReady
from serving.gate import gate
from serving.gate.client import GateClient
from serving.gate.findings import Findings, Limits
from serving.gate.gate import Gate, judge, read
from serving.gate.report_table import table
from serving.linux.limits import raise_open_files
from serving.repository import manifest
from serving.repository.manifest import Hashes
from serving.repository.repository import Repository
from serving.repository.traffic import Traffic
from tests.conftest import MODELS
from tests.drills.drill import Report
from tests.drills.hostile_models import hostile_models

IRIS = MODELS / "iris"


def test_hostile_models_are_refused(examiner: Gate) -> None:
    """Short form of the drill: crafted and damaged files get a reason each, and the gate lives on."""
    report = Report()
    hostile_models(report, mutations=12, control_s=1.0, gate=examiner)
    assert not report.broken()


FLOAT, STRING = TensorProto.FLOAT, TensorProto.STRING


@pytest.mark.parametrize(
    ("operator", "attributes", "opset", "kind", "says"),
    [
        ("Identity", {}, 99, FLOAT, "Opset 99 is under development"),
        ("StringNormalizer", {"case_change_action": "LOWER", "locale": "xx_YY"}, 17, STRING, "locale with name:xx_YY"),
        ("Pad", {"mode": "none", "value": 0.0, "pads": [0, 0]}, 2, FLOAT, "Invalid 'mode' attribute"),
    ],
)
def test_the_reason_is_onnxruntimes_and_tells_nothing_of_the_inside(  # noqa: PLR0917
    examiner: Gate, tmp_path: Path, operator: str, attributes: dict[str, Any], opset: int, kind: int, says: str
) -> None:
    """What onnxruntime says against a model is told without any folder or place in a source, and not cut by them."""
    node = helper.make_node(operator, ["x"], ["y"], **attributes)
    ports = [helper.make_tensor_value_info(name, kind, [None]) for name in "xy"]
    graph = helper.make_graph([node], "g", ports[:1], ports[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    report = examiner.examine(tmp_path)
    assert not report.ok
    said = report.model_dump_json()
    assert says in said
    for inside in ("onnxruntime::", "/onnxruntime", ".h:", ".cc:", "[with", "ONNXRuntimeError", str(tmp_path)):
        assert inside not in said


def test_sizes_that_were_made_up_refuse_no_model(examiner: Gate, tmp_path: Path) -> None:
    """onnxruntime asks for petabytes where `pads` are fewer than the data has dimensions: the sizes tried were ours."""
    node = helper.make_node("Pad", ["x", "pads"], ["y"], mode="reflect")
    ports = [
        helper.make_tensor_value_info("x", TensorProto.INT32, list("abcd")),
        helper.make_tensor_value_info("pads", TensorProto.INT64, ["n"]),
    ]
    graph = helper.make_graph([node], "g", ports, [helper.make_tensor_value_info("y", TensorProto.INT32, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    report = examiner.examine(tmp_path)
    assert report.ok, report.reasons


def test_what_onnxruntime_runs_is_served_though_onnx_finds_fault(examiner: Gate, tmp_path: Path) -> None:
    """A weight that is no input in a file of IR 3, no name, nodes in any order, outputs without a type: all run."""
    x, y = (helper.make_tensor_value_info(name, FLOAT, ["n", 2]) for name in "xy")
    weight = helper.make_tensor("w", FLOAT, [2], [1.0, 2.0])
    nodes = [helper.make_node("Relu", ["t"], ["y"]), helper.make_node("Add", ["x", "w"], ["t"])]
    for change in ("ir", "name", "type", "order"):
        model = helper.make_model(
            helper.make_graph(nodes if change == "order" else nodes[::-1], "g", [x], [y], [weight]),
            opset_imports=[helper.make_opsetid("", 8)],
            ir_version=3 if change == "ir" else 8,
        )
        if change == "name":
            model.graph.name = ""
        if change == "type":
            model.graph.output[0].ClearField("type")
        (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
        report = examiner.examine(tmp_path)
        assert report.ok, report.reasons
        assert "not valid ONNX" in next(check.detail for check in report.checks if check.name == "ONNX")


def test_every_shipped_model_passes(examiner: Gate) -> None:
    """What ships goes through its own gate, with its cost measured."""
    for folder in sorted(MODELS.glob("[!.]*/[0-9]*")):
        report = examiner.examine(folder)
        assert report.ok, report.reasons
        assert report.figures is not None
        assert report.figures.row_s


def test_the_report_shows_the_cost_beside_the_serving_version(examiner: Gate) -> None:
    """The table has both versions' latency and memory, and the checks in words."""
    report = examiner.examine(IRIS / "2", serving=IRIS / "1")
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(report, "iris 2"))
    text = console.export_text()
    for word in ("golden rows", "serving now", "1 row, µs", "memory, MiB", "passed"):
        assert word in text


def test_the_gate_answers_a_process_with_many_descriptors() -> None:
    """A server with over a thousand connections can have a model examined."""
    raise_open_files()
    with contextlib.ExitStack() as files:
        for _ in range(1100):
            files.enter_context(open(os.devnull))
        with contextlib.closing(Gate()) as fresh:
            assert fresh.examine(MODELS / "iris" / "1").ok


@pytest.fixture
def patched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that the gate's process runs before anything else: how a test gets to act inside of it."""
    monkeypatch.syspath_prepend(str(tmp_path / "early"))
    (tmp_path / "early").mkdir()
    return tmp_path / "early" / "sitecustomize.py"


def begin(patched: Path, code: str) -> None:
    """Have the next gate run some code in each examination, before it looks at the model."""
    lines = "\n    ".join(code.splitlines())
    # The parent calls it too, to load the libraries, and not with a path.
    early = f"import os, onnx.checker\ndef check(what):\n    if type(what) is not str: return\n    {lines}\n"
    patched.write_text(f"{early}onnx.checker.check_model = check\n")


def act(patched: Path, code: str, limits: Limits | None = None) -> list[str]:
    """Have the examination of a good model run some code; return the reasons."""
    begin(patched, code)
    with Gate(limits) as examiner:
        return list(examiner.examine(IRIS / "1").reasons)


def test_a_model_that_aborts_takes_only_its_own_process_along(patched: Path) -> None:
    """A crash in native code is a reason like any other, and names what was being done."""
    (reason,) = act(patched, "os.abort()")
    assert reason == "it ended its process (SIGABRT) at: ONNX"


def test_a_model_sees_no_credentials_and_no_network(patched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside, there is no environment, no socket, no other program, and the lowest priority."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    code = """import socket, subprocess
got = [dict(os.environ), os.getpriority(os.PRIO_PROCESS, 0), sorted(map(int, os.listdir("/proc/self/fd")))[:3]]
for attempt in (socket.socket, lambda: subprocess.run(["/bin/true"])):
    try:
        attempt(); got.append("allowed")
    except PermissionError:
        got.append("refused")
raise ValueError(repr(got))"""
    (reason,) = act(patched, code)
    assert reason == "it can't be examined: [{}, 19, [0, 1, 2], 'refused', 'refused']"


@pytest.mark.parametrize("end", ["os.abort()", "__import__('time').sleep(600)"])
def test_a_trial_of_rows_that_ends_its_process_refuses_nothing(patched: Path, end: str) -> None:
    """Where nobody can tell whether rows are independent, the version passes, runs requests alone, and says so."""
    code = f"import serving.gate.checks as checks\nchecks.prove = lambda *given: {end}"
    begin(patched, code)
    with Gate(Limits(wall_s=8 if "sleep" in end else 120)) as examiner:
        report = examiner.examine(IRIS / "1")
    assert report.ok, report.reasons
    assert report.independence is not None
    assert not report.independence.proved
    assert report.checks[-1].outcome == "warned"
    assert "requests run alone" in report.checks[-1].detail


@pytest.mark.parametrize("same", [True, False])
def test_a_prepared_form_is_kept_only_where_its_answers_are_the_models(
    patched: Path, tmp_path: Path, same: bool
) -> None:
    """Where other answers come out of the prepared form, it is gone after the examination, and the model passes."""
    begin(patched, "pass" if same else "import serving.gate.checks as checks\nchecks._same = lambda *given: False")
    form = tmp_path / "form"
    form.mkdir()
    with Gate() as examiner:
        assert examiner.examine(IRIS / "1", prepare_in=form).ok
    assert (form / "model.onnx").exists() == same


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="the kernel does not group by session")
def test_the_gate_is_last_in_line_of_all_sessions(patched: Path) -> None:
    """Where the processor is shared out between sessions first, the gate counts least: live traffic goes first."""
    (reason,) = act(patched, 'raise ValueError(open("/proc/self/autogroup").read().split()[-1])')
    assert reason == "it can't be examined: 19"


def test_what_overstays_is_ended(patched: Path) -> None:
    """A model that sleeps uses no processor time, and is ended by the clock."""
    (reason,) = act(patched, "import time\ntime.sleep(600)", Limits(wall_s=4))
    assert reason == "it did not end within 4 s at: ONNX"


def test_a_server_that_ends_does_not_wait_for_the_gate(
    patched: Path, tmp_path: Path, eventually: Callable[..., None]
) -> None:
    """What is being examined is given up at once, and nothing is kept against it."""
    begin(patched, f"open({str(tmp_path / 'begun')!r}, 'w').close()\nimport time; time.sleep(600)")
    shutil.copytree(IRIS / "1", tmp_path / "models" / "iris" / "1")
    repository = Repository(tmp_path / "models", lambda name: Traffic())
    (found,) = repository.scan().found
    asked = GateClient(repository, state_dir=tmp_path / "state")
    with ThreadPoolExecutor(1) as aside:
        report = aside.submit(asked.examine, found, None)
        eventually((tmp_path / "begun").exists)
        asked.close()
        with pytest.raises(NotReady):
            report.result(20)
        with pytest.raises(NotReady, match="the server ends"):
            aside.submit(asked.examine, found, None).result(20)
    assert asked.known(found) is None


def test_an_answer_from_inside_is_not_believed_blindly() -> None:
    """What the process says is checked like everything from outside: no verdict without a sensible one."""
    found = manifest.of(IRIS / "1", Hashes())
    for said in (
        "{}",
        '{"signature": {"inputs": 1}}',
        '{"checks": [{"name": 1}]}',
        "{",
        '{"reasons": ["\\u001b[31m red"]}',
    ):
        report = judge(found, read(said.encode()), Findings(), at=0.0)
        assert not report.ok
        assert "\x1b" not in report.reasons[0]


def test_verdicts_are_kept_by_content_and_runtime(
    tmp_path: Path, examiner: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kept verdict is for these bytes and this onnxruntime; another, or a file that lies about it, is none."""
    report = examiner.examine(IRIS / "1")
    gate.keep(tmp_path, report)
    assert gate.verdict(tmp_path, report.content) == report
    assert gate.verdict(tmp_path, "0" * 64) is None
    place = tmp_path / "reports" / f"{report.content}.json"
    document = json.loads(place.read_text())
    (tmp_path / "reports" / f"{'0' * 64}.json").write_text(json.dumps(document))
    assert gate.verdict(tmp_path, "0" * 64) is None
    monkeypatch.setattr(gate, "runtime", lambda: "0.0")
    assert gate.verdict(tmp_path, report.content) is None


def test_what_breaks_callers_is_refused_only_beside_the_version_that_they_use(tmp_path: Path, examiner: Gate) -> None:
    """A refusal of that kind is not kept: another version may serve by then, or none."""
    report = examiner.examine(IRIS / "1", serving=MODELS / "diabetes" / "1")
    assert report.breaking
    assert not report.ok
    gate.keep(tmp_path, report)
    assert gate.verdict(tmp_path, report.content) is None
