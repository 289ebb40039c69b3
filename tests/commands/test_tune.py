"""`serving tune`: what is tried, which of it is chosen, and what becomes of model.toml."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serving.command_line import app
from serving.commands import tune
from serving.engine.tuning import Load, Trial, best, settings
from tests.conftest import MODELS


def trial(threads: int, instances: int, rows_per_s: float, p99_ms: float) -> Trial:
    return Trial(threads, instances, 16, rows_per_s, p99_ms / 2e3, p99_ms / 1e3)


def test_the_fastest_that_keeps_the_bound_is_chosen() -> None:
    """Throughput decides among those whose p99 is short enough; of equals, the one that takes fewer threads."""
    slow, fast, late = trial(1, 1, 100, 1), trial(1, 2, 200, 5), trial(2, 2, 400, 20)
    assert best([slow, fast, late], 0.010) is fast
    assert best([slow, fast, late], 1) is late
    assert best([slow, fast, late], 0.0001) is None
    frugal = trial(1, 1, 198, 5)
    assert best([slow, fast, frugal], 0.010) is frugal


@pytest.mark.parametrize("cores", [1, 2, 6, 16])
def test_what_is_tried_fits_the_machine(cores: int) -> None:
    """No setting takes more threads than there are cores; one of them takes all; each size of session loads once."""
    tried = list(settings(cores, Load(callers=32, rows=1, seconds=1), together=True))
    assert max(threads * instances for threads, instances, _ in tried) == cores
    assert (1, 1, 1) in tried
    assert max(batch for _, _, batch in tried) >= 32
    assert [threads for threads, _, _ in tried] == sorted(threads for threads, _, _ in tried)
    assert {batch for _, _, batch in settings(cores, Load(32, 1, 1), together=False)} == {1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models")
    shutil.copytree(MODELS / "iris" / "1", made / "iris" / "1")
    return made


@pytest.fixture
def models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tune, "cores", lambda: 1)
    yield folder
    (folder / "iris" / "model.toml").unlink(missing_ok=True)


def run(models: Path, *flags: str) -> tuple[int, str]:
    arguments = ["tune", "iris", "--models", str(models), "--callers", "4", "--seconds", "0.05", *flags]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "100"})
    return result.exit_code, result.output


def test_the_best_is_written_beside_what_else_is_set(models: Path, tmp_path: Path) -> None:
    """The best goes into model.toml, whose other keys and comments stay; a table and a picture show all."""
    file = models / "iris" / "model.toml"
    file.write_text("# of the fraud team\n[limits]\ndeadline_s = 3  # short\n[batching]\nmax_delay_ms = 0\n")
    code, said = run(models, "--p99-ms", "60000", "--plot", str(tmp_path / "iris.png"))
    assert code == 0, said
    assert "best" in said
    assert (tmp_path / "iris.png").read_bytes().startswith(b"\x89PNG")
    text = file.read_text()
    assert text.startswith("# of the fraud team\n")
    assert "deadline_s = 3  # short" in text
    found = tomllib.loads(text)
    assert found["batching"]["max_batch_rows"] in (1, 4)
    assert found["batching"]["max_delay_ms"] == 0
    assert found["execution"] == {"threads": 1, "instances": 1}


def test_nothing_is_written_that_was_not_asked_for(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a bound, with one that nothing keeps, and without the library that writes, no file is made."""
    monkeypatch.setattr(tune, "track", lambda trials, *_, **__: list(trials)[:1])
    assert run(models)[0] == 0
    code, said = run(models, "--p99-ms", "0.001")
    assert (code, "no setting keeps a p99 of 0.001 ms" in said) == (2, True)
    monkeypatch.setattr(tune.importlib, "import_module", lambda name: exec("raise ImportError"))
    code, said = run(models, "--p99-ms", "10")
    assert (code, "pip install 'serving[tune]'" in said) == (2, True)
    assert not (models / "iris" / "model.toml").exists()
    code, said = run(models, "--version", "7")
    assert (code, "there is no version 7 of iris" in said) == (1, True)
