"""Rows read in bulk and answers written, format by format; what V1 says of a row alone is what is said of it here."""

from __future__ import annotations

import functools
import io
import json
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from serving.bulk import answers as written
from serving.bulk.batch import BEGIN, Batch, Position, gathered
from serving.bulk.formats import answer_form, reader
from serving.engine.session import OnnxSession
from serving.engine.signature import Described
from serving.errors import InvalidRequest, ServingError, SignatureMismatch
from serving.protocols import predict_v1
from tests.conftest import MODELS


@functools.cache
def session(name: str) -> OnnxSession:
    return OnnxSession(MODELS / name / "1" / "model.onnx")


def described(name: str) -> Described:
    return Described(name, "1", session(name).signature)


def read(kind: Any, data: bytes, name: str = "iris", start: Position = BEGIN) -> list[Batch]:
    return list(reader(kind, io.BytesIO(data), described(name), start))


def found(batches: list[Batch]) -> dict[int, Any]:
    """By line: the feeds of a good row as lists, or what is wrong with a bad one."""
    made: dict[int, Any] = {}
    for batch in batches:
        for index, line in enumerate(batch.lines.tolist()):
            made[line] = [array[index].tolist() for array in batch.inputs or ()]
        made |= {bad.line: f"{bad.path}: {bad.message}" for bad in batch.bad}
    return made


def by_v1(name: str, row: Any) -> list[Any]:
    decoded = predict_v1.Codec(described(name)).decode([], json.dumps({"instances": [row]}).encode())
    return [array[0].tolist() for array in decoded.inputs]


def ndjson(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


IRIS = {"sepal_length": 5.1, "sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2}
PENGUIN = session("penguins").signature.example or {}
HEADER = ",".join(IRIS)


@pytest.mark.parametrize("kind", ["ndjson", "csv", "arrow", "parquet"])
@pytest.mark.parametrize("name", ["iris", "penguins", "docs_topic", "diabetes", "breast_cancer"])
def test_rows_are_what_they_are_to_v1(kind: str, name: str) -> None:
    """Each format gives the feeds that V1 makes of the same row, missing values and the order of columns and all."""
    features = session(name).signature.features
    rows = []
    for index in range(20):
        row = dict(session(name).signature.example or {})
        for feature in features:
            if feature.datatype == "FP32":
                row[feature.name] = round(row[feature.name] * (1 + index / 7), 6)
            if feature.nullable and index % 3 == 0:
                row[feature.name] = None
            elif feature.datatype == "BYTES":
                row[feature.name] += ', "é": \n' if index % 2 else ""
        rows.append(dict(reversed(row.items())))
    frame = pd.DataFrame(rows)
    sink = io.BytesIO()
    if kind == "ndjson":
        sink.write(ndjson(rows))
    elif kind == "csv":
        frame.to_csv(sink, index=False)
    elif kind == "parquet":
        frame.to_parquet(sink)
    else:
        table = pa.Table.from_pandas(frame)
        with ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table, max_chunksize=7)
    batches = read(kind, sink.getvalue(), name)
    expected = [by_v1(name, {k: "" if v is None and k in ("sex", "island") else v for k, v in r.items()}) for r in rows]
    assert repr(list(found(batches).values())) == repr(expected)  # NaN is not equal to itself
    assert not any(batch.bad for batch in batches)


BAD = [
    IRIS | {"sepal_length": "5.1"},
    IRIS | {"sepal_length": True},
    IRIS | {"sepal_length": None, "petal_width": [1]},
    {k: v for k, v in IRIS.items() if k != "sepal_width"},
    IRIS | {"height": 1},
    IRIS | {"sepal_length": 1e39},
    [1, 2, 3],
    7,
]


@pytest.mark.parametrize("among", [0, 40])
def test_a_bad_line_says_what_v1_says(among: int) -> None:
    """Each bad row has its line, a pointer to the cell and V1's words, alone or among good ones, which are answered."""
    rows: list[Any] = []
    for bad in BAD:
        rows += [IRIS] * among + [bad]
    made = found(read("ndjson", ndjson(rows)))
    for line, row in enumerate(rows, 1):
        if row == IRIS:
            assert made[line] == by_v1("iris", IRIS)
        else:
            with pytest.raises(ServingError) as error:
                by_v1("iris", row)
            details = error.value.details
            place = details[0].path.removeprefix("/instances/0")
            assert made[line].startswith(f"{place}: {details[0].message}")
            assert all(detail.message in made[line] for detail in details)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"sepal_length": 5.1', "is not JSON"),
        (json.dumps(IRIS).encode() + json.dumps(IRIS).encode(), "extra data"),
        (json.dumps(IRIS).encode().replace(b"5.1", b"NaN"), "NaN is not JSON"),
        (json.dumps(IRIS).encode().replace(b"5.1", b'5.1, "sepal_length": 5.1'), "occurs twice"),
        (json.dumps(IRIS).encode().replace(b"5.1", b"1e999"), "too large"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"1],[1", "is not JSON"),
    ],
)
def test_what_is_no_json_is_a_bad_row(line: bytes, said: str) -> None:
    """A line that is no JSON, or could be read in two ways, is bad; the lines around it are answered."""
    good = json.dumps(IRIS).encode()
    made = found(read("ndjson", b"\n".join([good] * 20 + [line] + [good] * 20)))
    assert said in made.pop(21)
    assert made.keys() == {*range(1, 21), *range(22, 42)}
    assert all(value == by_v1("iris", IRIS) for value in made.values())


