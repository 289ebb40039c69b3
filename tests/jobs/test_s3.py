"""Inputs and results in an object store, by a process that speaks S3."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import boto3
import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.jobs.conftest import NAMES, Make, expected, finished, flowers, services

ROWS = flowers(1200)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, eventually: Callable[[Callable[[], bool]], None]) -> Iterator[object]:
    """A bucket, and the environment in which the server finds its store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        eventually(lambda: _listens(port))
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        yield client
    finally:
        server.kill()
        server.wait()


def test_input_parts_and_result_in_a_bucket(serving_jobs: Make, store: object) -> None:
    """A job reads and writes objects: the result is whole under its name, parts go, and what is replaced is refused."""
    s3: object = store
    sink = io.BytesIO()
    parquet.write_table(pa.table({name: ROWS[:, i] for i, name in enumerate(NAMES)}), sink, row_group_size=700)
    put = s3.put_object  # type: ignore[attr-defined]
    put(Bucket="bucket", Key="in/rows.parquet", Body=sink.getvalue())
    with serving_jobs(jobs_folder="s3://bucket/kept", jobs_inputs=("s3://bucket/in",)) as client:
        pieces = services(client).runner.pieces
        pieces.piece_bytes, pieces.piece_rows = 20_000, 500
        ask = {"model": "iris", "url": "s3://bucket/in/rows.parquet", "output": "parquet"}
        job = finished(client, client.post("/v1/jobs", json=ask))
        assert (job["state"], job["rows_good"]) == ("succeeded", 1200), job
        result = client.get(f"/v1/jobs/{job['id']}/result").content
        assert parquet.read_table(io.BytesIO(result))["label"].to_pylist() == expected(ROWS)[0]
        sent = client.post(
            "/v1/jobs?model=iris&output=csv",
            content="\n".join([",".join(NAMES), *(",".join(map(str, row)) for row in ROWS.tolist())]),
            headers={"content-type": "text/csv"},
        )
        job = finished(client, sent)
        lines = client.get(f"/v1/jobs/{job['id']}/result").text.splitlines()[1:]
        assert [line.split(",")[0].strip('"') for line in lines] == expected(ROWS)[0]
        for url, status in (("s3://bucket/input", 403), ("s3://c/in/x", 403), ("s3://bucket/in/none", 400)):
            assert client.post("/v1/jobs", json={**ask, "url": url, "input": "csv"}).status_code == status, url
        assert client.delete(f"/v1/jobs/{job['id']}").status_code == 204
        names = [each["Key"] for each in s3.list_objects_v2(Bucket="bucket", Prefix="kept/")["Contents"]]  # type: ignore[attr-defined]
        assert not [name for name in names if job["id"] in name]
        do = pieces.do

        async def late(claimed: object) -> None:
            put(Bucket="bucket", Key="in/rows.parquet", Body=sink.getvalue() + b" ")
            await do(claimed)

        pieces.do = late
        job = finished(client, client.post("/v1/jobs", json=ask))
        assert (job["state"], "has changed" in job["error"]) == ("failed", True), job
