"""Two graphs become one file, and a pickle becomes five lines to write."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
from onnx import TensorProto, helper
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from typer.testing import CliRunner

from serving.command_line import app
from serving.export import CannotExport, compose, export
from tests.conftest import MODELS
from tests.export.test_export import HELD_OUT, TARGET, TRAIN, served

pytestmark = pytest.mark.filterwarnings("ignore")  # the converters' own deprecations are not ours to mend


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A scaler, and a classifier of what it makes."""
    folder = tmp_path_factory.mktemp("parts")
    scaler = StandardScaler().fit(TRAIN)
    scaled, unseen = (pd.DataFrame(scaler.transform(rows)).astype("float32") for rows in (TRAIN, HELD_OUT))
    model = LogisticRegression(max_iter=500).fit(scaled.to_numpy(), TARGET)
    names = ["setosa", "versicolor", "virginica"]
    (folder / "pre.onnx").write_bytes(export(scaler, train=TRAIN, held_out=HELD_OUT).content)
    made = export(model, train=scaled, held_out=unseen, classes=names, metrics={"accuracy": 0.9}, description="Species")
    (folder / "model.onnx").write_bytes(made.content)
    return folder / "pre.onnx", folder / "model.onnx"


def test_preprocessing_travels_with_its_model(parts: tuple[Path, Path], tmp_path: Path) -> None:
    """Callers send what the first graph takes by its names, and get what the second answers, with its class names."""
    exported = compose(*parts, joins={"transformed": "features"})
    assert [f.name for f in exported.signature.features] == list(TRAIN.columns)
    assert exported.signature.features[0].minimum == pytest.approx(TRAIN.iloc[:, 0].min())
    assert (exported.signature.metrics, exported.signature.description) == ({"accuracy": 0.9}, "Species")
    assert exported.signature.golden is not None
    row = {name: float(value) for name, value in HELD_OUT.iloc[60].items()}
    (got,) = served(exported, tmp_path, [row])
    scaler = StandardScaler().fit(TRAIN)
    model = LogisticRegression(max_iter=500).fit(scaler.transform(TRAIN), TARGET)
    expected = model.predict_proba(scaler.transform(HELD_OUT.iloc[[60]]))[0]
    assert got["label"] == ["setosa", "versicolor", "virginica"][int(expected.argmax())]
    assert list(got["probabilities"].values()) == pytest.approx(expected, abs=1e-4)


def test_the_command_writes_one_file(parts: tuple[Path, Path], tmp_path: Path) -> None:
    """`serving compose` joins by itself where there is one output and one input, and overwrites nothing."""
    to = tmp_path / "joined.onnx"
    arguments = ["compose", *map(str, parts), "--map", "transformed=features", "--to", str(to)]
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 0, ended.output
    assert "sepal length (cm)" in ended.output
    onnx.checker.check_model(str(to))
    before = to.read_bytes()
    assert CliRunner().invoke(app, arguments).exit_code == 2
    assert to.read_bytes() == before
    alone = CliRunner().invoke(app, ["compose", *map(str, parts), "--to", str(tmp_path / "alone.onnx")])
    assert alone.exit_code == 0, alone.output


def linear(path: Path, *, name: str, output: str, opset: int, second: str | None = None) -> Path:
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 2]) for n in (name, second) if n]
    nodes = [helper.make_node("Mul", [name, "by"], ["inner" if second else output])]
    nodes += [helper.make_node("Add", ["inner", second], [output])] if second else []
    answers = [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["n", 2])]
    weights = [onnx.numpy_helper.from_array(np.array([2.0, 3.0], dtype=np.float32), "by")]
    graph = helper.make_graph(nodes, "g", inputs, answers, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def test_files_of_other_opsets_and_names_join(tmp_path: Path) -> None:
    """Equal inner names do not meet, the older opset is raised, and inputs that nothing feeds are still asked for."""
    first = linear(tmp_path / "a.onnx", name="x", output="y", opset=11)
    then = linear(tmp_path / "b.onnx", name="z", output="sum", opset=17, second="bias")
    exported = compose(first, then, joins={"y": "z"})
    assert [f.name for f in exported.signature.features] == ["x", "bias"]
    assert served(exported, tmp_path / "models", [{"x": [1, 1], "bias": [10, 10]}]) == [[14.0, 19.0]]


def test_what_does_not_join_is_named(tmp_path: Path) -> None:
    """A name that is in neither file is refused with those that are."""
    first = linear(tmp_path / "a.onnx", name="x", output="y", opset=17)
    then = linear(tmp_path / "b.onnx", name="z", output="sum", opset=17, second="bias")
    with pytest.raises(CannotExport, match=r"output 'q': is not in the first file\. Instead: name one of y"):
        compose(first, then, joins={"q": "z"})
    with pytest.raises(CannotExport, match="no name in common: the first answers y, the second takes z, bias"):
        compose(first, then)
    then.write_bytes(then.read_bytes()[:-5])
    with pytest.raises(CannotExport, match="is not an ONNX file, or cut short"):
        compose(first, then)


@pytest.mark.parametrize("command", [["export"], ["publish", "--name", "fitted"]], ids=lambda c: c[0])
def test_a_pickle_is_refused_with_the_lines_to_write(command: list[str], tmp_path: Path) -> None:
    """A pickle is never opened, whatever its name is; what to write instead is shown."""
    marker = tmp_path / "opened"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return Path.touch, (marker,)

    for name in ("model.pkl", "model.onnx"):
        path = tmp_path / name
        path.write_bytes(pickle.dumps(Trap()))
        ended = CliRunner().invoke(app, [*command, str(path)])
        assert ended.exit_code == 2
        assert "exported = export(model, train=X_train, held_out=X_test)" in ended.output
        assert f'joblib.load("{name}")' in ended.output
    assert not marker.exists()


def test_graphs_that_do_not_fit_are_refused() -> None:
    """Graphs whose tensors do not fit are refused, and the text says so."""
    iris, digits = (MODELS / name / "1" / "model.onnx" for name in ("iris", "digits"))
    with pytest.raises(CannotExport, match="join"):
        compose(iris, digits, joins={"probabilities": "image"})