def test_a_missing_value_is_null_and_nothing_else() -> None:
    """Where a value may be missing, a key that is not there, or NaN, is no null: as V1 has it."""
    good = json.dumps(PENGUIN | {"bill_length_mm": None}).encode()
    without = json.dumps({name: value for name, value in PENGUIN.items() if name != "bill_length_mm"}).encode()
    lines = [good] * 20 + [without] + [good] * 20 + [good.replace(b"null", b"NaN")] + [good] * 20
    made = found(read("ndjson", b"\n".join(lines), "penguins"))
    assert made.pop(21) == "/bill_length_mm: is missing"
    assert "NaN is not JSON" in made.pop(42)
    assert {repr(value) for value in made.values()} == {repr(by_v1("penguins", json.loads(good)))}


def test_lines_that_make_rows_together_are_not_taken_for_rows() -> None:
    """As many rows as lines is not enough: each line must be a row of its own."""
    good = json.dumps(IRIS)
    text = f'{good}{good}\n{good[:-1]}\n, "height": 3}}\n{good}\n'.encode()
    made = found(read("ndjson", text))
    assert made[4] == by_v1("iris", IRIS)
    assert all(isinstance(made[line], str) for line in (1, 2, 3))
    positions = b"[1,2,3,4],[5\n,6,7,8]\n[1,2,3,4]\n"
    made = found(read("ndjson", positions))
    assert made[3] == [[1, 2, 3, 4]]
    assert all(isinstance(made[line], str) for line in (1, 2))


def test_rows_by_position_and_values_of_the_only_feature() -> None:
    """NDJSON takes what V1 takes for an instance."""
    assert found(read("ndjson", ndjson([[5.1, 3.5, 1.4, 0.2]] * 3)))[3] == by_v1("iris", IRIS)
    assert found(read("ndjson", ndjson(["some text", "other text"]), "docs_topic"))[2] == by_v1(
        "docs_topic", "other text"
    )
    image = np.arange(64.0).reshape(8, 8)
    assert found(read("ndjson", ndjson([{"image": image.tolist()}] * 30), "digits"))[30] == [image.tolist()]
    ragged = {"image": [*image.tolist()[:7], [1.0]]}
    assert "/image/7: has 1 values" in found(read("ndjson", ndjson([ragged]), "digits"))[1]


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("sepal_length,sepal_width,petal_length", "/petal_width: is missing"),
        (HEADER + ",petal_with", "/petal_with: is not a feature of this model"),
        (HEADER + ",petal_width", "/petal_width: occurs twice"),
        (HEADER.replace(",", ";"), "write commas between columns"),
        ("5.1,3.5,1.4,0.2", "is missing"),
    ],
)
def test_wrong_headers_are_refused_before_any_row(header: str, said: str) -> None:
    """Columns that are missing, strange or there twice are named at once."""
    with pytest.raises(SignatureMismatch, match=said):
        read("csv", f"{header}\n1,2,3,4\n".encode())


