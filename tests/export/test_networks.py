"""Networks of PyTorch and Keras are exported as fitted models are: by their real exporters, where these are there."""

from __future__ import annotations

import contextlib
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest

from serving.export import CannotExport, export
from tests.export.test_export import served

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporters' own deprecations are not ours to mend

TABLE = pd.DataFrame(np.random.default_rng(0).normal(size=(40, 4)).astype("float32"), columns=["a", "b", "c", "d"])
ROWS = [{"a": 0.5, "b": -1.0, "c": 0.25, "d": 2.0}]


class Weights:
    """As much of a tensor as `networks` asks for."""

    def is_floating_point(self) -> bool:
        return True


class Tensor(np.ndarray[Any, Any]):
    def cpu(self) -> Tensor:
        return self

    def to(self, other: object) -> Tensor:
        return self


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """PyTorch, or a stand-in for what is asked of it: two linear layers whose exporter writes a Gemm."""
    try:
        import torch as real  # type: ignore[import-not-found,unused-ignore]
    except ModuleNotFoundError:
        pass
    else:
        pytest.importorskip("onnxscript")
        return real
    fake: Any = types.ModuleType("torch")

    class Module:
        training = True

        def train(self, on: bool) -> None:
            self.training = on

        def eval(self) -> None:
            self.training = False

        def parameters(self) -> list[Weights]:
            return [Weights()]

    Module.__module__, Module.__qualname__ = "torch.nn.modules.module", "Module"

    class Linear(Module):
        def __init__(self, width: int, outputs: int) -> None:
            self.weights = np.random.default_rng(1).normal(size=(width, outputs)).astype("float32")

        def __call__(self, rows: Any) -> Any:
            return (np.asarray(rows) @ self.weights).view(Tensor)

    def write(model: Any, examples: Any, path: str, **options: Any) -> None:
        assert not model.training
        width, outputs = model.weights.shape
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("Gemm", ["features", "w"], ["linear_1"])],
            "main_graph",
            [onnx.helper.make_tensor_value_info("features", onnx.TensorProto.FLOAT, ["batch", width])],
            [onnx.helper.make_tensor_value_info("linear_1", onnx.TensorProto.FLOAT, ["batch", outputs])],
            [onnx.numpy_helper.from_array(model.weights, "w")],
        )
        onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9), path)

    fake.nn = types.SimpleNamespace(Linear=Linear)
    fake.onnx = types.SimpleNamespace(export=write)
    fake.export = types.SimpleNamespace(Dim=str)
    fake.Tensor = Tensor
    fake.zeros = np.zeros
    fake.from_numpy = lambda rows: rows.view(Tensor)
    fake.no_grad = contextlib.nullcontext
    monkeypatch.setitem(sys.modules, "torch", fake)
    monkeypatch.setitem(sys.modules, "onnxscript", types.ModuleType("onnxscript"))
    return fake


def test_a_network_of_pytorch_is_served_by_feature_name(torch: Any, tmp_path: Path) -> None:
    """A regressor is compared with the network itself, answers as it does, and is left in training as it was."""
    net = torch.nn.Linear(4, 1)
    exported = export(net, train=TABLE, held_out=TABLE)
    assert net.training
    assert exported.signature.parity is not None
    (got,) = served(exported, tmp_path, ROWS)
    rows = np.array([list(ROWS[0].values())], dtype="float32")
    expected = np.asarray(net(torch.from_numpy(rows)).tolist())[0]
    assert np.ravel(got) == pytest.approx(expected, abs=1e-5)


def test_scores_of_a_network_get_a_label(torch: Any, tmp_path: Path) -> None:
    """With `classes` the class of the highest score is the label, by its name."""
    net = torch.nn.Linear(4, 3)
    exported = export(net, train=TABLE, held_out=TABLE, classes=["red", "green", "blue"])
    rows = np.array([list(ROWS[0].values())], dtype="float32")
    best = int(np.asarray(net(torch.from_numpy(rows)).tolist())[0].argmax())
    (got,) = served(exported, tmp_path, ROWS)
    assert got["label"] == ["red", "green", "blue"][best]
    assert exported.signature.task == "classification"
    with pytest.raises(CannotExport, match="does not answer with one score for each"):
        export(net, train=TABLE, held_out=TABLE, classes=["red", "green"])


def test_what_the_exporter_of_a_network_says_is_told(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the network's own exporter fails its text is shown, and what to do instead; texts are refused."""

    def fails(*given: Any, **more: Any) -> None:
        raise RuntimeError("no operator for aten::strange")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(CannotExport, match=r"aten::strange.*Instead: write it with torch\.onnx\.export"):
        export(torch.nn.Linear(4, 1), train=TABLE, held_out=TABLE)
    words = pd.DataFrame({"text": ["a", "b"]})
    with pytest.raises(CannotExport, match="a column holds texts"):
        export(torch.nn.Linear(4, 1), train=words, held_out=words)


def test_an_image_network_of_pytorch_keeps_its_shape(tmp_path: Path) -> None:
    """A convolution with dropout and batch normalisation is exported as it answers, for any number of rows."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3),
        torch.nn.BatchNorm2d(2),
        torch.nn.ReLU(),
        torch.nn.Dropout(),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 3),
    )
    table = pd.DataFrame(np.random.default_rng(0).uniform(size=(20, 16)).astype("float32"))
    exported = export(net, train=table, held_out=table, image=("image", (1, 4, 4)), classes=["x", "y", "z"])
    assert exported.signature.features[0].shape == (1, 4, 4)
    image = table.iloc[3].to_numpy().reshape(1, 4, 4)
    one, two = served(exported, tmp_path, [{"image": image.tolist()}] * 2)
    assert one == two
    scores = net.eval()(torch.from_numpy(image[None])).detach().numpy()[0]
    assert list(one["scores"].values()) == pytest.approx(scores, abs=1e-4)


def test_a_network_of_keras_is_served(tmp_path: Path) -> None:
    """A model of Keras is exported through tf2onnx, and answers as it does."""
    keras = pytest.importorskip("keras")
    pytest.importorskip("tf2onnx")
    net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(1)])
    exported = export(net, train=TABLE, held_out=TABLE)
    (got,) = served(exported, tmp_path, ROWS)
    rows = np.array([list(ROWS[0].values())], dtype="float32")
    assert np.ravel(got) == pytest.approx(np.ravel(net.predict(rows, verbose=0)), abs=1e-4)
