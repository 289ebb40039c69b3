"""One result of many parts, a part at a time in memory."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Sequence

import pyarrow as pa
from pyarrow import parquet

from serving.bulk import formats
from serving.engine.signature import Described
from serving.jobs.results import Results


def empty(kind: formats.Format, described: Described) -> bytes:
    """Return a result without rows."""
    sink = io.BytesIO()
    formats.writer(kind, described, sink).close(0, 0)
    return sink.getvalue()


async def joined(results: Results, parts: Sequence[str]) -> AsyncIterator[bytes]:
    """Give the bytes of parts, one behind the other."""
    for each in parts:
        async for chunk in results.read(each):
            yield chunk


async def tables(results: Results, parts: Sequence[str]) -> AsyncIterator[bytes]:
    """Give one Parquet of those of all parts, which have the same columns."""
    sink = _Sequential()
    writer: parquet.ParquetWriter | None = None
    counts = {b"good": 0, b"bad": 0}
    for each in parts:
        file = parquet.ParquetFile(io.BytesIO(b"".join([chunk async for chunk in results.read(each)])))
        if writer is None:
            writer = parquet.ParquetWriter(pa.PythonFile(sink, mode="w"), file.schema_arrow.remove_metadata())
        for key in counts:
            counts[key] += int((file.metadata.metadata or {}).get(key, 0))
        for group in range(file.num_row_groups):
            await asyncio.to_thread(writer.write_table, await asyncio.to_thread(file.read_row_group, group))
            yield sink.taken()
    if writer is not None:
        writer.add_key_value_metadata({key.decode(): str(count) for key, count in counts.items()})
        writer.close()
        yield sink.taken()


class _Sequential:
    """A file that is written from its beginning to its end, and forgets what was taken."""

    closed = False

    def __init__(self) -> None:
        self._held: list[bytes] = []

    def write(self, data: bytes) -> None:
        self._held.append(bytes(data))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def taken(self) -> bytes:
        held, self._held = b"".join(self._held), []
        return held