def test_cells_of_csv_are_read_by_the_signature() -> None:
    """BOM, CRLF, quotes, blank lines and line breaks inside of fields are CSV; a bad cell has its line and its name."""
    text = (
        "\ufeff" + HEADER + '\r\n5.1,3.5,1.4,0.2\r\n\r\n"5.1", 3.5 ,14e-1,.2\r\n5.1,3.5,x,\r\n5.1,3.5\r\n'
        '5.1,3.5,inf,0x1\r\n1_0,3.5,1.4,"0.\r\n2"\r\n5.1,3.5,1.4,0.2'
    )
    made = found(read("csv", text.encode()))
    assert made[2] == made[4] == made[10] == by_v1("iris", IRIS)
    assert (
        made[5] == "/petal_length: should be a number, and is a string; /petal_width: should be a number, and is null"
    )
    assert made[6] == ": has 2 cells, and the header has 4"
    assert made[7].startswith(
        "/petal_length: should be a finite number; /petal_width: should be a number, and is a str"
    )
    assert made[8].startswith("/sepal_length: should be a number")
    assert len(made) == 7


def test_a_quote_that_is_never_closed_costs_its_own_line() -> None:
    """The lines behind it are answered."""
    made = found(read("csv", f'{HEADER}\n1,2,3,4\n1,"2,3,4\n1,2,3,4\n'.encode()))
    assert "opens a quote that is not closed" in made[3]
    assert made[2] == made[4] == [[1, 2, 3, 4]]


def test_a_bare_carriage_return_ends_no_line() -> None:
    """Two rows that it parts are no row, and those behind keep their lines: nothing is left out or counted twice."""
    row = "5.1,3.5,1.4,0.2"
    made = found(read("csv", f"{HEADER}\r\n{row}\r{row}\n\n{row}\n".encode()))
    assert "a carriage return is no end of a line" in made.pop(2)
    assert made == {4: by_v1("iris", IRIS)}
    with pytest.raises(InvalidRequest, match="a carriage return is no end of a line"):
        read("csv", f"{HEADER}\r{row}\r".encode())
    text = ndjson([IRIS])[:-1]
    made = found(read("ndjson", b"\n".join([text + b"\r" + text, text, b"5", text, b""])))
    assert [line for line, value in made.items() if value == by_v1("iris", IRIS)] == [2, 4]
    assert sorted(made) == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["csv", "ndjson"])
def test_other_encodings_are_named(kind: str) -> None:
    """UTF-16 is refused with what to do."""
    for coding in ("utf-16", "utf-16-be", "utf-32"):
        with pytest.raises(InvalidRequest, match="send it as UTF-8"):
            read(kind, f"{HEADER}\n1,2,3,4\n".encode(coding))
    with pytest.raises(InvalidRequest, match="send it as UTF-8"):
        read(kind, "\u540d\u524d\u540d\u524d".encode("utf-16"))


def arrow(table: Any, **options: Any) -> bytes:
    sink = io.BytesIO()
    with ipc.new_stream(sink, table.schema, options=ipc.IpcWriteOptions(**options)) as stream:
        stream.write_table(table)
    return sink.getvalue()


def columns(**changed: Any) -> Any:
    return pa.table({name: [value] * 10 for name, value in IRIS.items()} | changed)


def test_bad_cells_of_tables_are_bad_rows() -> None:
    """NaN, null, infinity and what is too large are found among good ones, by row."""
    values = [5.1, None, 5.1, float("nan"), float("inf"), 1e39, 5.1, 5.1, 5.1, 5.1]
    decimals = pa.array(IRIS["petal_width"] for _ in range(10)).cast(pa.decimal128(5, 1))
    for kind, data in [
        ("arrow", arrow(columns(sepal_length=values, petal_width=decimals))),
        ("parquet", as_parquet(columns(sepal_length=values, petal_width=decimals))),
    ]:
        made = found(read(kind, data))
        assert made[2] == made[4] == "/sepal_length: should be a number, and is null"
        assert made[5] == "/sepal_length: should be a finite number"
        assert made[6] == "/sepal_length: is too large for FP32, which the model takes"
        assert [line for line, value in made.items() if value == by_v1("iris", IRIS)] == [1, 3, 7, 8, 9, 10]


def as_parquet(table: Any) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(table, sink)
    return sink.getvalue()


