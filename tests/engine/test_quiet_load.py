"""A version that is loaded beside others gives way to them while it loads, and not when it serves."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from serving.engine import runtime
from serving.engine.session import OnnxSession
from tests.conftest import MODELS


def threads() -> set[str]:
    return set(os.listdir("/proc/self/task"))


def wide(folder: Path) -> Path:
    """Write a model that is too large to be denied threads of its own."""
    weights = numpy_helper.from_array(np.ones((600, 600), np.float32), "weights")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weights"], ["y"])],
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 600])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 600])],
        [weights],
    )
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_only_loading_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    """The work of loading has the lowest priority; the threads that will serve keep that of the process."""
    lower = runtime.lowest_priority
    before, made, lowered = threads(), [], []

    def lowest_priority() -> None:
        made.append(threads() - before)
        lower()
        lowered.append(os.getpriority(os.PRIO_PROCESS, 0))

    monkeypatch.setattr(runtime, "lowest_priority", lowest_priority)
    loaded = OnnxSession(wide(tmp_path), threads=3, quiet=True)
    assert lowered == [19]
    assert len(made[0]) == 3  # the one that loads, and two that onnxruntime made beside it
    eventually(lambda: len(threads() - before) == 2)  # a thread is there a moment longer than its end
    staying = threads() - before
    assert {os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in staying} == {
        os.getpriority(os.PRIO_PROCESS, os.getpid())
    }
    assert loaded.run(loaded.sample(2))


def test_a_first_load_does_not_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing serves yet when a process loads what it starts with: it takes all the processor that it can have."""
    monkeypatch.setattr(runtime, "lowest_priority", lambda: pytest.fail("it was put behind"))
    OnnxSession(MODELS / "iris" / "2" / "model.onnx", threads=2)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such policies")
def test_who_gives_way_leaves_nothing_to_those_it_makes() -> None:
    """A thread that gives way interrupts nobody, and the thread on which a version is loaded beside it is as usual."""
    # In a process of its own: what gives way here would do so for all tests behind.
    code = """
import os, threading
from serving.linux.thread_scheduling import give_way, thread_aside
policies = []
def give():
    give_way()
    policies.append(os.sched_getscheduler(0))
    with thread_aside() as aside:
        policies.append(aside(os.sched_getscheduler, 0))
thread = threading.Thread(target=give)
thread.start()
thread.join()
assert policies == [os.SCHED_BATCH, os.SCHED_OTHER], policies
assert os.sched_getscheduler(0) == os.SCHED_OTHER
"""
    subprocess.run([sys.executable, "-c", code], check=True)
