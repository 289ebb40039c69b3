"""Lines of text read many at a time: each is to the last bit what V1 makes of it alone, good or bad."""

from __future__ import annotations

import io

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from serving.bulk import text as text_module
from serving.bulk.formats import reader
from serving.engine.signature import Feature
from serving.errors import ServingError
from serving.protocols import predict_v1
from tests.bulk.test_formats import described, found, read

GOOD = ["5.1", "0", "-0.0", "1e2", "1E+2", "7e-46", "0.1", "16777217", "9007199254740993", "3.4028235e38"]
DOUBTFUL = [
    *("1e39", "1e999", "123456789012345678901234567890", "01", "1.", ".5", "+1", "-", "NaN", "-Infinity", "nan", "0x1"),
    *("1_0", "true", "null", '"5.1"', "[1]", "{}", '"\\ud800"', "", "1 2", "1,2"),
]
SPACE = st.sampled_from(["", "", "", " ", "\t", "  "])


TEXT = st.sampled_from(['"Biscoe"', '"a: b, {c}"', '"\\u00e9"', '"é"', '""'])


@st.composite
def line(draw: st.DrawFn, features: tuple[Feature, ...]) -> bytes:
    """Make a line that is right, or of which something is wrong."""
    number = st.one_of(st.sampled_from(GOOD), st.floats(width=32, allow_nan=False, allow_infinity=False).map(repr))
    members = []
    for feature in draw(st.permutations(features)):
        value = TEXT if feature.datatype == "BYTES" else number
        members.append((feature.name, draw(value | st.just("null") if feature.nullable else value)))
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(members) - 1))
        name, value = members[at]
        more = [[], [(name, value)] * 2, [(name, value), ("height", "1")], [(name.replace("_", "\\u005f"), value)]]
        members[at : at + 1] = draw(st.sampled_from(more) | st.sampled_from(DOUBTFUL).map(lambda each: [(name, each)]))
    made = ",".join(f'{draw(SPACE)}"{name}":{draw(SPACE)}{value}' for name, value in members)
    return f"{{{made}{draw(SPACE)}}}{draw(SPACE)}".encode()


@pytest.mark.parametrize("name", ["iris", "penguins"])
def test_each_line_is_what_it_is_to_v1(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands around it."""
    monkeypatch.setattr(text_module, "_SINGLY", 0)
    codec = predict_v1.Codec(described(name))

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
    @given(st.lists(line(described(name).signature.features), min_size=1, max_size=20))
    def held(lines: list[bytes]) -> None:
        made = found(read("ndjson", b"\n".join(lines), name))
        assert made.keys() == {*range(1, len(lines) + 1)}
        for number, text in enumerate(lines, 1):
            try:
                expected = codec.decode([], b'{"instances":[%b]}' % text).inputs
            except ServingError:
                assert isinstance(made[number], str), text
            else:  # as text: NaN is not equal to itself, and minus zero is to zero
                assert repr(made[number]) == repr([array[0].tolist() for array in expected]), text

    held()


MORE = [" 5.1 ", '"5.1"', '"5"1', '"5""1"', '"5,1"', '" 7"', "NA", "NaN ", "inf", "-nan", "5e", "TRUE", "∞", "1e-400"]
CELLS = st.sampled_from([*GOOD, *DOUBTFUL, *MORE])


@pytest.mark.parametrize("name", ["iris", "penguins"])
def test_each_line_of_csv_is_what_it_is_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells that are read as columns have the values, or the errors, that they have one by one."""
    monkeypatch.setattr(text_module, "_SINGLY", 0)
    features = described(name).signature.features
    header = ",".join(feature.name for feature in features)
    good = ",".join("Biscoe" if feature.datatype == "BYTES" else "5.1" for feature in features).split(",")

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
    @example([(cell, 0) for cell in (*GOOD, *DOUBTFUL, *MORE)])
    @given(st.lists(st.tuples(CELLS, st.integers(0, len(features) - 1)), min_size=1, max_size=30))
    def held(changed: list[tuple[str, int]]) -> None:
        rows = [",".join([*good[:at], cell, *good[at + 1 :]]) for cell, at in changed]
        text = "\n".join([header, *rows]).encode()
        alone = reader("csv", io.BytesIO(text), described(name))
        alone.columns.at_once = False
        assert repr(sorted(found(read("csv", text, name)).items())) == repr(sorted(found(list(alone)).items()))

    held()
