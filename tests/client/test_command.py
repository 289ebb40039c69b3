"""`serving predict`: rows in, a prediction a line out."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from serving.command_line import app
from tests.client.conftest import Addresses

ROW = '{"sepal_length": 5.1, "sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2}'
CSV = "sepal_length,sepal_width,petal_length,petal_width\n5.1,3.5,1.4,0.2\n6.7,3.0,5.2,2.3\n"
Predict = Callable[..., Result]


@pytest.fixture
def predict(addresses: Addresses) -> Predict:
    """The command in this process, asking the shared server."""
    return lambda *args, given=None: CliRunner().invoke(
        app, ["predict", *args], input=given, env={"SERVING_URL": addresses.http}
    )


def _labels(result: Result) -> list[str]:
    assert result.exit_code == 0, result.output
    return [json.loads(line)["label"] for line in result.stdout.splitlines()]


def test_rows_as_they_are_written(predict: Predict) -> None:
    """An object, an array of values and an array of rows are rows; each prediction is a line of JSON."""
    assert _labels(predict("iris", ROW)) == ["setosa"]
    assert _labels(predict("iris", ROW, "[6.7, 3.0, 5.2, 2.3]")) == ["setosa", "virginica"]
    assert _labels(predict("iris", f"[{ROW}, {ROW}]", "--version", "1")) == ["setosa"] * 2


def test_rows_of_a_file(predict: Predict, tmp_path: Path) -> None:
    """A CSV is read by its header, with an empty cell as a missing value; other files are JSON, a row a line."""
    table = tmp_path / "rows.csv"
    table.write_text(CSV)
    assert _labels(predict("iris", "--data", str(table))) == ["setosa", "virginica"]
    table.write_text(CSV.splitlines()[0] + "\n" + "5.1,3.5,1.4,0.2\n" * 1500)
    assert _labels(predict("iris", "--data", str(table), "--label", "stable")) == ["setosa"] * 1500
    assert _labels(predict("iris", "--data", "-", given=f"{ROW}\n\n{ROW}\n")) == ["setosa"] * 2
    table.write_text("island,sex,bill_length_mm,bill_depth_mm,flipper_length_mm,body_mass_g\nBiscoe,,,,,\n")
    columns = json.loads(predict("penguins", "--data", str(table)).stdout or "{}")
    assert columns.get("label") in {"Adelie", "Chinstrap", "Gentoo"}


def test_what_is_wrong_is_one_line_and_a_status(predict: Predict, tmp_path: Path) -> None:
    """Bad rows are status 2 with the row and the feature, as the file counts them; what can't be answered is 1."""
    table = tmp_path / "rows.csv"
    table.write_text(CSV.splitlines()[0] + "\n" + "5.1,3.5,1.4,0.2\n" * 1500 + "5.1,3.5,many,0.2\n")
    for args, status, said in (
        (("iris", "--data", str(table)), 2, "row 1501, petal_length: should be a number"),
        (("iris", "{"), 2, "row 1: the body is not JSON"),
        (("iris",), 2, "--data"),
        (("iris", ROW, "--data", str(table)), 2, "--data"),
        (("iris", "--data", str(tmp_path / "none.csv")), 2, "can't be read"),
        (("rose", ROW), 1, "no model is called 'rose'"),
        (("iris", ROW, "--url", "http://127.0.0.1:1"), 1, "can't be reached"),
    ):
        result = predict(*args)
        assert (result.exit_code, said in result.stderr) == (status, True), (args, result.output)
        assert len(result.stderr.splitlines()) == 1


def test_a_terminal_shows_a_table(addresses: Addresses) -> None:
    """On a terminal, people get a table with a column for each class."""
    own, theirs = pty.openpty()
    command = [sys.executable, "-m", "serving.cli", "predict", "iris", ROW, "--url", addresses.http]
    with subprocess.Popen(command, stdout=theirs, env={**os.environ, "COLUMNS": "100", "TERM": "dumb"}):
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(own, 4096)
            except OSError:  # how the end of a terminal shows
                break
    os.close(own)
    lines = shown.decode().split("\r\n")
    assert ["label", "setosa", "versicolor", "virginica"] in [line.split() for line in lines]
    assert ["setosa", "1", "0", "0"] in [line.split() for line in lines]
