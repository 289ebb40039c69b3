"""Drift: what is counted, when an alarm fires and when it does not, and what users see of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from scipy.spatial.distance import jensenshannon
from scipy.stats import chi2, chi2_contingency, fisher_exact
from sklearn.datasets import load_iris

from serving.engine.reference import Column, reference_of
from serving.monitoring.drift_test import Comparison, chi_square_beyond, compare, drifted
from serving.monitoring.tally import ABOVE, MISSING, OTHER, Tally
from tests.commands.test_command import command
from tests.conftest import MODELS, running

Wait = Callable[..., None]
LEARNS = "[drift]\nwindow_rows = 100\nlearn_rows = 100\n[privacy]\nsensitive = ['sepal_length']"


def tally(values: Any, *, categorical: bool = False) -> Tally:
    column = Column("x", "input", 0, None, categorical)
    reference = reference_of(column, np.asarray(values))
    assert reference is not None
    return Tally(column, reference)


@pytest.mark.parametrize("degrees", [1, 2, 3, 8, 9, 40, 101])
def test_p_values_are_those_of_the_chi_square_distribution(degrees: int) -> None:
    """The tail is right where alarms are decided, as scipy has it."""
    for value in (0.0, 0.3, 5.0, 30.0, 150.0):
        assert chi_square_beyond(value, degrees) == pytest.approx(chi2.sf(value, degrees), rel=1e-9, abs=1e-300)


def test_two_samples_are_compared_as_textbooks_do() -> None:
    """p-value and Jensen-Shannon distance are scipy's, the PSI is its definition but for half a row a cell."""
    one, other = np.array([300, 400, 300]), np.array([150, 180, 170])
    found = compare(one, other)
    assert found.p_value == pytest.approx(chi2_contingency([one, other], correction=False).pvalue)
    assert found.jensen_shannon == pytest.approx(jensenshannon(one, other, base=2))
    p, q = one / one.sum(), other / other.sum()
    assert found.psi == pytest.approx(((q - p) * np.log(q / p)).sum(), rel=0.01)


def test_every_value_is_counted_once() -> None:
    """Ties, the ends, infinities, missing values, numbers beyond the reference and new categories have their places."""
    numbers = tally(np.array([0, 0, 1, 1, 1, 2, 5] * 30, np.float32))
    again = numbers.of(np.array([0, 0, 1, 1, 1, 2, 5] * 30, np.float32))
    assert again.tolist() == numbers.counts.tolist()
    counted = numbers.of(np.array([0, 5, -1, 6, np.inf, -np.inf, np.nan, 3], np.float32))
    assert counted.sum() == 8
    assert (counted[OTHER], counted[ABOVE], counted[MISSING]) == (2, 2, 1)
    texts = tally(["red"] * 5 + ["blue"] * 5 + [""], categorical=True)
    assert texts.of(np.array(["red", "green", "", "blue", "red"], object)).tolist() == [1, 2, 1, 0, 1]
    assert tally([True, False] * 9, categorical=True).of(np.array([True, True])).tolist() == [0, 2, 0, 0, 0]


@pytest.mark.parametrize("rows", [60, 300, 5000])
def test_alarms_are_for_shifts_and_not_for_chance(rows: int) -> None:
    """On training rows drawn again none of 40 windows of 30 features raises one, and a shift of one does in each.

    `python -m benchmarks.drift` does the same with thousands of windows.
    """
    random = np.random.default_rng(rows)
    train = random.normal(size=(rows, 30))
    train[:, :10] = np.exp(2 * train[:, :10])
    train[:, 10:15] = np.round(train[:, 10:15])
    tallies = [tally(column) for column in train.T]

    def alarm(window: Any) -> bool:
        return any(drifted([compare(t.counts, t.of(x)) for t, x in zip(tallies, window.T, strict=True)]))

    windows = [train[random.integers(0, rows, 1000)] for _ in range(40)]
    assert not any(map(alarm, windows))
    for window in windows[:5]:
        window[:, 20] += train[:, 20].std()
        assert alarm(window)


@pytest.mark.parametrize(
    ("train", "now"),
    [
        (np.full(1000, 5.0), np.full(1000, 7.0)),
        (np.full(1000, 5.0), np.full(1000, np.nan)),
        (np.arange(1000) >= 995, np.arange(1000) >= 700),
        (np.arange(1000) >= 990, np.full(1000, -999)),
        (["red"] * 1000, np.array(["blue"] * 1000, object)),
    ],
    ids=["constant", "missing", "seldom set", "out of range", "category"],
)
def test_columns_that_hardly_vary_are_compared_too(train: Any, now: Any) -> None:
    """A value that training hardly or never had raises the alarm, where nearly all of its rows had one value."""
    column = tally(train, categorical=isinstance(train, list))
    assert drifted([compare(column.counts, column.of(np.array(train))), compare(column.counts, column.of(now))]) == [
        False,
        True,
    ]


