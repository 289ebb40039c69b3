"""What an export makes: one ONNX file that describes itself, as bytes."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx
from rich.console import Group

from serving.engine.batch_independence import prove
from serving.engine.batching import Independence
from serving.engine.rows import Rows
from serving.engine.session import OnnxSession
from serving.engine.signature import METADATA_KEY, Golden, Signature
from serving.export import summary
from serving.export.parity import Worst
from serving.export.refusal import CannotExport, one_line
from serving.export.session import Session
from serving.repository.manifest import MODEL_FILE

_TOOLS = ("scikit-learn", "skl2onnx", "onnxmltools", "xgboost", "lightgbm", "catboost", "torch", "keras", "onnx")


@dataclass(frozen=True, repr=False)
class Exported:
    """An ONNX file's bytes, the signature that is embedded in them, and what was proved of its rows.

    A notebook and a terminal show its features, outputs, parity, worst row and metrics.
    """

    content: bytes
    signature: Signature
    independence: Independence
    """Whether requests of different callers can run together: each server's gate proves it again."""
    worst: Worst | None = None
    """The held-out row whose numbers differ most from the original's; None where nothing was compared."""

    def _tables(self) -> list[summary.Table]:
        return summary.tables(self.signature, self.independence, self.worst, len(self.content))

    def __repr__(self) -> str:
        return summary.text(self._tables())

    def __rich__(self) -> Group:
        return summary.renderable(self._tables())

    def _repr_html_(self) -> str:
        return summary.html(self._tables())


def golden_of(
    signature: Signature, rows: tuple[dict[str, Any], ...], session: Session, tolerance: float = 1e-4
) -> Golden:
    """Ask a file for the answers of golden rows. Raises CannotExport where it does not take them."""
    cells = [[row[feature.name] for feature in signature.features] for row in rows]
    try:
        outputs = session.run(Rows(signature, "golden").arrays(cells))
    except Exception as error:
        raise CannotExport("the golden rows", f"are not taken by the file: {one_line(error)}", "give others") from error
    return Golden(rows=rows, outputs={name: array.tolist() for name, array in outputs.items()}, tolerance=tolerance)


def sealed(proto: onnx.ModelProto, signature: Signature, worst: Worst | None = None) -> Exported:
    """Write a signature into a graph in place of all metadata, and try whether its rows are independent."""
    tools = {name: found for name in (*_TOOLS, "onnxruntime") if (found := _version(name))}
    signature = signature.model_copy(update={"tools": tools})
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, {METADATA_KEY: signature.model_dump_json(exclude_defaults=True)})
    content = proto.SerializeToString(deterministic=True)
    with tempfile.TemporaryDirectory(prefix="export-") as folder:
        path = Path(folder) / MODEL_FILE
        path.write_bytes(content)
        independence = prove(OnnxSession(path, warm_rows=2), path)
    return Exported(content, signature, independence, worst)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
