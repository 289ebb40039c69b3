"""Rows of many strings run some at a time; nobody can tell from the answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, save

from serving.engine import session
from serving.engine.session import OnnxSession


@pytest.mark.parametrize("rows", [1, 3, 7, 64])
def test_rows_of_many_strings_are_answered_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Each row's answer is its own, whether its strings run with all others or with a few."""
    ports = [("texts", TensorProto.STRING, ["rows", 5]), ("numbers", TensorProto.FLOAT, ["rows"])]
    nodes = [helper.make_node("Identity", [name], [f"same_{name}"]) for name, _, _ in ports]
    graph = helper.make_graph(
        nodes,
        "same",
        [helper.make_tensor_value_info(*port) for port in ports],
        [helper.make_tensor_value_info(f"same_{name}", kind, shape) for name, kind, shape in ports],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), tmp_path / "model.onnx")
    model = OnnxSession(tmp_path / "model.onnx", warm_rows=1)
    inputs = (
        np.array([[f"{row} {column}" for column in range(5)] for row in range(rows)], object),
        np.arange(rows, dtype=np.float32),
    )
    sizes: list[int] = []
    run = session._run_arrays
    monkeypatch.setattr(session, "_MOST_STRINGS", 12)
    monkeypatch.setattr(session, "_run_arrays", lambda s, f, o: sizes.append(f["texts"].size) or run(s, f, o))
    texts, numbers = model.run(inputs)
    assert texts.tolist() == inputs[0].tolist()
    assert numbers.tolist() == inputs[1].tolist()
    assert max(sizes) <= 12
    assert sum(sizes) == 5 * rows