def test_rare_values_are_compared_as_scipy_does() -> None:
    """With nearly all rows in one cell the p-value is Fisher's, by twice its smaller tail."""
    for one, other in (([3, 997], [12, 400]), ([0, 20], [400, 600]), ([9, 991], [0, 1000])):
        tails = [fisher_exact([one, other], alternative=side).pvalue for side in ("less", "greater")]
        assert compare(np.array(one), np.array(other)).p_value == pytest.approx(2 * min(tails))


def test_many_columns_share_one_chance_of_a_false_alarm() -> None:
    """A p-value that alarms alone does not among thirty; what drifted for sure makes no other column suspicious."""
    sure = Comparison(0.5, 0.01, 0.3, 1e-12)
    doubtful = Comparison(0.5, 0.01, 0.3, 1e-4)
    tiny = Comparison(0.05, 0.01, 0.3, 1e-12)
    assert drifted([doubtful]) == [True]
    assert drifted([doubtful] * 30) == [False] * 30
    assert drifted([sure, *[doubtful] * 29]) == [True, *[False] * 29]
    assert drifted([tiny]) == [False]


def test_drift_is_seen_over_all_workers(tmp_path: Path, eventually: Wait) -> None:
    """Rows as in training are quiet, shifted ones raise the alarm: in the API, on /metrics and in the terminal."""
    models = tmp_path / "models"
    shutil.copytree(MODELS / "iris", models / "iris")
    (models / "iris" / "model.toml").write_text("[drift]\nwindow_rows = 400")
    shutil.copytree(MODELS / "iris" / "1", models / "learns" / "1")
    (models / "learns" / "model.toml").write_text(LEARNS)
    rows = load_iris().data
    random = np.random.default_rng(0)

    def asked(http: httpx.Client, name: str, shift: float = 0.0) -> None:
        some = rows[random.integers(0, len(rows), 200)] + [0, 0, shift, 0]
        for part in np.split(some, 4):
            given: dict[str, Any] = {"json": {"instances": part.tolist()}}
            if name == "learns":  # rows in bulk count as others do
                lines = "".join(f"{row}\n" for row in part.tolist())
                given = {"content": lines, "headers": {"content-type": "application/x-ndjson"}}
            assert http.post(f"/v1/models/{name}:predict", **given).status_code == 200

    with running("--workers", "2", models=models) as server, httpx.Client(base_url=server.url) as http:

        def state(name: str = "iris") -> Any:
            return http.get(f"/v1/models/{name}/drift").json()

        def filled(windows: int, shift: float = 0.0) -> bool:
            asked(http, "iris", shift)
            asked(http, "learns")
            return bool(state()["windows"] >= windows)

        eventually(lambda: filled(1))
        found = state()
        assert (found["status"], found["drifted_windows"]) == ("comparing", 0)
        assert found["window"]["rows"] >= 400
        names = [column["name"] for column in found["window"]["columns"]]
        assert names[:4] == ["sepal_length", "sepal_width", "petal_length", "petal_width"]
        assert "output label" in names
        windows = found["windows"]
        eventually(lambda: filled(windows + 1, 2.0) and state()["drifted_windows"] > 0)
        window = state()["window"]
        assert window["drifted"]
        by_name = {column["name"]: column for column in window["columns"]}
        assert by_name["petal_length"]["drifted"]
        assert not by_name["sepal_width"]["drifted"]
        assert by_name["petal_length"]["out_of_range"] > 0.1
        assert sum(by_name["petal_length"]["window"]) < window["rows"]

        def alarm() -> bool:
            samples = {
                (s.name, s.labels.get("feature")): s.value
                for family in text_string_to_metric_families(http.get("/metrics").text)
                for s in family.samples
                if s.labels.get("model", "iris") == "iris"
            }
            psi = {column["name"]: column["psi"] for column in state()["window"]["columns"]}
            shown = {name: samples.get(("serving_drift_psi", name)) for name in psi}
            return samples.get(("serving_drift_alarm", None)) == 1 and shown == pytest.approx(psi)

        eventually(alarm)
        shown = command("drift", "iris", "--url", server.url)
        assert shown.returncode == 0, shown.stderr
        assert "drifted in the last window" in shown.stdout
        assert shown.stdout.index("petal_length") < shown.stdout.index("sepal_width")

        def learned() -> Any:
            asked(http, "learns")
            # None is learned of what is sensitive.
            return state("learns")["windows"] and state("learns")["window"]["columns"][0]["name"] == "sepal_width"

        eventually(learned)
        (models / "iris" / "model.toml").write_text("[drift]\nenabled = false")
        eventually(lambda: state()["status"] == "off")
