"""Whole files of rows as one request: all at once or, where a row is bad, none."""

from __future__ import annotations

import io

import numpy as np

from serving.bulk.batch import Batch
from serving.bulk.formats import check_installed
from serving.engine.signature import Described
from serving.errors import Detail, InvalidRequest, PayloadTooLarge, SignatureMismatch, listed
from serving.protocols.codec import Decoded

MOST_ROWS = 1 << 18
"""Of one file: a column of one value takes no bytes that would bound them."""

MOST_TEXT_BYTES = 64 << 20
"""Of one file, each cell by itself: rows that share a text take no bytes for it either."""


def read_parquet(body: bytes, described: Described) -> Decoded:
    """Read Parquet as MLflow does: other columns are left out, and one that may be missing may be.

    Raises InvalidRequest, PayloadTooLarge, SignatureMismatch, and UnsupportedMediaType without pyarrow.
    """
    batches: list[Batch] = []
    rows = 0
    check_installed()
    from serving.bulk.arrow import ParquetReader  # noqa: PLC0415  50 MB, for those who ask

    source = ParquetReader(described, io.BytesIO(body))
    source.fits = True
    texts = 0
    for piece in source.pieces():
        rows += len(piece.data)
        if rows > MOST_ROWS:
            raise PayloadTooLarge(f"the Parquet file has over {MOST_ROWS} rows, which is the limit: send fewer")
        texts += source.columns.text_bytes(piece.data)
        if texts > MOST_TEXT_BYTES:
            raise PayloadTooLarge(f"the Parquet file has over {MOST_TEXT_BYTES} bytes of text: send fewer rows")
        batches += source.read(piece)
    bad = [Detail(f"/{row.line - 1}{row.path}", row.message) for batch in batches for row in batch.bad]
    if bad:
        raise listed("the rows do not fit the model's signature", bad)
    parts = [batch.inputs for batch in batches if batch.inputs is not None]
    if not parts:
        raise InvalidRequest("the Parquet file has no rows: send at least one")
    if rows > 1 and described.signature.batch == "none":
        raise SignatureMismatch(f"{rows} rows, and this model takes one a request: send them one by one")
    try:
        return Decoded(tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True)), rows)
    except ValueError:
        raise SignatureMismatch("rows have different shapes: send them one request each") from None
