"""What the tests of the fleet share: one open gate, since its libraries take longest to load."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from serving.gate.gate import Gate, Limits


@pytest.fixture(scope="session")
def examiner() -> Iterator[Gate]:
    with Gate(Limits(wall_s=60, cpu_s=3, memory_bytes=2 * 2**30)) as gate:
        yield gate
