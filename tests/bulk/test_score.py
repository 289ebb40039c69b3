"""`serving score`: every row of some files answered into one, whole or not at all, and going on after an end."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
from pyarrow import ipc
from typer.testing import CliRunner, Result

from serving.bulk.formats import answer_form
from serving.bulk.pieces import threads
from serving.bulk.remote import Remote
from serving.bulk.scoring import AnsweringModel, Scoring, locally
from serving.command_line import app
from serving.commands import score as score_command
from serving.errors import NotReady
from tests.bulk.test_formats import IRIS, described, ndjson, session
from tests.conftest import MODELS

ROWS = pd.DataFrame(np.random.default_rng(3).uniform(0.1, 8, (40_000, 4)).round(2), columns=list(IRIS))
Wait = Callable[[Callable[[], bool]], None]


def score(*arguments: object, **given: Any) -> Result:
    return CliRunner().invoke(app, ["score", *map(str, arguments), "--version", "1", "--models", str(MODELS)], **given)


def write(path: Path, rows: pd.DataFrame) -> Path:
    if path.suffix == ".csv":
        rows.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        rows.to_parquet(path, row_group_size=7000)
    else:
        path.write_bytes(ndjson(rows.to_dict("records")))
    return path


def load(path: Path) -> pd.DataFrame:
    """Read answers as columns."""
    if path.suffix == ".csv":
        return pd.read_csv(path)
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return pd.json_normalize([line.get("prediction", {}) | {"error": line.get("error", {})} for line in lines])


def expected(rows: pd.DataFrame) -> tuple[Any, Any]:
    """Give labels and probabilities as onnxruntime alone computes them."""
    labels, scores = session("iris").run((rows.to_numpy(np.float32),))
    return labels, scores


@pytest.mark.parametrize(("given", "wanted"), [("csv", "parquet"), ("parquet", "csv"), ("ndjson", "ndjson")])
def test_every_row_has_its_answer(tmp_path: Path, given: str, wanted: str) -> None:
    """Whatever the formats, row for row what the model says."""
    out = tmp_path / f"out.{wanted}"
    result = score(write(tmp_path / f"rows.{given}", ROWS), "--model", "iris", "--out", out)
    assert result.exit_code == 0, result.output
    assert "40,000 rows answered in" in result.stderr
    labels, scores = expected(ROWS)
    frame = load(out)
    assert frame["label"].tolist() == labels.tolist()
    names = [f"probabilities.{c}" for c in described("iris").signature.classes or ()]
    assert frame[names].to_numpy(np.float32) == pytest.approx(scores, rel=1e-5)
    assert {path.name for path in tmp_path.iterdir()} == {f"rows.{given}", out.name}


def test_files_by_pattern_are_one_after_the_other(tmp_path: Path) -> None:
    """In the order of their names, with the index that pandas writes left out."""
    for part in range(3):
        write(
            tmp_path / f"part-{part}.parquet", ROWS[part * 100 : part * 100 + 100].set_index(pd.Index(range(100, 200)))
        )
    out = tmp_path / "out.csv"
    assert score(tmp_path / "part-*.parquet", "-m", "iris", "-o", out).exit_code == 0
    assert load(out)["label"].tolist() == expected(ROWS[:300])[0].tolist()


def test_standard_input_and_output(tmp_path: Path) -> None:
    """A dash is a pipe; what it holds is said by options, and is NDJSON without."""
    result = score("-", "-m", "iris", input=ndjson([IRIS, IRIS]))
    assert [json.loads(line)["prediction"]["label"] for line in result.stdout.splitlines()] == ["setosa"] * 2
    result = score("-", "-m", "iris", "--format", "csv", "--out-format", "arrow", input=ROWS[:9].to_csv(index=False))
    assert len(ipc.open_stream(result.stdout_bytes).read_all()) == 9
    for wrong in (["--format", "parquet"], ["--out-format", "parquet"], ["--format", "xls"]):
        assert score("-", "-m", "iris", *wrong, input="").exit_code == 2


def test_bad_rows_are_told_and_the_status_says_so(tmp_path: Path) -> None:
    """They have their place in the answers, and a file of their own; the first are shown."""
    first, second = tmp_path / "a.ndjson", tmp_path / "b.csv"
    first.write_bytes(ndjson([IRIS, IRIS | {"petal_width": "x"}, IRIS]))
    second.write_text(",".join(IRIS) + "\n1,2,,4\n1,2,3,4\n")
    out, errors = tmp_path / "out.csv", tmp_path / "bad.ndjson"
    result = score(first, second, "-m", "iris", "-o", out, "--errors", errors)
    assert result.exit_code == 3
    assert "3 rows answered, 2 bad" in result.stderr
    assert f"{first}, line 2: /petal_width: should be a number, and is a string" in result.stderr
    told = [json.loads(line) for line in errors.read_text().splitlines()]
    assert [(bad["file"], bad["line"], bad["path"]) for bad in told] == [
        (str(first), 2, "/petal_width"),
        (str(second), 2, "/petal_length"),
    ]
    assert load(out)["error.line"].fillna(0).tolist() == [0, 2, 0, 2, 0]


def test_more_bad_rows_than_may_be_end_it(tmp_path: Path) -> None:
    """However often it is tried, nothing is under the final name; with a greater number the same command goes on."""
    rows = tmp_path / "rows.ndjson"
    rows.write_bytes(ndjson([IRIS, 5, 6, IRIS]))
    out = tmp_path / "out.parquet"
    for _ in range(2):
        result = score(rows, "-m", "iris", "-o", out, "--max-bad", 1)
        assert result.exit_code == 1
        assert "more than 1 rows are bad" in result.stderr
        assert not out.exists()
    assert score(rows, "-m", "iris", "-o", out, "--max-bad", 2).exit_code == 3
    assert len(load(out)) == 4


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.csv", b"sepal_length,petal_wide\n1,2\n", "sepal_width is missing"),
        ("rows.parquet", b"PAR1 is not all of it", "the Parquet file can't be read"),
        ("rows.csv", "a,b\n".encode("utf-16"), "send it as UTF-8"),
        ("rows.txt", b"", "can't be told from its name"),
    ],
)
def test_files_that_can_not_be_read_are_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    """With what is wrong, and nothing is left behind."""
    (tmp_path / name).write_bytes(content)
    result = score(tmp_path / name, "-m", "iris", "-o", tmp_path / "out.csv")
    assert result.exit_code == 2
    assert said in result.stderr
    assert name in result.stderr
    assert not (tmp_path / "out.csv").exists()


def test_wrong_tasks_are_refused(tmp_path: Path) -> None:
    """A file that is not there, a model that is not there, an output that is an input, a folder that is not there."""
    rows = write(tmp_path / "rows.csv", ROWS[:3])
    assert score("nothing-*.csv", "-m", "iris").exit_code == 2
    for url in ("127.0.0.1:80", "http://[::1", "http://x:99999"):
        assert score(rows, "-m", "iris", "--url", url).exit_code == 2
    assert "there is no version 1 of nobody" in score(rows, "-m", "nobody").stderr
    (tmp_path / "link.csv").symlink_to(rows)
    for wrong in (rows, tmp_path / ".." / tmp_path.name / "rows.csv", tmp_path / "link.csv", tmp_path):
        assert score(rows, "-m", "iris", "-o", wrong, "--out-format", "csv").exit_code == 2
        assert score(rows, "-m", "iris", "--errors", wrong).exit_code == 2
    assert score(rows, "-m", "iris", "-o", tmp_path / "a.csv", "--errors", tmp_path / "a.csv").exit_code == 2
    assert rows.read_text().startswith("sepal_length")
    result = score(rows, "-m", "iris", "-o", tmp_path / "no" / "out.csv")
    assert result.exit_code == 2
    assert "no such file or directory" in result.stderr


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    """The second ends, and leaves alone what the first has written."""
    rows, part = write(tmp_path / "rows.csv", ROWS[:3]), tmp_path / ".out.csv.part"
    with part.open("w") as first:
        first.write("its rows")
        first.flush()
        fcntl.flock(first, fcntl.LOCK_EX)
        result = score(rows, "-m", "iris", "-o", tmp_path / "out.csv")
        assert (result.exit_code, part.read_text()) == (2, "its rows")
        assert "another run writes it now" in result.stderr
    assert score(rows, "-m", "iris", "-o", tmp_path / "out.csv").exit_code == 0


def test_where_answers_find_no_room_it_could_not_be_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is no fault of what was asked for, and has the status of what can be tried again."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Scoring, "_take", full)
    result = score(write(tmp_path / "rows.csv", ROWS[:3]), "-m", "iris")
    assert (result.exit_code, "no space left on device" in result.stderr) == (1, True), result.stderr


@pytest.mark.parametrize("server", ["silent", "away"])
def test_who_ends_does_not_wait_for_a_server(server: str) -> None:
    """One that says nothing, or is to be tried again later: a thread that asks it ends with the command."""
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as pool:
        remote = Remote(f"http://127.0.0.1:{listening.getsockname()[1]}", None, "iris", None)
        asking = pool.submit(remote.describe)
        with listening.accept()[0] as peer:
            assert peer.recv(1000)
            if server == "away":
                listening.close()
                peer.close()
            remote.close()
            assert isinstance(asking.exception(20), NotReady)


def test_who_interrupts_a_pipe_is_not_told_that_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written to standard output, or came from standard input, would have to be done again."""
    monkeypatch.setattr(Scoring, "_take", Mock(side_effect=KeyboardInterrupt))
    rows, out = write(tmp_path / "rows.csv", ROWS[:3]), tmp_path / "out.csv"
    for task, goes_on in (((rows, "-o", out), True), ((rows,), False), (("-", "--format", "csv", "-o", out), False)):
        result = score(*task, "-m", "iris", input=rows.read_text())
        assert (result.exit_code, "goes on from there" in result.stderr) == (130, goes_on), result.stderr


