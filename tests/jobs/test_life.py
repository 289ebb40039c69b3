"""Jobs as their owners see them over HTTP, on databases of both kinds."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient
from pyarrow import parquet
from pydantic import ValidationError

from serving.errors import InvalidRequest, JobNotFound
from serving.http_api.jobs_api import live_jobs, read_request
from serving.jobs import leases
from serving.jobs.leases import Claim, LeaseLost
from serving.jobs.tables import Piece
from serving.settings import Settings
from tests.jobs.conftest import NAMES, Make, Shared, ask, expected, finished, flowers, send, services

ROWS = flowers(3000)


def table(kind: str, rows: np.ndarray[Any, Any] = ROWS) -> bytes:
    """Write rows as a file of a format; the columns of CSV in another order than the model's."""
    if kind == "parquet":
        sink = io.BytesIO()
        columns = {name: rows[:, i] for i, name in enumerate(NAMES)}
        parquet.write_table(pa.table(columns), sink, row_group_size=700)
        return sink.getvalue()
    if kind == "ndjson":
        return "".join(json.dumps(dict(zip(NAMES, row, strict=True))) + "\n" for row in rows.tolist()).encode()
    lines = [",".join(reversed(NAMES)), *(",".join(map(str, reversed(row))) for row in rows.tolist())]
    return "\r\n".join(lines).encode()


def read(kind: str, result: bytes) -> tuple[list[str], np.ndarray[Any, Any]]:
    """Read labels and probabilities of a result."""
    if kind == "ndjson":
        found = [json.loads(line)["prediction"] for line in result.splitlines()]
        return [row["label"] for row in found], np.array([list(row["probabilities"].values()) for row in found])
    if kind == "csv":
        records = list(csv.reader(io.StringIO(result.decode())))[1:]
        return [record[0] for record in records], np.array([list(map(float, record[1:4])) for record in records])
    found = parquet.read_table(io.BytesIO(result))
    return found["label"].to_pylist(), np.array([found.column(i).to_numpy() for i in (1, 2, 3)]).T


@pytest.mark.parametrize("output", ["csv", "ndjson", "parquet"])
@pytest.mark.parametrize("given", ["text/csv", "application/x-ndjson", "application/vnd.apache.parquet"])
def test_files_are_predicted_in_the_order_of_their_rows(client: TestClient, given: str, output: str) -> None:
    """Of a file of each format comes a result of each format: a row a row, in order, as onnxruntime answers them."""
    labels, probabilities = expected(ROWS)
    kind = given.rpartition(".")[2].rpartition("/")[2].removeprefix("x-")
    job = finished(client, send(client, table(kind), given, output))
    assert (job["state"], job["rows_good"], job["rows_bad"], job["progress"]) == ("succeeded", 3000, 0, 1.0), job
    result = client.get(f"/v1/jobs/{job['id']}/result")
    assert len(result.content) == job["result_bytes"] == int(result.headers["content-length"])
    got = read(output, result.content)
    assert got[0] == labels
    np.testing.assert_allclose(got[1], probabilities, atol=1e-6)
    assert client.get(f"/v1/jobs/{job['id']}/errors").content == b""
    if output == "parquet":
        assert parquet.read_metadata(io.BytesIO(result.content)).metadata[b"good"] == b"3000"


