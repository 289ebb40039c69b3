"""Models with operators of onnxruntime-extensions: texts and images go in as they are, where that is allowed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import onnx
import pytest
from fastapi.testclient import TestClient
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from serving.command_line import app
from serving.engine import runtime
from serving.gate import checks
from serving.gate.findings import Limits, Task
from serving.http_api.app import create_app
from serving.settings import Settings

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "morning", "night", "moon"]
VECTORS = np.random.default_rng(0).normal(size=(len(WORDS), 6)).astype("float32")


def embedding(at: Path) -> Path:
    """A sentence embedding: the mean of its words' vectors, behind a tokenizer inside the graph."""
    tokenizer = helper.make_node(
        "BertTokenizer",
        ["text"],
        ["ids", "types", "mask"],
        domain="ai.onnx.contrib",
        vocab_file="\n".join(WORDS),
        do_lower_case=1,
    )
    graph = helper.make_graph(
        [
            tokenizer,
            helper.make_node("Gather", ["words", "ids"], ["vectors"]),
            helper.make_node("ReduceMean", ["vectors"], ["embedding"], axes=[0], keepdims=1),
        ],
        "sentence",
        [helper.make_tensor_value_info("text", TensorProto.STRING, [1])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [1, 6])],
        [numpy_helper.from_array(VECTORS, "words")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.contrib", 1)]
    at.parent.mkdir(parents=True)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), at)
    return at


def expected(*words: str) -> Any:
    return VECTORS[[WORDS.index(word) for word in ("[CLS]", *words, "[SEP]")]].mean(axis=0)


def test_strings_in_vectors_out(tmp_path: Path) -> None:
    """A sentence embedding is served where its operators are allowed: each text gets its own vector."""
    embedding(tmp_path / "sentence" / "1" / "model.onnx")
    with TestClient(create_app(Settings(models=tmp_path, strict=True, extension_ops=True))) as client:
        body = {"instances": ["Good morning", "moon", "good NIGHT moon"]}
        answer = client.post("/v1/models/sentence:predict", json=body)
        assert answer.status_code == 200, answer.text
        wanted = [expected("good", "morning"), expected("moon"), expected("good", "night", "moon")]
        np.testing.assert_allclose(answer.json()["predictions"], wanted, rtol=1e-5)
        tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["moon"]}
        said = client.post("/v2/models/sentence/infer", json={"inputs": [tensor]}).json()
        np.testing.assert_allclose(said["outputs"][0]["data"], expected("moon"), rtol=1e-5)


def test_a_picture_in_its_colours_out(tmp_path: Path) -> None:
    """A file's bytes go in as UINT8, and are decoded in the graph."""
    graph = helper.make_graph(
        [
            helper.make_node("DecodeImage", ["file"], ["pixels"], domain="com.microsoft.extensions"),
            helper.make_node("Cast", ["pixels"], ["numbers"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["numbers"], ["colour"], axes=[0, 1], keepdims=0),
        ],
        "picture",
        [helper.make_tensor_value_info("file", TensorProto.UINT8, ["bytes"])],
        [helper.make_tensor_value_info("colour", TensorProto.FLOAT, [3])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft.extensions", 1)]
    (tmp_path / "picture" / "1").mkdir(parents=True)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "picture" / "1" / "model.onnx")
    pixels = np.full((8, 6, 3), (200, 100, 0), np.uint8)
    file = io.BytesIO()
    matplotlib.image.imsave(file, pixels, format="png")
    with TestClient(create_app(Settings(models=tmp_path, strict=True, extension_ops=True))) as client:
        sent = {"name": "file", "datatype": "UINT8", "shape": [len(file.getvalue())], "data": list(file.getvalue())}
        answer = client.post("/v2/models/picture/infer", json={"inputs": [sent]})
        assert answer.json()["outputs"][0]["data"] == [0, 100, 200]  # blue, green, red


def test_it_is_for_each_server_to_allow(tmp_path: Path) -> None:
    """Off by default: what another server has allowed, or has refused, says nothing to this one."""
    path = embedding(tmp_path / "sentence" / "1" / "model.onnx")
    for allowed in (True, False, True):
        with TestClient(create_app(Settings(models=tmp_path, extension_ops=allowed))) as client:
            assert client.get("/v2/models/sentence/ready").status_code == (200 if allowed else 503)
    refused = CliRunner().invoke(app, ["check", str(path)])
    assert refused.exit_code == 1
    assert "not allowed here (ai.onnx.contrib::BertTokenizer): allow them with --extension-ops" in " ".join(
        refused.output.split()
    )
    assert CliRunner().invoke(app, ["check", str(path), "--extension-ops"]).exit_code == 0


def test_the_gate_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package a model is refused with the command that brings it; nothing of it is loaded."""
    folder = embedding(tmp_path / "version" / "model.onnx").parent
    monkeypatch.setattr(checks, "extensions_library", lambda: None)
    task = Task(folder=folder, size=2**20, limits=Limits(extension_ops=True))
    found = checks.Examination(task, lambda said: None).run()
    (reason,) = found.reasons
    assert "BertTokenizer" in reason
    assert "pip install onnxruntime-extensions" in reason


def test_the_library_is_found_without_importing_the_package() -> None:
    """A worker that has no such model imports nothing of it."""
    assert runtime.extensions_library() is not None
