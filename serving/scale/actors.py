"""Rows of files answered on a Ray cluster: tasks cut the files, actors that hold the model answer the pieces."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Generator, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from serving.bulk.batch import BEGIN, Piece, Position
from serving.bulk.formats import reader
from serving.bulk.pieces import Engine, Files, Scored, cut, score
from serving.bulk.scoring import AnsweringModel, loaded
from serving.engine.signature import Described
from serving.errors import InvalidRequest, NotReady

if TYPE_CHECKING:
    from serving.bulk.reader import Reader

BLOCK_BYTES = 4 << 20
"""What an actor is given at a time: enough that Ray's own work for each is nothing beside it."""
_CUTS, _ANSWERS = 0.1, 0.9
"""Cores that a task which cuts a file takes, and an actor: not the same, or Ray would make one of both, and one file
would be one actor's."""


def actors(workers: int | None) -> Engine:
    """Have so many actors do it at most, as many as the cluster has room for without. Raises InvalidRequest.

    The files are read on the cluster's machines, by the same paths; the model is carried there, once to each.
    """
    if find_spec("ray") is None:
        raise InvalidRequest("--engine: Ray is not installed: pip install 'serving[ray]'")

    def engine(files: Files, model: AnsweringModel, file: int, at: Position) -> Generator[Scored]:
        import ray  # noqa: PLC0415  an extra
        import ray.data  # noqa: PLC0415
        from ray.exceptions import RayError  # noqa: PLC0415

        try:
            ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError) as error:  # none is there, or it does not know this caller
            raise NotReady(f"Ray: {_first_line(error)}") from None
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # the command tells how far it is
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.target_max_block_size = BLOCK_BYTES
        context.enable_progress_bars = context.print_on_execution_start = False
        assert model.path is not None  # noqa: S101  the command refuses a server's
        version = ray.put(_read(model.path))
        absolute = [(path.absolute(), kind) for path, kind in files if path is not None]
        begins = [{"file": index, "at": tuple(at if index == file else BEGIN)} for index in range(file, len(files))]
        most = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        done = (
            ray.data.from_items(begins, override_num_blocks=len(begins))
            .map_batches(
                _cut,
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=_CUTS,
                fn_kwargs={"files": absolute, "described": model.described},
            )
            .map_batches(
                _Answering,
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=_ANSWERS,
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most),
                fn_constructor_args=(absolute, version, model.described, model.kind),
            )
        )
        try:
            for row in done.iter_rows():
                found = pickle.loads(row["made"])  # noqa: S301  made by this cluster
                if isinstance(found, str):
                    raise InvalidRequest(found)
                yield found
        except RayError as error:
            raise NotReady(f"Ray: {_first_line(error)}") from None

    return engine


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:300]


def _read(path: Path) -> dict[str, bytes]:
    """Read all files of a version, the model's own first."""
    others = [each for each in path.parent.rglob("*") if each.is_file() and each != path]
    return {str(each.relative_to(path.parent)): each.read_bytes() for each in (path, *others)}


def _made(what: object) -> pa.Table:
    return pa.table({"made": pa.array([pickle.dumps(what, protocol=5)], pa.large_binary())})


def _cut(begins: pa.Table, files: Files, described: Described) -> Iterator[pa.Table]:
    """Give a file's pieces, or what is wrong with it; a task, near the file's bytes rather than the model."""
    for begin in begins.to_pylist():
        try:
            upto = files[: begin["file"] + 1]
            for index, reading, piece in cut(upto, described, begin["file"], Position(*begin["at"])):
                yield _made((index, reading.total, piece))
        except InvalidRequest as error:
            yield _made(error.message)


class _Answering:
    """An actor: loads the model once."""

    def __init__(self, files: Files, version: Any, described: Described, kind: Any) -> None:
        import ray  # noqa: PLC0415  an extra

        with TemporaryDirectory() as folder:
            own = Path(folder) / described.version
            content: dict[str, bytes] = ray.get(version)
            for name, data in content.items():
                (own / name).parent.mkdir(parents=True, exist_ok=True)
                (own / name).write_bytes(data)
            self._model = loaded(own / next(iter(content)), described.name, kind, together=described.together)
        self._files = files
        self._reading = cache(self._begun)

    def _begun(self, index: int) -> Reader:
        """Give a file's reader, which knows its header."""
        path, kind = self._files[index]
        assert path is not None  # noqa: S101
        with path.open("rb") as source:
            reading = reader(kind, source, self._model.described)
            if kind == "csv":
                next(reading.pieces(), None)
        return reading

    def __call__(self, pieces: pa.Table) -> Iterator[pa.Table]:
        for made in pieces["made"]:
            found: str | tuple[int, int | None, Piece] = pickle.loads(made.as_buffer())  # noqa: S301  made by this cluster
            if isinstance(found, str):
                yield _made(found)
                continue
            index, total, piece = found
            yield _made(score(index, self._reading(index), piece, total, self._model))
