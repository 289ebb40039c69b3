"""Which library a sentence of documentation is about: TF-IDF over real docstrings, one string input."""

import importlib
import inspect
import re
from types import ModuleType

import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline

from serving.export import Exported, export

MODULES = {
    "arrays": ("numpy", "numpy.linalg", "numpy.fft", "numpy.random"),
    "learning": ("sklearn.ensemble", "sklearn.linear_model", "sklearn.cluster", "sklearn.metrics", "sklearn.svm"),
    "statistics": ("scipy.stats",),
    "tables": ("pandas",),
}


def train() -> Exported:
    """Fit TF-IDF and logistic regression on docstring sentences."""
    texts = [(text, topic) for topic, names in MODULES.items() for text in _sentences(names)]
    rows = pd.DataFrame({"text": [text for text, _ in texts]})
    topics = [topic for _, topic in texts]
    train, held_out, y_train, y_test = train_test_split(rows, topics, random_state=0, stratify=topics, test_size=0.2)
    model = make_pipeline(
        TfidfVectorizer(max_features=1500, token_pattern="[a-zA-Z]{2,}"),
        LogisticRegression(max_iter=1000, C=10),
    )
    model.fit(train.text.tolist(), y_train)
    return export(
        model,
        train=train,
        held_out=held_out,
        metrics={"accuracy": model.score(held_out.text.tolist(), y_test)},
        description="Topic of a sentence from a scientific Python library's documentation",
    )


def _sentences(names: tuple[str, ...]) -> list[str]:
    found: dict[str, None] = {}
    for name in names:
        module = importlib.import_module(name)
        for member in sorted(getattr(module, "__all__", dir(module))):
            for text in _docs(module, member):
                found.update(dict.fromkeys(re.findall(r"[A-Z][A-Za-z ,'-]{30,200}\.", text)))
    return list(found)[:1500]


def _docs(module: ModuleType, member: str) -> list[str]:
    value = getattr(module, member, None)
    inner = [getattr(value, n, None) for n in sorted(vars(value))] if inspect.isclass(value) else []
    return [inspect.getdoc(item) or "" for item in (value, *inner) if callable(item)]