def test_a_bad_row_is_named_and_the_others_are_predicted(
    shared: Shared, client: TestClient, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    """A row that is wrong has an error in its place, and a line in errors; all others are answered."""
    rows = [*ROWS[:3].tolist(), [1.0, "x", 1.0, 1.0], [1.0], *ROWS[3:5].tolist()]
    job = finished(client, ask(client, rows, output="ndjson"))
    assert (job["state"], job["rows_good"], job["rows_bad"]) == ("succeeded", 5, 2)
    lines = [json.loads(line) for line in client.get(f"/v1/jobs/{job['id']}/result").content.splitlines()]
    labels = [line.get("prediction", {}).get("label") for line in lines]
    assert labels == [*expected(ROWS[:3])[0], None, None, *expected(ROWS[3:5])[0]]
    errors = [json.loads(line) for line in client.get(f"/v1/jobs/{job['id']}/errors").content.splitlines()]
    assert [(error["line"], error["path"]) for error in errors] == [(4, "/1"), (5, "")]
    assert errors == [lines[3]["error"], lines[4]["error"]]
    shutil.rmtree(shared.folder / "kept" / job["id"])  # as when it is removed at the same time
    assert client.get(f"/v1/jobs/{job['id']}/result").status_code == 404
    metrics = {"authorization": f"Bearer {shared.keys[-1]}"}
    for counted in ("serving_job_rows_total", 'serving_jobs{state="succeeded"}', "serving_jobs_database_up 1.0"):
        eventually(lambda counted=counted: counted in client.get("/metrics", headers=metrics).text)


def test_each_key_sees_its_own_jobs(shared: Shared, client: TestClient) -> None:
    """A key without the scope is refused; one with it sees, cancels and deletes its own jobs, and nobody else's."""
    other, stranger = ({"authorization": f"Bearer {shared.keys.pop(place)}"} for place in (0, -1))
    shared.keys.append(stranger["authorization"].removeprefix("Bearer "))
    assert ask(client, headers={"authorization": ""}).status_code == 401
    assert ask(client, headers=stranger).status_code == 403
    made = ask(client)
    path = f"/v1/jobs/{made.json()['id']}"
    assert client.get(path).status_code == 200
    assert [client.get("/v1/jobs", headers=who).json()["total"] for who in ({}, other)] == [1, 0]
    for method, end in (("GET", ""), ("GET", "/result"), ("GET", "/errors"), ("POST", "/cancel"), ("DELETE", "")):
        refused = client.request(method, path + end, headers=other)
        assert (refused.status_code, made.json()["id"] in refused.json()["error"]) == (404, True), (method, end)
    assert client.delete(path).status_code == 204
    assert client.get(path).status_code == 404


def test_the_same_idempotency_key_gives_the_same_job(shared: Shared, client: TestClient) -> None:
    """A request that is repeated, also many times at once, makes one job; another request with the key is refused."""
    kept = shared.folder / "kept"
    with ThreadPoolExecutor(8) as pool:
        before = set(kept.iterdir())
        answers = list(pool.map(lambda _: ask(client, headers={"idempotency-key": "k"}), range(8)))
    assert sorted(answer.status_code for answer in answers) == [200] * 7 + [201]
    (job,) = {answer.json()["id"] for answer in answers}
    other = ask(client, [[1, 2, 3, 4]], headers={"idempotency-key": "k"})
    assert (other.status_code, "Idempotency-Key" in other.json()["error"]) == (409, True)
    assert client.get("/v1/jobs").json()["total"] == 1
    assert set(kept.iterdir()) - before == {kept / job}


def test_jobs_are_listed_in_bounds(client: TestClient) -> None:
    """A list has as many jobs as were asked for, the latest first, and says how many there are of a state."""
    jobs = [finished(client, ask(client))["id"] for _ in range(3)]
    page = client.get("/v1/jobs", params={"skip": 1, "limit": 1, "state": "succeeded"}).json()
    assert ([job["id"] for job in page["jobs"]], page["total"]) == ([jobs[1]], 3)
    assert client.get("/v1/jobs", params={"state": "failed"}).json() == {"jobs": [], "total": 0}
    for wrong in ({"limit": 1001}, {"skip": -1}, {"state": "lost"}, {"stat": "failed"}):
        refused = client.get("/v1/jobs", params=wrong)
        assert (refused.status_code, next(iter(wrong)) in refused.json()["error"]) == (400, True)


def test_cancelling_is_final_and_can_be_repeated(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled twice is cancelled; what has ended otherwise can't be cancelled; an unknown job is not found."""
    job = finished(client, ask(client))
    refused = client.post(f"/v1/jobs/{job['id']}/cancel")
    assert (refused.status_code, refused.json()["error"]) == (409, "the job has succeeded already")
    for method, unknown in (("POST", "/v1/jobs/unknown/cancel"), ("GET", "/v1/jobs/%00"), ("DELETE", "/v1/jobs/x")):
        assert client.request(method, unknown).status_code == 404
    with monkeypatch.context() as patch:
        patch.setattr(services(client).runner.pieces, "do", lambda _: asyncio.Event().wait())
        path = f"/v1/jobs/{ask(client).json()['id']}"
        for _ in range(2):
            assert client.post(f"{path}/cancel").json()["state"] == "cancelled"
        refused = client.get(f"{path}/result")
        assert (refused.status_code, "cancelled" in refused.json()["error"]) == (409, True)


def test_of_two_workers_with_one_piece_one_counts(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that was taken for dead writes and commits at the same time as the one in its place: no row is twice."""
    database, pieces = services(client).jobs.database, services(client).runner.pieces
    do, outcomes = pieces.do, []

    async def twice(claimed: Claim) -> None:
        if claimed.piece.kind != "score" or outcomes:
            await do(claimed)
            return
        async with database.transaction() as session:
            (await session.get_one(Piece, (claimed.job.id, claimed.piece.number))).lease_until = 0
        other = await database.run(partial(leases.claim, running=100), alone=True)
        assert (other.piece.number, other.token) == (claimed.piece.number, claimed.token + 1)
        outcomes.extend(await asyncio.gather(do(claimed), do(other), return_exceptions=True))
        raise LeaseLost

    monkeypatch.setattr(pieces, "do", twice)
    job = finished(client, ask(client, ROWS.tolist(), output="csv"))
    assert [type(outcome) for outcome in outcomes] == [LeaseLost, type(None)]
    assert (job["state"], job["rows_good"]) == ("succeeded", 3000)
    assert read("csv", client.get(f"/v1/jobs/{job['id']}/result").content)[0] == expected(ROWS)[0]


def test_who_sends_slowly_holds_up_no_others(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where as many files are being sent as may be, another one is to come back, and rows in a request are taken."""
    monkeypatch.setattr(services(client).jobs, "_uploads", asyncio.Semaphore(0))
    assert send(client, b"5.1", "text/csv").status_code == 429
    assert finished(client, ask(client))["state"] == "succeeded"


@pytest.mark.parametrize("sent", [b"5.1,3.5,1.4,0.2\n" * 100_000, b"5.1"], ids=["much", "little"])
def test_an_upload_that_is_cut_leaves_nothing(shared: Shared, client: TestClient, sent: bytes) -> None:
    """Half of a file makes no job, and none of it is kept."""
    before = set((shared.folder / "kept").rglob("*"))
    messages = [{"type": "http.request", "body": sent, "more_body": True}, {"type": "http.disconnect"}]
    heads = {**client.headers, "content-type": "text/csv", "content-length": "5000000"}
    scope = {
        "type": "http", "method": "POST", "path": "/v1/jobs", "query_string": b"model=iris", "root_path": "",
        "headers": [(name.lower().encode(), value.encode()) for name, value in heads.items()],
        "http_version": "1.1", "scheme": "http", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    answers: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0) if len(messages) > 1 else messages[0]

    async def send_(message: Any) -> None:
        answers.append(message)

    assert client.portal is not None
    client.portal.call(client.app, scope, receive, send_)
    assert answers[0]["status"] == 499
    assert client.get("/v1/jobs").json()["total"] == 0
    assert not [left for left in set((shared.folder / "kept").rglob("*")) - before if left.is_file()]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "model"),
        ({"model": "iris"}, "rows or a url"),
        ({"model": "iris", "rows": [], "output": "csv"}, "at least one"),
        ({"model": "iris", "rows": [[1]], "url": "/x.csv"}, "one of the two"),
        ({"model": "iris", "url": "/x"}, "input"),
        ({"model": "iris", "rows": [[1]], "output": "xls"}, "output"),
        ({"model": "iris", "rows": [[1]], "version": "1", "label": "x"}, "not both"),
        ({"model": "iris", "rows": [[1]], "outptu": "csv"}, "outptu"),
    ],
)
def test_what_is_wrong_with_a_request_is_named(body: dict[str, Any], said: str) -> None:
    """A request for a job that is wrong is refused, and names what is."""
    with pytest.raises(InvalidRequest, match=said):
        read_request(json.dumps(body).encode())