@pytest.mark.parametrize("write", [arrow, as_parquet])
def test_columns_of_another_type_are_named(write: Any) -> None:
    """Strings are no numbers, and it is said before any row is read; numbers of any kind are."""
    kind = "arrow" if write is arrow else "parquet"
    with pytest.raises(SignatureMismatch, match="/sepal_length: is a column of string, and should be of numbers"):
        read(kind, write(columns(sepal_length=["5.1"] * 10)))
    with pytest.raises(SignatureMismatch, match="/sepal_width: is missing"):
        read(kind, write(columns().drop_columns("sepal_width")))
    with pytest.raises(SignatureMismatch, match="/x: is not a feature"):
        read(kind, write(columns(x=[1] * 10)))
    whole = columns(sepal_length=pa.array([5] * 10, pa.int8()), petal_width=pa.array([0.25] * 10, pa.float32()))
    assert found(read(kind, write(whole)))[1] == by_v1("iris", IRIS | {"sepal_length": 5, "petal_width": 0.25})


class Trickle(io.BytesIO):
    """Gives a few bytes at a time, as a pipe may."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(size or 0, 100))


@pytest.mark.parametrize("kind", ["csv", "ndjson", "arrow"])
def test_rows_may_come_in_any_pieces(kind: Any) -> None:
    """However few bytes are there at a time, the rows are the same."""
    text = {"csv": columns().to_pandas().to_csv(index=False).encode(), "ndjson": ndjson([IRIS] * 10)}
    data = text.get(kind) or arrow(columns())
    assert found(list(reader(kind, Trickle(data), described("iris")))) == found(read(kind, data))


def test_rows_of_different_shapes_do_not_make_one_feed() -> None:
    """They are batches of their own, in order."""
    rows = [((np.zeros((1, size)),), np.array([line], np.int64)) for line, size in enumerate([2, 2, 3, 2], 1)]
    assert [batch.lines.tolist() for batch in gathered(rows, at_once=True)] == [[1, 2], [3], [4]]
    assert [batch.rows for batch in gathered(rows[:2], at_once=False)] == [1, 1]


def test_text_may_be_a_dictionary() -> None:
    """Categories of pandas are strings."""
    table = pa.Table.from_pandas(pd.DataFrame([PENGUIN] * 3).astype({"island": "category"}))
    assert found(read("arrow", arrow(table), "penguins"))[3] == by_v1("penguins", PENGUIN)


@pytest.mark.parametrize(
    ("kind", "data", "said"),
    [
        ("parquet", b"PAR1 or not", "the Parquet file can't be read"),
        ("parquet", as_parquet(columns())[:-100], "the Parquet file can't be read"),
        ("parquet", b"", "the Parquet file can't be read"),
        ("arrow", b"", "the Arrow stream can't be read"),
        ("arrow", b"hello, this is no stream", "an Arrow message has 1819043176 bytes"),
        ("arrow", arrow(columns())[:-300], "the Arrow stream can't be read"),
        ("arrow", arrow(columns(), compression="zstd"), "compressed buffers"),
        ("arrow", arrow(pa.table({name: np.zeros(1_100_000) for name in IRIS})), "send smaller record batches"),
    ],
)
def test_what_is_no_table_is_refused(kind: str, data: bytes, said: str) -> None:
    """Truncated, of another format, or such that a message could take any amount of memory."""
    with pytest.raises(InvalidRequest, match=said):
        read(kind, data)


@pytest.mark.parametrize("said", ["x", "[" * 100_000, "[]", '{"index_columns": 3}', '{"index_columns": null}'])
def test_what_a_table_says_of_pandas_may_be_anything(said: str) -> None:
    """It only names columns that are left out, and nobody has to believe it."""
    table = pa.Table.from_pylist([IRIS]).replace_schema_metadata({"pandas": said})
    assert found(read("arrow", arrow(table))) == {1: by_v1("iris", IRIS)}


def test_a_text_that_a_parquet_lacks_is_named() -> None:
    """As any other column that is missing."""
    with pytest.raises(SignatureMismatch, match="/island: is missing"):
        read("parquet", as_parquet(pa.Table.from_pylist([PENGUIN]).drop_columns(["island"])), "penguins")


@pytest.mark.parametrize("kind", ["csv", "ndjson", "arrow", "parquet"])
def test_reading_goes_on_where_a_piece_ended(kind: Any) -> None:
    """From each piece's end, what is read is the rest: no row twice, none missing."""
    count = 120_000
    table = columns().slice(0, 1).take(pa.array(np.zeros(count, int)))
    sink = io.BytesIO()
    if kind == "csv":
        table.to_pandas().to_csv(sink, index=False)
    elif kind == "ndjson":
        sink.write(ndjson([IRIS]) * count)
    elif kind == "parquet":
        parquet.write_table(table, sink, row_group_size=50_000)
    else:
        with ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table, max_chunksize=50_000)
    reading = reader(kind, io.BytesIO(sink.getvalue()), described("iris"))
    whole = [(piece, [batch for batch in reading.read(piece) if batch.rows]) for piece in reading.pieces()]
    assert len(whole) > 1
    for index, (piece, (batch,)) in enumerate(whole[:-1]):
        rest = read(kind, sink.getvalue(), start=piece.end)
        assert sum(batch.rows for batch in rest) == sum(batch.rows for _, (batch,) in whole[index + 1 :])
        assert rest[0].lines[0] == batch.lines[-1] + 1


