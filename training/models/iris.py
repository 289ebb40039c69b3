"""Iris species from four named measurements: two versions of one model."""

from typing import Any

from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from serving.export import Exported, export


def logistic() -> Exported:
    """Version 1: logistic regression."""
    return _fit(LogisticRegression(max_iter=1000), "Iris species, logistic regression")


def forest() -> Exported:
    """Version 2: a small random forest."""
    return _fit(RandomForestClassifier(32, max_depth=4, random_state=0), "Iris species, random forest")


def _fit(model: Any, description: str) -> Exported:
    data = load_iris(as_frame=True)
    rows = data.data.rename(columns=lambda name: name.replace(" (cm)", "").replace(" ", "_")).astype("float32")
    species = data.target_names[data.target]
    train, held_out, y_train, y_test = train_test_split(rows, species, random_state=0, stratify=species)
    model.fit(train, y_train)
    units = {name: f"{name.replace('_', ' ')} in cm" for name in rows.columns}
    metrics = {"accuracy": model.score(held_out, y_test)}
    return export(model, train=train, held_out=held_out, metrics=metrics, description=description, descriptions=units)
