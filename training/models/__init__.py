"""The models that ship, one short file each; `TRAINERS` lists them in the order of publishing."""

from training.models import breast_cancer, diabetes, digits, docs_topic, forest, iris, penguins

TRAINERS = {
    "iris": (iris.logistic, iris.forest),
    "breast_cancer": (breast_cancer.train,),
    "diabetes": (diabetes.train,),
    "digits": (digits.train,),
    "penguins": (penguins.train,),
    "docs_topic": (docs_topic.train,),
}
"""What `make train` publishes: each function makes one version."""

UNSHIPPED = {"forest": (forest.train,)}
"""Made on request, for benchmarks."""