def answers(kind: Any, name: str, rows: list[Any]) -> bytes:
    form = answer_form(kind, described(name))
    made = form.head()
    good = bad = 0
    for batch in read("ndjson", ndjson(rows), name):
        outputs = None if batch.inputs is None else session(name).run(batch.inputs)
        made += form.written(outputs, batch.lines, batch.bad)
        good, bad = good + batch.rows, bad + len(batch.bad)
    made += form.tail(good, bad)
    return b"".join(written.as_parquet(form.head(), [made], good, bad)) if kind == "parquet" else made


@pytest.mark.parametrize("name", ["iris", "penguins", "docs_topic", "digits", "breast_cancer"])
def test_answers_of_classifiers_are_the_same_in_each_format(name: str) -> None:
    """Label and scores by class; a bad row is in its place, with line, pointer and message; the counts are last."""
    example = session(name).signature.example or {}
    rows = [example] * 11 + [5] + [example] * 4
    outputs = session(name).run(
        predict_v1.Codec(described(name)).decode([], json.dumps({"instances": [example]}).encode()).inputs
    )
    *lines, last = [json.loads(line) for line in answers("ndjson", name, rows).splitlines()]
    assert last == {"summary": {"good": 15, "bad": 1}}
    assert len(lines) == 16
    assert lines[11]["error"].keys() == {"line", "path", "message"}
    assert lines[11]["error"]["line"] == 12
    key = session(name).signature.scores_key
    scores = np.array([list(line["prediction"][key].values()) for line in lines if "prediction" in line], np.float32)
    assert scores == pytest.approx(outputs[1].repeat(15, 0), abs=1e-6)
    csv = pd.read_csv(io.BytesIO(answers("csv", name, rows)))
    stream = answers("arrow", name, rows)
    frames = [
        csv,
        pa.ipc.open_stream(stream).read_pandas(),
        pd.read_parquet(io.BytesIO(answers("parquet", name, rows))),
    ]
    for frame in frames:
        assert frame["error.line"].dropna().tolist() == [12]
        assert frame["error.message"][11] == lines[11]["error"]["message"]
        good = frame[frame["error.message"].isna()]
        label = lines[0]["prediction"]["label"]
        assert (good["label"] == label).all()
        classes = [f"{key}.{c}" for c in lines[0]["prediction"][key]]
        assert (good[classes].to_numpy(np.float32) == scores).all()
    metadata = [b.custom_metadata for b in batches_with_metadata(stream) if b.custom_metadata]
    assert metadata == [{b"good": b"15", b"bad": b"1"}]


def batches_with_metadata(stream: bytes) -> list[Any]:
    return list(ipc.open_stream(stream).iter_batches_with_custom_metadata())


def test_numbers_are_answers_too() -> None:
    """A regressor's answer is a number in NDJSON and a column by the output's name in tables."""
    example = session("diabetes").signature.example or {}
    expected = session("diabetes").run((np.array([list(example.values())], np.float32),))[0].item()
    assert json.loads(answers("ndjson", "diabetes", [example]).splitlines()[0]) == {
        "prediction": pytest.approx(expected)
    }
    for kind, load in [("csv", pd.read_csv), ("parquet", pd.read_parquet)]:
        frame = load(io.BytesIO(answers(kind, "diabetes", [example] * 3)))
        assert frame["prediction"].tolist() == pytest.approx([expected] * 3)


def test_files_without_rows_have_a_header() -> None:
    """An empty table is answered by one, with the columns of the answer."""
    assert read("csv", HEADER.encode() + b"\n") == []
    for kind, load in [("csv", pd.read_csv), ("parquet", pd.read_parquet)]:
        assert load(io.BytesIO(answers(kind, "iris", []))).columns[0] == "label"
    assert found(read("ndjson", b"")) == found(read("ndjson", b"\n\n")) == {}
