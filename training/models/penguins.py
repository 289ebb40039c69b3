"""Penguin species from a mixed table: string categories and missing values, through a ColumnTransformer."""

from palmerpenguins import load_penguins
from sklearn.compose import make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from serving.export import Exported, export

CATEGORIES = ["island", "sex"]
NUMBERS = ["bill_length_mm", "bill_depth_mm", "flipper_length_mm", "body_mass_g"]


def train() -> Exported:
    """Fit logistic regression behind imputation, scaling and one-hot columns."""
    data = load_penguins()
    rows = data[CATEGORIES + NUMBERS].astype(dict.fromkeys(NUMBERS, "float32"))
    rows["sex"] = rows["sex"].astype(object).where(rows["sex"].notna(), "")  # the graph knows '' as missing
    rows["island"] = rows["island"].astype(object)
    train, held_out, y_train, y_test = train_test_split(rows, data.species, random_state=0, stratify=data.species)
    model = make_pipeline(
        make_column_transformer(
            (OneHotEncoder(handle_unknown="ignore"), CATEGORIES),
            (make_pipeline(SimpleImputer(strategy="median"), StandardScaler()), NUMBERS),
        ),
        LogisticRegression(max_iter=1000),
    )
    model.fit(train, y_train)
    return export(
        model,
        train=train,
        held_out=held_out,
        metrics={"accuracy": model.score(held_out, y_test)},
        description="Species of penguin; any number and the sex may be missing",
    )
