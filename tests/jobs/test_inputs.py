"""Inputs that are not as they should be: an error that says so, the job's state true, and nothing of theirs read."""

from __future__ import annotations

import io
import os
import socket
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fastapi.testclient import TestClient
from pyarrow import parquet

from tests.jobs.conftest import NAMES, Shared, ask, expected, finished, flowers, send, services

HEADER = ",".join(NAMES)
ROW = "5.1,3.5,1.4,0.2"
PARQUET = "application/vnd.apache.parquet"


def written(**columns: list[Any]) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pa.table(columns), sink)
    return sink.getvalue()


WHOLE = written(**{name: [1.0] * 1000 for name in NAMES})


@pytest.mark.parametrize(
    ("kind", "content", "said"),
    [
        ("text/csv", f"{HEADER.replace('petal_width', 'petal_wide')}\n{ROW}\n".encode(), "petal_wide"),
        ("text/csv", f"{HEADER.removesuffix(',petal_width')}\n5,3,1\n".encode(), "petal_width: is missing"),
        ("text/csv", f"{HEADER},colour\n{ROW},red\n".encode(), "colour"),
        ("text/csv", f"{HEADER}\n{ROW}\n".encode("utf-16"), "UTF-16"),
        ("application/x-ndjson", '{"a": 1}\n'.encode("utf-16-le"), "UTF-16"),
        (PARQUET, f"{HEADER}\n{ROW}\n".encode(), "Parquet"),
        (PARQUET, WHOLE[: len(WHOLE) // 2], "Parquet"),
        (PARQUET, WHOLE[:1000] + b"\0" * 200 + WHOLE[1200:], "Parquet"),
        (PARQUET, written(**{name: ["x"] for name in NAMES}), "numbers"),
        (PARQUET, written(sepal_length=[1.0]), "is missing"),
        (PARQUET, written(**{name: [1.0] for name in [*NAMES, "a\0b"]}), "a\ufffdb"),
    ],
    ids=["misnamed", "missing", "extra", "utf-16", "json", "no parquet", "cut", "broken", "types", "columns", "NUL"],
)
def test_a_file_that_does_not_fit_fails_its_job(client: TestClient, kind: str, content: bytes, said: str) -> None:
    """What can't be read as what it is said to be, or has other columns, fails the job and names what is wrong."""
    job = finished(client, send(client, content, kind))
    assert (job["state"], said in job["error"]) == ("failed", True), job
    assert client.get(f"/v1/jobs/{job['id']}/result").status_code == 409


@pytest.mark.parametrize(
    "content",
    [
        f"{HEADER}\n{ROW}\n\n{ROW}".encode(),
        b"\xef\xbb\xbf" + f"{HEADER}\r\n{ROW}\r\n{ROW}\r\n".encode(),
        f'"sepal_length",{HEADER.removeprefix("sepal_length,")}\n"5.1",3.5,1.4,0.2\n{ROW}\n'.encode(),
        f"{','.join(reversed(NAMES))}\n0.2,1.4,3.5,5.1\n0.2,1.4,3.5,5.1\n".encode(),
    ],
    ids=["blank lines", "bom and crlf", "quotes", "reordered"],
)
def test_csv_is_read_as_it_is_written_everywhere(client: TestClient, content: bytes) -> None:
    """A byte order mark, CRLF, quotes, blank lines and another order of columns change no answer."""
    job = finished(client, send(client, content))
    assert (job["state"], job["rows_good"], job["rows_bad"]) == ("succeeded", 2, 0), job


def test_rows_of_mixed_types_and_endless_lines_are_bad_rows(client: TestClient) -> None:
    """Cells of another type, and a line that does not end, cost their own row; those behind are answered."""
    rows = [ROW, "5.1,wide,1.4,0.2", ROW, "1," + "9" * (5 << 20), ROW]
    job = finished(client, send(client, "\n".join([HEADER, *rows]).encode()))
    assert (job["state"], job["rows_good"], job["rows_bad"]) == ("succeeded", 3, 2), job
    errors = client.get(f"/v1/jobs/{job['id']}/errors").text
    assert '"line":3,"path":"/sepal_width"' in errors
    assert '"line":5' in errors


@pytest.mark.parametrize("content", [b"", f"{HEADER}\n".encode()], ids=["nothing", "a header"])
def test_an_input_without_rows(client: TestClient, content: bytes) -> None:
    """An empty body is refused; a header alone gives a result of a header alone."""
    made = send(client, content, output="csv")
    if not content:
        assert (made.status_code, "empty" in made.json()["error"]) == (400, True)
        return
    job = finished(client, made)
    assert (job["state"], job["rows_good"], job["rows_bad"]) == ("succeeded", 0, 0), job
    assert client.get(f"/v1/jobs/{job['id']}/result").text.count("\n") == 1


def asked(client: TestClient, url: str) -> Any:
    return client.post("/v1/jobs", json={"model": "iris", "url": url, "output": "ndjson", "input": "csv"})


def test_only_what_is_below_allowed_folders_is_read(shared: Shared, client: TestClient, tmp_path: Path) -> None:
    """A path elsewhere, by `..` or by links too, is refused as one that is not there is: nothing tells them apart."""
    inside, secret = shared.folder / "in", tmp_path / "secret.csv"
    secret.write_text(f"{HEADER}\n{ROW}\n")
    (inside / "good.csv").write_text(f"{HEADER}\n{ROW}\n")
    for name, target in (("link.csv", secret), ("folder", tmp_path), ("near.csv", inside / "good.csv")):
        (inside / name).unlink(missing_ok=True)
        (inside / name).symlink_to(target)
    for url in (
        inside / "good.csv",
        f"file://{inside}/good.csv",
        inside / "near.csv",
        inside / ".." / "in" / "good.csv",
    ):
        assert finished(client, asked(client, str(url)))["rows_good"] == 1, url
    outside = [
        secret, tmp_path / "none.csv", inside / ".." / ".." / "etc" / "passwd", "/etc/passwd", inside / "link.csv",
        inside / "folder" / "secret.csv", f"{inside}x/good.csv", f"file://{secret}", "/proc/self/environ",
        "s3://bucket/in/good.csv",
    ]  # fmt: skip
    answers = [asked(client, str(url)) for url in outside]
    assert {(answer.status_code, answer.json()["error"]) for answer in answers} == {(403, answers[0].json()["error"])}
    assert "--jobs-inputs" in answers[0].json()["error"]
    os.mkfifo(inside / "pipe.csv")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))  # the path of a socket is short
        os.link(tmp_path / "s", inside / "socket.csv")
        for wrong in ("none.csv", "pipe.csv", "socket.csv", "", "folder\0.csv"):
            assert asked(client, f"{inside}/{wrong}").status_code == 400, wrong
    for wrong in ("good.csv", "ftp://x/good.csv", "s3://bucket/a/../b", "s3://bucket", "s3://u:p@bucket/a"):
        assert asked(client, wrong).status_code == 400, wrong
    for left in inside.iterdir():
        left.unlink()


