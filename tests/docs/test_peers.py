"""The manual's table of other servers."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers.servers import peers
from docs import generated


def test_no_peer_is_missing_without_a_reason(tmp_path: Path) -> None:
    """Each server that `make peers` knows stands in the table, with figures or with why it has none."""
    shown = [line.split(" | ") for line in generated.peers().splitlines()]
    for name in ["serving", *(peer.name for peer in peers(tmp_path, tmp_path / "model.onnx"))]:
        compared, advised = (line for line in shown if line[0] == f"| {name}")
        assert "/s" in compared[1] or len(compared[1]) > 10, name
        assert len(advised[2]) > 10, name
