"""Publishes an exported model as the next version of a name: whole or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from serving.deploy.publish import publish as publish_version
from serving.deploy.staging import Writing
from serving.export.exported import Exported
from serving.gate.gate import Gate
from serving.repository.manifest import MODEL_FILE, Entry


def publish(
    exported: Exported,
    *,
    name: str,
    root: Path | str,
    note: str = "",
    allow_breaking: bool = False,
    examiner: Gate | None = None,
) -> tuple[str, bool]:
    """Write `root/name/<next version>/` and return the version, and whether it is new.

    A version with the same bytes is not published twice. examiner: a gate that is open already, for many models.
    Raises InvalidRequest for a name that is none, and GateRefused where the gate says no: its text has the reasons.
    """
    published = publish_version(
        Path(root),
        name,
        _Content(exported.content),
        note=note,
        allow_breaking=allow_breaking,
        examiner=examiner,
    )
    return published.version, published.new


@dataclass(frozen=True, slots=True)
class _Content:
    content: bytes

    def stage(self, folder: Path) -> dict[str, Entry]:
        with Writing(folder / MODEL_FILE) as writing:
            writing.write(self.content)
            return {MODEL_FILE: writing.close()}