@pytest.mark.parametrize(
    ("env", "shown"),
    [({}, r"rows answered, [\d,]+ rows/s, \d+%, \d+ s left"), ({"FORCE_COLOR": "1"}, r"\d+%.*\d:\d\d:\d\d.*rows/s")],
)
def test_how_far_it_is_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], shown: str
) -> None:
    """Rows a second, share and time left: as a bar on a terminal, else in a line every few seconds."""
    monkeypatch.setattr(score_command, "_LINE_S", 0)
    rows = write(tmp_path / "rows.ndjson", pd.concat([ROWS] * 3))
    result = score(rows, "-m", "iris", "-o", tmp_path / "out.csv", env=env)
    assert result.exit_code == 0
    assert re.search(shown, result.stderr), result.stderr[-500:]


class Ended(Exception):
    """Ends a run amid."""


@pytest.mark.parametrize("given", ["csv", "ndjson", "parquet"])
@pytest.mark.parametrize("wanted", ["csv", "parquet"])
def test_what_was_ended_goes_on(tmp_path: Path, given: Any, wanted: Any) -> None:
    """However often it ends, and whatever was written after the last note: no row twice, none missing."""
    files: list[tuple[Path | None, Any]] = []
    for part in range(2):
        rows = pd.concat([ROWS] * 3)[part * 60_000 : part * 60_000 + 60_000]
        rows = rows.astype(object)
        if given != "parquet":
            rows.iloc[777, 2] = "bad"
        files.append((write(tmp_path / f"{part}.{given}", rows if given != "parquet" else rows.astype(float)), given))
    out, errors = tmp_path / f"out.{wanted}", tmp_path / "errors.ndjson"
    form = answer_form(wanted, described("iris"))
    runs = 0
    while not out.exists():
        runs += 1
        scoring = Scoring(
            files,
            AnsweringModel(
                described("iris"), locally(session("iris").run, described("iris"), form.rows), wanted, form, "iris 1"
            ),
            out,
            io.BytesIO(),
            errors=errors,
            max_bad=None,
            engine=threads(2),
        )
        assert scoring.resume() == (runs > 1)
        try:
            scoring.run(end_after(3))
        except Ended:
            with (tmp_path / f".out.{wanted}.part").open("ab") as part_file:
                part_file.write(b"half a row")
    assert runs > 1
    frame = load(out)
    labels, _ = expected(pd.concat([ROWS] * 3))
    good = frame["error.line"].isna() if given != "parquet" else np.ones(len(frame), bool)
    assert len(frame) == 120_000
    assert (frame["label"][good].to_numpy() == labels[good]).all()
    if given != "parquet":
        assert [json.loads(line)["file"] for line in errors.read_text().splitlines()] == [
            str(path) for path, _ in files
        ]
        assert np.flatnonzero(~good).tolist() == [777, 60_777]


def end_after(pieces: int) -> Callable[[float], None]:
    seen = iter(range(pieces))

    def tell(share: float) -> None:
        assert 0 <= share <= 1
        if next(seen, None) is None:
            raise Ended

    return tell


def test_an_interrupt_leaves_what_the_same_command_goes_on_from(tmp_path: Path, eventually: Wait) -> None:
    """Ctrl-C has a status of its own, and says that nothing is lost; other files are another task."""
    rows = write(tmp_path / "rows.csv", pd.concat([ROWS] * 20))
    out = tmp_path / "out.csv"
    command = ["score", str(rows), "--model", "iris", "--version", "1", "--out", str(out), "--models", str(MODELS)]
    running = subprocess.Popen([sys.executable, "-m", "serving.cli", *command], stderr=subprocess.PIPE, text=True)
    eventually((tmp_path / ".out.csv.progress").exists)
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=20)
    assert running.returncode == 130, told
    assert "interrupted; the same command goes on from there" in told
    assert not out.exists()
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    assert "goes on behind" in result.stderr
    assert len(load(out)) == 20 * len(ROWS)
    assert load(out)["label"].tolist()[-5:] == expected(ROWS[-5:])[0].tolist()
