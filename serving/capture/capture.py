"""Keeps a share of what models were asked and answered as Parquet, at <folder>/<model>/<version>/.

The event loop only copies; a thread writes, a file for each version once a minute or sooner. What can't be written is a
warning, and nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from serving.engine.model import Model
from serving.engine.signature import Signature
from serving.tensors import Array, Overriding, Tensors

log = logging.getLogger("serving.capture")

EVERY_S = 60.0
"""Seconds after which a file is written; a worker that is killed loses no more."""
FILE_BYTES, HELD_BYTES = 8 << 20, 32 << 20
"""Bytes from which one is written sooner, and most that wait; what comes then is dropped."""
_ABANDONED_S = 3600.0
METADATA_KEY = b"serving"


@dataclass(frozen=True, slots=True)
class _Answered:
    """A request and its answer. time: nanoseconds since 1970; inputs and outputs: by the order of the signature."""

    time: int
    identity: bytes
    principal: str | None
    inputs: Tensors
    rows: int
    outputs: Tensors
    size: int


class Tap:
    """Takes a share of what one version answers. Its methods but `table` are called on the event loop."""

    def __init__(self, capture: Capture, model: Model, share: float, hidden: frozenset[str]) -> None:
        self.name, self.version = model.name, model.version
        self._capture = capture
        self._share = share
        self._hidden = hidden
        self._signature = model.signature
        facts = {
            "model": model.name,
            "version": model.version,
            "sha256": model.sha256,
            "redacted": sorted(hidden),
            **model.signature.model_dump(include={"label", "scores", "classes"}),
        }
        self._metadata = {METADATA_KEY: json.dumps(facts).encode()}

    def wants(self) -> bool:
        """Draw whether the next request is in the share."""
        return random.random() < self._share  # noqa: S311  which ones is no secret

    def take(self, identity: bytes, principal: str | None, inputs: Tensors, rows: int, outputs: Tensors) -> None:
        """Copy an answered request. principal: whose key it came with."""
        whole = self._signature.batch == "none"
        if not rows or isinstance(inputs, Overriding) or not (whole or all(len(a) == rows for a in outputs)):
            return  # there is nothing to score again, or no telling which answer is whose
        size = sum(_size(array) for array in (*inputs, *outputs))
        if self._capture.has_room(size):
            inputs, outputs = (tuple(a[None] if whole else a.copy() for a in arrays) for arrays in (inputs, outputs))
            self._capture.put(self, _Answered(time.time_ns(), identity, principal, inputs, rows, outputs, size))

    def table(self, taken: list[_Answered]) -> Any:
        """Make a table of requests: a row for each of theirs, a column for each feature that is not sensitive."""
        import pyarrow as pa  # noqa: PLC0415  an extra

        rows = [answered.rows for answered in taken]
        columns = {
            "time": pa.array(np.repeat([answered.time for answered in taken], rows), pa.timestamp("ns", "UTC")),
            "request_id": pa.array(np.repeat([answered.identity.decode("latin-1") for answered in taken], rows)),
            "row": pa.array(np.concatenate([np.arange(count, dtype=np.int32) for count in rows])),
            "principal": pa.array(np.repeat(np.array([a.principal for a in taken], object), rows), pa.string()),
        }
        for index, feature in enumerate(self._signature.features):
            if feature.name not in self._hidden:
                arrays = [_feature(self._signature, index, answered) for answered in taken]
                columns[f"features.{feature.name}"] = column(arrays, feature.datatype)
        for index, spec in enumerate(self._signature.outputs):
            arrays = [answered.outputs[index] for answered in taken]
            if spec.shape[1:] == (1,):
                arrays = [array.reshape(-1) for array in arrays]
            columns[f"outputs.{spec.name}"] = column(arrays, spec.datatype)
        return pa.table(columns).replace_schema_metadata(self._metadata)


class Capture:
    """One process's part in the folder; `close` writes what waits. max_bytes: of all files, whoever wrote them."""

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._taken: deque[tuple[Tap, _Answered]] = deque()
        self._came = self._went = 0  # bytes; each is counted by one thread only
        self._written_to = 0
        self.behind = self.unwritable = 0
        """Requests that were not kept: they came faster than they are written, or could not be. Each by one thread."""
        self._told = 0
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="capture", daemon=True)
        self._thread.start()

    def attach(self, model: Model) -> None:
        """Take copies of what a version answers, where its settings ask for that and can be kept."""
        if model.sensitive is not None and model.limits.capture_share:
            model.tap = Tap(self, model, model.limits.capture_share, model.sensitive)

    def has_room(self, size: int) -> bool:
        """Tell whether so many bytes more may wait; count what is dropped."""
        fits = self._came - self._went + size <= HELD_BYTES
        self.behind += not fits
        return fits

    def put(self, tap: Tap, answered: _Answered) -> None:
        """Have a request written."""
        self._taken.append((tap, answered))
        self._came += answered.size
        if self._came - self._written_to >= FILE_BYTES:
            self._written_to = self._came
            self._wake.set()

    def close(self) -> None:
        """Write what waits; for a thread."""
        self._closing = True
        self._wake.set()
        self._thread.join(10)

    def _work(self) -> None:
        while not self._closing:
            self._wake.wait(EVERY_S)
            self._wake.clear()
            self._flush()

    def _flush(self) -> None:
        # Not by putting another list in its place: the event loop may be about to append to the one that it has got.
        taken = [self._taken.popleft() for _ in range(len(self._taken))]
        behind, lost = self.behind, 0
        by_tap: dict[Tap, list[_Answered]] = {}
        for tap, answered in taken:
            by_tap.setdefault(tap, []).append(answered)
        reason = "they came faster than they are written"
        for tap, answers in by_tap.items():
            try:
                self._write(tap, answers)
            except OSError as error:
                lost, reason = lost + len(answers), error.strerror or "the disk does not take them"
            except Exception:  # the thread lives on
                lost, reason = lost + len(answers), "they could not be written"
                log.exception("%s %s: requests could not be written", tap.name, tap.version)
        self._went += sum(answered.size for _, answered in taken)
        self.unwritable += lost
        if dropped := behind - self._told + lost:
            log.warning("%d requests were not captured: %s", dropped, reason)
        self._told = behind

    def _write(self, tap: Tap, answers: list[_Answered]) -> None:
        """Write a file: it is there whole, or not at all. Raises OSError."""
        from pyarrow import parquet  # noqa: PLC0415  an extra

        folder = self._folder / tap.name / tap.version
        folder.mkdir(parents=True, exist_ok=True)
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        file = folder / f"{now}-{socket.gethostname()}-{os.getpid()}.parquet"
        temporary = file.with_name(f".{file.name}")
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
                parquet.write_table(tap.table(answers), opened, compression="zstd")
            self._make_room(temporary.stat().st_size)
            temporary.rename(file)
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Remove the oldest files until so many bytes more are in the bound, and what was never finished."""
        files = []
        for path in self._folder.glob("*/*/*.parquet"):
            try:
                facts = path.stat()
            except FileNotFoundError:  # another worker made room, or has finished it
                continue
            if not path.name.startswith("."):
                files.append((path.name, path, facts.st_size))
            elif time.time() - facts.st_mtime > _ABANDONED_S:
                path.unlink(missing_ok=True)
        total = size + sum(each for _, _, each in files)
        for _, path, each in sorted(files):
            if total <= self._max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= each


def _size(array: Array) -> int:
    return sum(map(len, array.ravel().tolist())) if array.dtype.hasobject else array.nbytes


def _feature(signature: Signature, index: int, answered: _Answered) -> Array:
    """Return a feature's values, [rows, ...] with its own shape behind."""
    if signature.layout == "matrix":
        return answered.inputs[0][:, index]
    array = answered.inputs[index]
    return array.reshape(-1) if not signature.features[index].shape else array


def column(arrays: list[Array], datatype: str) -> Any:
    """Make a column of arrays [rows, ...], one below the other; of lists where a row has dimensions, whatever sizes."""
    import pyarrow as pa  # noqa: PLC0415  an extra

    from serving.bulk import columns  # noqa: PLC0415

    kind = columns.column_type(datatype, arrays[0].ndim - 1)
    if len({array.shape[1:] for array in arrays}) == 1:
        arrays = [np.concatenate(arrays)]  # one by one they would take the interpreter much longer
    return pa.concat_arrays([columns.column(array, kind) for array in arrays])
