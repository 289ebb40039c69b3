"""Handwritten digits from 8x8 images: a small neural network with an image-shaped tensor input."""

import pandas as pd
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from serving.export import Exported, export


def train() -> Exported:
    """Fit a network with one hidden layer of 64 units."""
    data = load_digits()
    rows = pd.DataFrame(data.data.astype("float32"))
    train, held_out, y_train, y_test = train_test_split(rows, data.target, random_state=0, stratify=data.target)
    model = make_pipeline(StandardScaler(), MLPClassifier((64,), max_iter=300, random_state=0))
    model.fit(train.to_numpy(), y_train)
    return export(
        model,
        train=train,
        held_out=held_out,
        metrics={"accuracy": model.score(held_out.to_numpy(), y_test)},
        description="Handwritten digit from an 8x8 image with pixels from 0 to 16",
        image=("image", (8, 8)),
    )
