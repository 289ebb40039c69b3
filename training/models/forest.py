"""A 100-tree forest on the breast cancer data: the benchmarks' model, not shipped."""

from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import train_test_split

from serving.export import Exported, export


def train() -> Exported:
    """Fit 100 trees on 30 features."""
    data = load_breast_cancer(as_frame=True)
    rows = data.data.astype("float32")
    train, held_out, y_train, y_test = train_test_split(rows, data.target, random_state=0, stratify=data.target)
    model = RandomForestClassifier(100, random_state=0).fit(train, y_train)
    return export(
        model,
        train=train,
        held_out=held_out,
        classes=[str(name) for name in data.target_names],
        metrics={"accuracy": model.score(held_out, y_test)},
        description="Malignant or benign tumour, 100 random trees",
    )
