"""A server for all tests here that need two workers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import Server, running


@pytest.fixture(scope="package")
def two_workers() -> Iterator[Server]:
    with running("--workers", "2", "--grpc-port", "0", "--metrics-compat", "triton") as server:
        yield server
