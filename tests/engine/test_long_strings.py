"""Tensors of many strings are read, run, put together and let go of by the piece, and are what they are whole."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, save

from serving import tensor_bytes
from serving.engine import text_runs
from serving.engine.session import OnnxSession
from serving.errors import InvalidRequest
from serving.tensor_bytes import Filling, LongStrings, in_parts, read, write
from tests.conftest import MODELS

Wait = Callable[[Callable[[], bool]], None]
calm = settings(max_examples=200, deadline=None, derandomize=True)


class Text(str):
    """A string that tells when it goes."""

    __slots__ = ("__weakref__",)


def outcome(raw: bytes, shape: tuple[int, ...]) -> Any:
    try:
        array = read(memoryview(raw), "BYTES", shape, "at")
    except InvalidRequest as error:
        return error.message
    return array.shape, array.tolist()


@calm
@given(st.data())
def test_strings_by_the_piece_are_the_strings(data: st.DataObject) -> None:
    """A long tensor of strings, right or spoilt anywhere, is read, or refused to the letter, as a short one is."""
    rows, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    texts = data.draw(st.lists(st.text(max_size=9), min_size=rows * width, max_size=rows * width))
    raw = write(np.array(texts, object))
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, len(raw)))
        raw = raw[:at] + data.draw(st.binary(max_size=5)) + raw[at + data.draw(st.integers(0, 5)) :]
    whole = outcome(raw, (rows, width))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_bytes, "_LONG_BYTES", -1)
        patch.setattr(tensor_bytes, "MOST_STRINGS", data.draw(st.integers(1, 7)))
        patch.setattr(tensor_bytes, "_MOST_CHARACTERS", data.draw(st.integers(1, 20)))
        assert outcome(raw, (rows, width)) == whole
        if isinstance(whole, tuple):
            assert b"".join(in_parts(np.array(whole[1], object))) == raw


def _filled(texts: list[str], shape: tuple[int, ...]) -> LongStrings:
    filling = Filling(shape)
    filling.add(texts)
    return filling.array


def test_strings_live_as_long_as_the_last_view(eventually: Wait) -> None:
    """Each string stays while a row of the tensor, or of a batch that it was put into, is held, and goes after."""
    text = Text("x")
    last = weakref.ref(text)
    tensor = _filled([*map(str, range(19_999)), text], (2000, 10))
    del text
    batch = np.concatenate([tensor, np.array([["y"] * 10], object), tensor[5:]])
    assert batch.shape == (3996, 10)
    assert batch[1999, 9] == batch[-1, 9] == "x"
    assert batch[2000, 0] == "y"
    row = tensor[1999:].view(np.ndarray)
    del tensor
    gc.collect()
    assert row[0, 9] == "x"
    del row
    gc.collect()
    assert last() is not None
    del batch
    eventually(lambda: last() is None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write models of strings: rows that are apart, and an output whose shape depends on what it is."""
    made = tmp_path_factory.mktemp("texts")
    text, whole = TensorProto.STRING, TensorProto.INT64
    label = helper.make_node(
        "LabelEncoder", ["a"], ["n"], domain="ai.onnx.ml", keys_strings=["one", "two"], values_int64s=[1, 2]
    )
    same = helper.make_node("Identity", ["a"], ["b"])
    split = helper.make_node("StringSplit", ["a"], ["b", "n"], delimiter=" ")
    for name, nodes, shape, outputs in (
        ("apart", [label, same], ["r", "c"], {"b": (text, ["r", "c"]), "n": (whole, ["r", "c"])}),
        ("split", [split], ["r"], {"b": (text, ["r", "w"]), "n": (whole, ["r"])}),
    ):
        graph = helper.make_graph(
            nodes,
            name,
            [helper.make_tensor_value_info("a", text, shape)],
            [helper.make_tensor_value_info(port, kind, dims) for port, (kind, dims) in outputs.items()],
        )
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.onnx.ml", 2)]
        save(helper.make_model(graph, opset_imports=opsets, ir_version=9), made / f"{name}.onnx")
    return made


@pytest.mark.parametrize("most", [1, 3, 50])
@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("apart", [["one", "two", "é"], ["", "two", "x" * 99], ["a", "b", "one"], ["1", "2", "3"]]),
        ("split", ["one two", "three", "four five six", "seven"]),
    ],
)
def test_runs_by_the_piece_give_what_one_run_gives(
    folder: Path, monkeypatch: pytest.MonkeyPatch, most: int, name: str, texts: Any
) -> None:
    """A model gets and gives many strings some rows at a time, and the outputs are those of all rows together."""
    session = OnnxSession(folder / f"{name}.onnx", warm_rows=1, independent=True)
    given = np.array(texts, object)
    whole = session.run((given,))
    monkeypatch.setattr(text_runs, "MOST_STRINGS", most)
    long = session.run((_filled(given.ravel().tolist(), given.shape),))
    for one, other in zip(whole, long, strict=True):
        assert one.dtype == other.dtype
        assert one.tolist() == other.tolist()
    assert isinstance(long[0], LongStrings)


def test_classifiers_of_texts_answer_many_rows_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shipped model of texts gives each row of a long request what it gives the row alone."""
    session = OnnxSession(MODELS / "docs_topic" / "1" / "model.onnx", warm_rows=1, independent=True)
    (spec,) = session.signature.inputs
    texts = [f"{word} of an array" for word in ("sum", "plot", "frame", "classifier", "index")]
    shape = (5, *[1 for _ in spec.shape[1:]])
    monkeypatch.setattr(text_runs, "MOST_STRINGS", 2)
    found = session.run((_filled(texts, shape),))
    alone = [session.run((np.array([text], object).reshape(1, *shape[1:]),)) for text in texts]
    for index, output in enumerate(found):
        expected = np.concatenate([one[index] for one in alone])
        if output.dtype.hasobject:
            assert output.tolist() == expected.tolist()
        else:
            np.testing.assert_allclose(output, expected, rtol=1e-6)
