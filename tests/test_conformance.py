"""What clients that nobody here wrote see of this server: the light points of `python -m tests.conformance`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.own import own
from tests.conformance.point import Result, ask
from tests.conformance.registry import LIGHT
from tests.conformance.subject import Subject

POINTS = LIGHT


def failed(results: list[Result]) -> list[str]:
    # A note at a point that is kept says 422, which this protocol has not.
    return [
        f"{one.group}: {one.name}: {one.verdict}: {one.note}" for one in results if one.verdict != "yes" or one.note
    ]


@pytest.fixture(scope="module")
def both() -> Iterator[Subject]:
    """The server with the fast path, over HTTP and gRPC."""
    with own("--grpc-port", "0") as subject:
        yield subject


@pytest.fixture(scope="module")
def plain() -> Iterator[Subject]:
    """The server without the fast path, over HTTP alone."""
    with own("--no-fast-path") as subject:
        yield subject


def test_every_point_is_kept_over_both_doors(both: Subject) -> None:
    """HTTP by the fast path and gRPC keep every point, and none is left out for want of a model."""
    assert failed(ask(both, POINTS)) == []


def test_every_http_point_is_kept_without_the_fast_path(plain: Subject) -> None:
    """Plain ASGI keeps every HTTP point too."""
    points = [one for one in POINTS if one.group.startswith("REST")]
    assert failed(ask(plain, points)) == []
    assert len(points) > 100


def test_a_server_that_does_not_conform_is_told_so(plain: Subject) -> None:
    """The control: where there is no such protocol, no point is kept, and the note says what was seen."""
    subject = Subject(f"{plain.url}/docs", models=("iris",))
    results = ask(subject, [one for one in LIGHT if one.group.startswith("REST: health")])
    subject.close()
    assert "yes" not in {one.verdict for one in results}
    assert any("404" in one.note for one in results if one.verdict == "no")


def test_no_worker_imports_grpcio(both: Subject) -> None:
    """gRPC is spoken without grpcio, whose threads and memory nobody pays for."""
    assert not grpcio_mapped(both)


def grpcio_mapped(subject: Subject) -> bool:
    """Tell whether a worker of a server has the library of grpcio in its memory."""
    parent = subject.pid
    workers = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return any("/grpc/_cython/" in Path(f"/proc/{worker}/maps").read_text() for worker in workers)


@pytest.mark.parametrize("first", ["tritonclient.grpc", "serving.grpc_api.service"])
def test_a_clients_own_stubs_live_beside_ours(first: str) -> None:
    """A process may load another project's stubs of the same protocol and ours, in either order, and use both."""
    second = "serving.grpc_api.service" if first == "tritonclient.grpc" else "tritonclient.grpc"
    code = f"""
import {first}, {second}
from tritonclient.grpc import service_pb2
from serving.protocols.messages import message
sent = service_pb2.ModelInferRequest(model_name="m", raw_input_contents=[b"x"])
sent.parameters["p"].uint64_param = 2**64 - 1
sent.inputs.add(name="i", datatype="FP32", shape=[1, 2]).contents.fp32_contents.extend([1, 2])
ours = message("ModelInferRequest")
assert not isinstance(sent, ours)
read = ours.FromString(sent.SerializeToString())
assert read.parameters["p"].uint64_param == 2**64 - 1 and list(read.inputs[0].contents.fp32_contents) == [1, 2]
assert service_pb2.ModelInferRequest.FromString(read.SerializeToString()) == sent
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
