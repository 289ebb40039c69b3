"""The short forms of the fuzzing drills: `decoders` and `raw_socket`."""

from __future__ import annotations

from tests.drills import decoders, raw_socket
from tests.drills.drill import Report


def test_any_bytes_are_tensors_or_a_plain_no() -> None:
    """No bytes make a decoder fail in words that are not its own."""
    report = Report()
    decoders.run(report, examples=300, seconds=0)
    assert report.kept, report.broken()


def test_no_bytes_at_a_socket_hurt() -> None:
    """Broken HTTP is refused or the connection closed, and a neighbour is answered as before."""
    report = Report()
    raw_socket.run(report, connections=300)
    assert report.kept, report.broken()
