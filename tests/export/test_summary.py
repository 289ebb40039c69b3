"""What an export shows of itself, in a notebook and in a terminal."""

from __future__ import annotations

import io
from html.parser import HTMLParser

import pandas as pd
import pytest
from rich.console import Console
from sklearn.linear_model import LogisticRegression

from serving.export import Exported, export

pytestmark = pytest.mark.filterwarnings("ignore")  # the converters' own deprecations are not ours to mend

TRAIN = pd.DataFrame({"height": [0.5, 1.0, 2.0, 3.0, 2.5, 0.75], "<b>width": [1.0, 2.0, 3.0, 4.0, 3.5, 1.5]})


@pytest.fixture(scope="module")
def exported() -> Exported:
    model = LogisticRegression().fit(TRAIN, ["low", "low", "high", "high", "high", "low"])
    return export(model, train=TRAIN, held_out=TRAIN, metrics={"accuracy": 0.875}, description="Tall or not")


class Cells(HTMLParser):
    """The texts of a fragment, and its tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_notebook_shows_signature_parity_worst_row_and_metrics(exported: Exported) -> None:
    """The last line of a cell is a table of features, outputs, parity, the worst row and metrics; names are escaped."""
    found = Cells(exported._repr_html_())
    assert {"Tall or not", "height", "<b>width", "label", "accuracy", "0.875", "6"} <= set(found.texts)
    assert "b" not in found.tags
    assert exported.worst is not None
    assert any(text.startswith(f"{exported.worst.index}: height") for text in found.texts)
    assert any(text.startswith("probabilities: the original says") for text in found.texts)


def test_a_terminal_shows_the_same(exported: Exported) -> None:
    """repr, str, print and rich.print show the tables, and no bytes of the file."""
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(exported)
    for text in (repr(exported), str(exported), console.export_text()):
        for word in (
            "Tall or not",
            "height",
            "<b>width",
            "the class: high, low",
            "worst row",
            "0.875",
            "share batches",
        ):
            assert word in text
        assert "\\x" not in text


def test_the_worst_row_is_the_one_that_differs_most(exported: Exported) -> None:
    """The worst row's difference is the largest of all held-out rows, and its values are the row's."""
    worst, parity = exported.worst, exported.signature.parity
    assert worst is not None
    assert parity is not None
    assert worst.row == TRAIN.iloc[worst.index].to_dict()
    assert max(abs(a - b) for a, b in zip(worst.expected, worst.actual, strict=True)) == parity.max_difference