def test_a_file_needs_a_type_and_a_model(client: TestClient) -> None:
    """A file of an unknown type, or for no model, is refused before it is read."""
    assert send(client, b"a", kind="image/png").status_code == 415
    refused = client.post("/v1/jobs", content=b"a", headers={"content-type": "text/csv"})
    assert (refused.status_code, "model" in refused.json()["error"]) == (400, True)
    assert ask(client, model="rose").status_code == 404


def test_without_a_database_there_are_no_jobs() -> None:
    """A server that was not told of a database says how to have jobs."""
    with pytest.raises(JobNotFound, match="--jobs-database-url"):
        live_jobs(Mock(jobs=None))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("jobs_database_url", "mysql://u:secret@h/d"),
        ("jobs_database_url", "sqlite://"),
        ("jobs_database_url", "sqlite:///:memory:"),
        ("jobs_folder", "ftp://u:secret@h/d"),
        ("jobs_folder", "s3:///x"),
        ("jobs_inputs", "/srv"),
    ],
)
def test_a_setting_that_names_nothing_is_refused(setting: str, value: str) -> None:
    """What is no database, store or list of places is refused at the start, and its secret is not said."""
    with pytest.raises(ValidationError, match="write") as refused:
        Settings(**{setting: value})
    assert "secret" not in refused.value.errors()[0]["msg"]


def test_a_folder_that_can_not_be_had_costs_jobs_alone(serving_jobs: Make, tmp_path: Path) -> None:
    """Where nothing can be kept, who asks for a job gets 503, and predictions go on."""
    (tmp_path / "file").touch()
    with serving_jobs(jobs_folder=str(tmp_path / "file" / "x")) as client:
        assert ask(client).status_code == 503
        assert client.get("/v1/jobs").json() == {"jobs": [], "total": 0}
        assert client.post("/v1/models/iris:predict", json={"instances": [[5.1, 3.5, 1.4, 0.2]]}).status_code == 200
