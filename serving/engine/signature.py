"""A model's signature: what it takes and answers, in names and types that a person uses.

The exporter writes it as JSON into the ONNX file's own metadata under `METADATA_KEY`; a file without one gets a
signature read from its graph (`serving.engine.session`). One signature drives validation, OpenAPI and the feeds.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serving.tensors import FLOATS, Datatype

METADATA_KEY = "serving.signature"

Batch = Literal["dynamic", "one", "none"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class TensorSpec(_Frozen):
    """One input or output of the graph; `shape` is whole, batch dimension included, -1 where dynamic."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]


class Feature(_Frozen):
    """One thing that a caller sends for a row: a column of the matrix input, or one input of the graph."""

    name: str
    datatype: Datatype
    """FP32 or FP64 also take whole numbers; BYTES is a string."""
    shape: tuple[int, ...] = ()
    """Per row, without the batch dimension: () for a scalar, (8, 8) for an image; -1 where dynamic."""
    description: str = ""
    sensitive: bool = False
    """It is left out of whatever keeps requests."""
    nullable: bool = False
    """null means a missing value, in any place of a shape: NaN for floats; the empty string for strings without one."""
    allow_non_finite: bool = False
    minimum: float | None = None
    maximum: float | None = None
    """The range that training saw: documented, not enforced."""
    categories: tuple[str, ...] | tuple[int, ...] | None = None
    """The values that training saw; `unknown_category` says what happens to others."""
    unknown_category: Literal["accept", "refuse"] = "accept"

    @model_validator(mode="after")
    def _missing_has_a_meaning(self) -> Feature:
        if self.nullable and not (self.datatype in FLOATS or (self.datatype == "BYTES" and not self.shape)):
            raise ValueError(f"feature {self.name}: only floats and scalar strings can be nullable")
        return self


class Reference(_Frozen):
    """How often a feature, or a column of an output, had which values: what later ones are compared with."""

    name: str
    edges: tuple[float, ...] | None = None
    """Of the bins of numbers, one more than there are bins: a bin has its lower edge, and the last one both."""
    categories: tuple[bool, ...] | tuple[int, ...] | tuple[str, ...] | None = None
    counts: tuple[int, ...]
    """Rows, by bin or by category."""
    other: int = 0
    """Rows of other categories."""
    missing: int = 0


class Parity(_Frozen):
    """How the ONNX file compared with the original model on held-out rows."""

    rows: int
    label_agreement: float | None = None
    """Share of rows with the same label, 0 to 1; None for regressors."""
    max_difference: float
    """Largest absolute difference of a score or a prediction."""


class Golden(_Frozen):
    """Rows with their known answers, kept to prove a deployed file: `outputs[name]` is nested lists, rows first."""

    rows: tuple[dict[str, Any], ...]
    outputs: dict[str, list[Any]]
    tolerance: float = 1e-4


class Signature(_Frozen):
    """Everything a caller needs to know of one version of a model."""

    schema_version: Literal[1] = 1
    task: Literal["classification", "regression", "other"] = "other"
    description: str = ""
    inputs: tuple[TensorSpec, ...]
    """None where the graph makes its answer of nothing."""
    optional: tuple[TensorSpec, ...] = ()
    """Weights of the graph that a request may send others for, by the Open Inference Protocol."""
    outputs: tuple[TensorSpec, ...] = Field(min_length=1)
    layout: Literal["matrix", "columns"]
    """matrix: one input [batch, features], a feature is a column. columns: a feature is an input, in order."""
    batch: Batch = "dynamic"
    """dynamic: dim 0 of every input is free. one: it is fixed at 1. none: the graph takes one example, as it is."""
    features: tuple[Feature, ...]
    label: str | None = None
    """Name of the output with the predicted class (classification)."""
    scores: str | None = None
    """Name of the output [batch, classes] with probabilities or scores (classification)."""
    classes: tuple[str, ...] | tuple[int, ...] | None = None
    """Class names in the order of the columns of `scores`."""
    metrics: dict[str, float] = {}
    """Quality on held-out rows at training time, for instance {"accuracy": 0.97}."""
    parity: Parity | None = None
    example: dict[str, Any] | None = None
    """One real row by feature name."""
    golden: Golden | None = None
    reference: tuple[Reference, ...] = ()
    """Of features by training rows, of outputs by held-out ones."""
    background: tuple[dict[str, Any], ...] = ()
    """A few rows of training, which stand for `any other row` where it is explained what a feature contributes."""
    tools: dict[str, str] = {}
    """Versions of what made the file, for instance {"scikit-learn": "1.9.1"}."""

    @property
    def answers_by_class(self) -> bool:
        """Whether the answer to a row is a label and a score for each class by name."""
        return bool(self.label and self.scores and self.classes)

    @property
    def scores_key(self) -> Literal["scores", "probabilities"]:
        """What the scores are called in such an answer: margins are no probabilities."""
        return "scores" if self.scores == "scores" else "probabilities"

    @model_validator(mode="after")
    def _coherent(self) -> Signature:
        names = [feature.name for feature in self.features]
        if len(set(names)) != len(names):
            raise ValueError("two features have the same name")
        if self.layout == "columns" and len(self.features) != len(self.inputs):
            raise ValueError("layout columns wants one feature for each input")
        if self.layout == "matrix" and (len(self.inputs) != 1 or any(f.shape for f in self.features)):
            raise ValueError("layout matrix wants one input and scalar features")
        if self.layout == "matrix" and self.inputs[0].shape[-1] not in (-1, len(self.features)):
            raise ValueError("layout matrix wants as many features as the input has columns")
        outputs = {output.name for output in self.outputs}
        for role in (self.label, self.scores):
            if role is not None and role not in outputs:
                raise ValueError(f"no output is called {role}")
        return self


class Described(NamedTuple):
    """All that a codec knows of a version of a model.

    together: its rows are rows of batches, so that all inputs have as many; else the graph alone says what it takes.
    """

    name: str
    version: str
    signature: Signature
    together: bool = True
