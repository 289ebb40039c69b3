"""Malignant or benign from 30 measurements of cell nuclei: a boosted-tree classifier."""

from lightgbm import LGBMClassifier
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split

from serving.export import Exported, export


def train() -> Exported:
    """Fit LightGBM on scikit-learn's breast cancer data."""
    data = load_breast_cancer(as_frame=True)
    rows = data.data.astype("float32")
    train, held_out, y_train, y_test = train_test_split(rows, data.target, random_state=0, stratify=data.target)
    model = LGBMClassifier(n_estimators=60, num_leaves=15, random_state=0, n_jobs=1, verbose=-1, deterministic=True)
    model.fit(train.to_numpy(), y_train)
    metrics = {"accuracy": model.score(held_out.to_numpy(), y_test)}
    return export(
        model,
        train=train,
        held_out=held_out,
        classes=[str(name) for name in data.target_names],
        metrics=metrics,
        description="Malignant or benign tumour, LightGBM",
    )
