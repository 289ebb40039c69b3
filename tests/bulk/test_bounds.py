"""Rows in bulk from strangers: whatever they send, memory and time stay bounded, and the process lives."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from serving.bulk import columns as columns_module
from serving.bulk.formats import reader
from serving.bulk.whole import read_parquet
from serving.errors import DETAILS_SHOWN, PayloadTooLarge, ServingError
from tests.bulk.test_formats import HEADER, IRIS, PENGUIN, arrow, described, found, ndjson, read


class Endless(io.RawIOBase):
    """A line of so many bytes, made while it is read, and rows behind it."""

    def __init__(self, size: int) -> None:
        self._left = size
        self._rest = io.BytesIO(b"\n" + ndjson([IRIS] * 3))

    def read(self, size: int = -1) -> bytes:
        some = min(size, self._left)
        self._left -= some
        return b"x" * some or self._rest.read(size)


@pytest.mark.parametrize("kind", ["csv", "ndjson"])
def test_a_line_without_end_is_one_bad_row_in_bounded_memory(kind: Any) -> None:
    """What follows it is answered; it was never held."""
    head = io.BytesIO(HEADER.encode() + b"\n" if kind == "csv" else b"")
    endless = Endless(300 << 20)
    source: Any = io.BytesIO()
    source.read = lambda size: head.read(size) or endless.read(size)  # type: ignore[method-assign]
    tracemalloc.start()
    batches = list(reader(kind, source, described("iris")))
    assert tracemalloc.get_traced_memory()[1] < 24 << 20
    tracemalloc.stop()
    line = 2 if kind == "csv" else 1
    made = found(batches)
    assert "is a line of over 4194304 bytes" in made.pop(line)
    assert len(made) == 3


def _shared(view: bool) -> pa.Table:
    """Make 20,000 penguins whose texts are one of 64 KiB, which the message has once."""
    rows, size = 20_000, 1 << 16
    text: Any = pa.DictionaryArray.from_arrays(np.zeros(rows, np.int8), pa.array(["x" * size]))
    if view:
        views = struct.pack("<i4sii", size, b"xxxx", 0, 0) * rows
        text = pa.Array.from_buffers(pa.string_view(), rows, [None, pa.py_buffer(views), pa.py_buffer(b"x" * size)])
    return pa.table({n: text if isinstance(v, str) else np.full(rows, v) for n, v in PENGUIN.items()})


@pytest.mark.parametrize("view", [False, True])
def test_texts_that_rows_share_are_made_in_parts(view: bool) -> None:
    """A few bytes stand for gigabytes of text: what is read at a time stays bounded, whoever shares them how."""
    batches = iter(reader("arrow", io.BytesIO(arrow(_shared(view))), described("penguins")))
    for _ in range(3):
        batch = next(batches)
        assert 0 < batch.rows * 2 * (1 << 16) <= 32 << 20 or batch.bad


def test_a_parquet_of_one_request_has_bounded_texts() -> None:
    """Rows that share a text are counted with it, each."""
    sink = io.BytesIO()
    parquet.write_table(_shared(view=False), sink)
    with pytest.raises(PayloadTooLarge, match="bytes of text"):
        read_parquet(sink.getvalue(), described("penguins"))


def test_many_bad_rows_are_many_batches() -> None:
    """Streams take turns between batches: one with a megabyte of rubbish holds the others up for a moment only."""
    batches = reader("csv", io.BytesIO(HEADER.encode() + b"\n" + b"x\n" * 3500), described("iris"))
    assert [len(batch.bad) for batch in batches] == [1000, 1000, 1000, 500]


def test_a_header_of_rubbish_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that are none are compared as far as they are told, and no line of an open quote twice."""
    compared: list[str] = []
    monkeypatch.setattr(columns_module, "meant", lambda given, _: compared.append(given) or "")
    for header in (",".join(f"sepal_lengt{i}" for i in range(10_000)).encode() + b"\n", b'"' + b"\n" * 4_000_000):
        with pytest.raises(ServingError):
            read("csv", header)
    assert len(compared) <= DETAILS_SHOWN


def test_broken_streams_never_end_the_process() -> None:
    """Any byte of an Arrow stream may be wrong: it is refused, or read as something."""
    data = arrow(pa.Table.from_pandas(pd.DataFrame([PENGUIN] * 50)))
    chance = np.random.default_rng(5)
    for _ in range(1500):
        broken = bytearray(data)
        for at in chance.integers(0, len(data), 3):
            broken[at] = chance.integers(0, 256)
        try:
            read("arrow", bytes(broken), "penguins")
        except ServingError:
            continue


def test_a_page_beyond_the_memory_of_a_worker_is_refused(tmp_path: Path) -> None:
    """A Parquet file says itself how large its pages are: what does not fit is an error, and the process lives."""
    file = tmp_path / "large.parquet"
    large = {name: ["x" * (256 << 20)] if name == "island" else [value] for name, value in PENGUIN.items()}
    parquet.write_table(pa.table(large), file, compression="zstd", write_statistics=False)
    assert file.stat().st_size < 64 << 10
    child = """
import sys
from pathlib import Path
from serving.bulk.formats import reader
from serving.errors import InvalidRequest
from serving.linux import limits
from tests.bulk.test_formats import PENGUIN, as_parquet, described
import io, pyarrow
penguins = described("penguins")
small = as_parquet(pyarrow.Table.from_pylist([PENGUIN]))
list(reader("parquet", io.BytesIO(small), penguins))
taken = 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1])
limits.limit_data(taken + (128 << 20))
try:
    list(reader("parquet", open(sys.argv[1], "rb"), penguins))
except InvalidRequest as error:
    print(error.message)
print(len(list(reader("parquet", io.BytesIO(small), penguins))))
"""
    ended = subprocess.run([sys.executable, "-c", child, file], capture_output=True, text=True, check=False)
    assert ended.stdout.startswith("the Parquet file can't be read behind row 0: malloc of size"), ended.stderr
    assert ended.stdout.endswith("failed\n1\n")
