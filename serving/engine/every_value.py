"""Runs a graph with all its values as outputs, unoptimised: what its rules are checked against (`batch_graph`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from serving.engine import runtime
from serving.engine.batch_graph import Observed, without_rows
from serving.tensors import Array


class EveryValue:
    """One graph, loaded for that. folder: where its external data is. Raises what onnxruntime raises."""

    def __init__(self, model: onnx.ModelProto, folder: Path) -> None:
        self._kept = without_rows(model.graph)
        seen = onnx.ModelProto()
        seen.CopyFrom(model)
        there = {port.name for port in seen.graph.output}
        made = dict.fromkeys(name for node in seen.graph.node for name in node.output if name)
        seen.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made if name not in there)
        options = runtime.options(1)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        self._session = ort.InferenceSession(seen.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self._names = [port.name for port in self._session.get_outputs()]

    def run(self, feeds: dict[str, Array], rows: int) -> Observed:
        """Run it once, and note what came out everywhere."""
        shapes: dict[str, tuple[int, ...]] = {name: array.shape for name, array in feeds.items()}
        arrays: dict[str, Array] = {}
        values: Sequence[object] = self._session.run(None, feeds)
        for name, value in zip(self._names, values, strict=True):
            if isinstance(value, np.ndarray):
                shapes[name] = value.shape
                if name in self._kept:
                    arrays[name] = value
            else:
                shapes[name] = (len(value) if isinstance(value, list) else 0,)
        return Observed(rows, shapes, arrays)
