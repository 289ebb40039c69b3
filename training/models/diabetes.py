"""Progression of diabetes after a year from ten measurements: a regressor."""

from sklearn.datasets import load_diabetes
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.model_selection import train_test_split

from serving.export import Exported, export


def train() -> Exported:
    """Fit gradient boosting on the unscaled measurements."""
    data = load_diabetes(as_frame=True, scaled=False)
    rows = data.data.astype("float32")
    train, held_out, y_train, y_test = train_test_split(rows, data.target, random_state=0)
    model = GradientBoostingRegressor(n_estimators=120, max_depth=2, learning_rate=0.05, random_state=0)
    model.fit(train, y_train)
    metrics = {"r2": model.score(held_out, y_test)}
    text = "Disease progression one year after baseline, 25 to 346"
    return export(model, train=train, held_out=held_out, metrics=metrics, description=text)