def test_a_link_that_is_put_in_place_later_is_not_followed(
    shared: Shared, client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An input that becomes a link to elsewhere, or another file, after the job was asked for, fails it."""
    file, secret = shared.folder / "in" / "later.csv", tmp_path / "secret.csv"
    secret.write_text(f"{HEADER}\n{ROW}\n")
    pieces = services(client).runner.pieces
    do = pieces.do
    for change, said in (
        (lambda: file.symlink_to(secret), "not below"),
        (lambda: file.write_text(f"{HEADER}\n{ROW}\n{ROW}\n"), "has changed"),
    ):
        file.write_text(f"{HEADER}\n{ROW}\n")

        async def late(claimed: Any, change: Any = change) -> None:
            if claimed.piece.kind == "score":
                file.unlink()
                change()
            await do(claimed)

        monkeypatch.setattr(pieces, "do", late)
        job = finished(client, asked(client, str(file)))
        assert (job["state"], said in job["error"]) == ("failed", True), job
        file.unlink()


def test_many_rows_of_a_parquet_with_large_groups(shared: Shared, client: TestClient) -> None:
    """Pieces that begin amid a row group, and end amid another, have each row once."""
    rows = flowers(2600)
    parquet.write_table(
        pa.table({name: rows[:, i] for i, name in enumerate(NAMES)}),
        shared.folder / "in" / "rows.parquet",
        row_group_size=1111,
    )
    asking = {"model": "iris", "url": f"{shared.folder}/in/rows.parquet", "output": "parquet"}
    job = finished(client, client.post("/v1/jobs", json=asking))
    result = parquet.read_table(io.BytesIO(client.get(f"/v1/jobs/{job['id']}/result").content))
    assert result["label"].to_pylist() == expected(rows)[0]


def test_rows_in_the_request_are_bounded(client: TestClient) -> None:
    """A request with more bytes of rows than a request may have is refused, and a file of them is not."""
    # Rows in the request are read in one go, beside whoever predicts.
    refused = ask(client, [[1.0, 2.0, 3.0, 4.0]] * 60_000)
    assert (refused.status_code, "send the rows as a file" in refused.text) == (413, True)
