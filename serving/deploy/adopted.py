"""Folders that hold a model itself rather than numbered versions: an unpacked archive, or what MLflow has logged.

Each becomes version 1 of a model in a folder that is made for them and goes with the server: they are read where they
are, and may be read-only. What MLflow says of their inputs stands in the file that is served.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from serving.deploy.staging import ModelFile, embed_entry, write
from serving.engine import mlflow_columns
from serving.errors import InvalidRequest, ModelInvalid
from serving.repository import manifest
from serving.repository.manifest import MANIFEST_FILE, MODEL_FILE, Hashes, Manifest
from serving.repository.repository import NAME

log = logging.getLogger("serving.adopted")

_FROM = ".from"
"""Links to where a model was taken from and, beside the models, to the folder below which all must lie."""


def bare(root: Path, itself: str = "model") -> dict[str, Path]:
    """Return the models that a folder is, or holds and nothing else, by what they are to be called. Raises OSError.

    itself: the name of the one that the folder is.
    """
    if (root / MODEL_FILE).is_file():
        return {itself: root}
    found = {path.name: path for path in sorted(root.iterdir()) if path.is_dir() and NAME.fullmatch(path.name)}
    return found if all((path / MODEL_FILE).is_file() for path in found.values()) else {}


@contextmanager
def adopted(root: Path, *, by_request: bool, itself: str = "model") -> Iterator[Path | None]:
    """Make a models folder of those in `root`; None where it is one already.

    by_request: they come by `take`. itself: the name of the one that `root` is.
    """
    found = {} if by_request else bare(root, itself)
    if not (found or by_request):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="serving-adopted-") as place:
        folder = Path(place) / "models"
        folder.mkdir()
        (folder / _FROM).symlink_to(root.absolute())
        for name, source in found.items():
            try:
                _adopt(folder, name, source)
            except ModelInvalid:  # which is said, and served once it is whole, as in any models folder
                (folder / name).mkdir()
                (folder / name / "1").symlink_to(source.absolute())
        yield folder


def lock(folder: Path) -> IO[str]:
    """Wait until no worker takes or drops models of this folder, and keep others from it until the file is closed."""
    opened = (folder / ".lock").open("a")
    fcntl.flock(opened, fcntl.LOCK_EX)
    return opened


def take(folder: Path, name: str, url: str) -> None:
    """Add a model by the path of a folder that has it, at any depth.

    Raises InvalidRequest for a path outside of the folder that `adopted` was given, ModelInvalid, OSError.
    """
    root = (folder / _FROM).resolve()
    files = list(Path(url).rglob(MODEL_FILE)) if Path(url).resolve().is_relative_to(root) else []
    if not all(path.resolve().is_relative_to(root) for path in [Path(url), *files]):
        raise InvalidRequest("url: lies outside of the folder that models are loaded from")
    if len(files) != 1:
        raise ModelInvalid(f"there are {len(files)} files {MODEL_FILE} in its folder, and one is expected")
    _adopt(folder, name, files[0].parent, url)


def drop(folder: Path, name: str) -> None:
    """Forget what was taken. Its traffic state stays: generations never begin anew, for they are waited for."""
    shutil.rmtree(folder / name / "1", ignore_errors=True)
    (folder / name / _FROM).unlink(missing_ok=True)


def taken_from(folder: Path, name: str) -> str:
    """Return the path that a model was taken from."""
    return os.readlink(folder / name / _FROM)


def _adopt(folder: Path, name: str, source: Path, url: str | None = None) -> None:
    parts = manifest.parts(source)
    staged = folder / f".{name}"
    version = staged / "1"
    version.mkdir(parents=True)
    try:
        inputs = _mlflow_inputs(source)
        if inputs is None and parts == [MODEL_FILE]:
            (version / MODEL_FILE).symlink_to((source / MODEL_FILE).absolute())
            files = manifest.of(version, Hashes()).files
        else:
            files = ModelFile(source / MODEL_FILE).stage(version)
        if inputs is not None:
            files[MODEL_FILE] = embed_entry(version / MODEL_FILE, mlflow_columns.METADATA_KEY, inputs.encode())
        write(version / MANIFEST_FILE, Manifest(files=files).text())
        home = folder / name
        home.mkdir(exist_ok=True)
        drop(folder, name)
        (home / _FROM).symlink_to(url or source.absolute())
        version.rename(home / "1")
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _mlflow_inputs(source: Path) -> str | None:
    """Return the inputs of MLflow's signature, as it writes them; None where there are none."""
    path = source / "MLmodel"
    if not path.is_file():
        return None
    try:
        import yaml  # noqa: PLC0415  for those who ask
    except ModuleNotFoundError:
        log.warning(
            "%s is served by its graph's own names, and not by MLflow's: pip install 'serving[mlflow]'", source.name
        )
        return None
    try:
        said = yaml.safe_load(path.read_text())
        inputs = (said.get("signature") or {}).get("inputs")
        return inputs if mlflow_columns.read(inputs) else None
    except (ModelInvalid, ValueError, KeyError, AttributeError, TypeError, RecursionError, yaml.YAMLError) as error:
        log.warning("%s is served by its graph's own names: MLmodel: %s", source.name, str(error).split("\n", 1)[0])
        return None
