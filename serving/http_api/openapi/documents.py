"""The documents that answers consist of: what a route returns, and the OpenAPI document describes.

Where a route says `response_model`, and for predictions, they describe only: there an answer is written from plain
values, and a test holds both together.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, RootModel

from serving.documented import Documented
from serving.engine.signature import Batch, Feature, Parity, TensorSpec
from serving.repository.repository import Problem
from serving.tensors import Datatype


class Document(Documented):
    """Base of all: a field without a default is always there; later versions may add others."""


class ErrorDetail(Document):
    """One bad place."""

    path: str
    """JSON pointer to it (RFC 6901)."""
    message: str


class Error(Document):
    """Why a request is not answered."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "error": "the rows do not fit the model's signature: /instances/0/petal_width: is missing",
                    "details": [{"path": "/instances/0/petal_width", "message": "is missing"}],
                }
            ]
        }
    )

    error: str
    details: list[ErrorDetail] = Field([])
    """The bad cells, 20 at most; left out where there are none."""


class ServedModel(Document):
    """A model that is served."""

    name: str
    default_version: str
    versions: list[str]
    labels: dict[str, str]
    """Versions by label."""


class ModelList(Document):
    """Every model."""

    models: list[str]
    details: list[ServedModel]
    problems: list[Problem]


class TensorFlowStatus(Document):
    """TensorFlow Serving's word that nothing is wrong."""

    error_code: Literal["OK"]
    error_message: str


class VersionStatus(Document):
    """A version that is loaded."""

    version: str
    state: Literal["AVAILABLE"]
    status: TensorFlowStatus


class ModelDescription(Document):
    """One version of a model, and which others there are."""

    name: str
    ready: Literal[True]
    version: str
    sha256: str
    """Of the ONNX file."""
    model_version_status: list[VersionStatus]
    task: Literal["classification", "regression", "other"]
    description: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    layout: Literal["matrix", "columns"]
    """matrix: features are the columns of the one input. columns: each feature is an input, in order."""
    batch: Batch
    label: str | None
    """The output with the predicted class."""
    scores: str | None
    """The output with a score for each class."""
    features: list[Feature]
    classes: list[str] | list[int] | None
    metrics: dict[str, float | None]
    """Quality on held-out rows at training time."""
    parity: Parity | None
    example: dict[str, Any] | None
    """A row."""


class Dimension(Document):
    """One dimension; -1 is free."""

    size: str
    name: str


class TensorShape(Document):
    """A shape in TensorFlow's words."""

    dim: list[Dimension]
    unknown_rank: bool


class TensorInfo(Document):
    """A tensor in TensorFlow's words."""

    name: str
    dtype: str
    tensor_shape: TensorShape


class SignatureDef(Document):
    """What `:predict` takes and gives."""

    inputs: dict[str, TensorInfo]
    outputs: dict[str, TensorInfo]
    method_name: str


class SignatureDefs(Document):
    """Signatures by name."""

    signature_def: dict[str, SignatureDef]


class SignatureMetadata(Document):
    """Where TensorFlow Serving keeps them."""

    signature_def: SignatureDefs


class ModelSpec(Document):
    """Who is described."""

    name: str
    signature_name: str
    version: str


class TensorFlowMetadata(Document):
    """A model's signature as TensorFlow Serving says it."""

    model_spec: ModelSpec
    metadata: SignatureMetadata


class Live(Document):
    """The process answers."""

    live: Literal[True]


class Generation(Document):
    """How far a worker follows the folder."""

    serving: int | None
    asked: int | None
    lag: int


class Ready(Document):
    """Whether this worker should get requests; all but the first for callers who may predict."""

    ready: bool
    not_served: list[str] = Field([])
    """Models and versions that could not be loaded."""
    folder_gone: str = ""
    """Why the models folder can't be followed; empty where it can."""
    generations: dict[str, Generation] = Field({})
    """Traffic generations by model."""
    lag_s: float = 0.0
    """Seconds that this worker has not acknowledged what its parent told it."""
    coordinator_silent_s: float = 0.0
    """Seconds that it has heard nothing of its parent."""


class ServerMetadata(Document):
    """The server, as the Open Inference Protocol has it."""

    name: str
    version: str
    extensions: list[str]


class ModelMetadata(Document):
    """A model's tensors, as the Open Inference Protocol has them."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]


class ModelReady(Document):
    """A version that can answer."""

    name: str
    version: str
    ready: Literal[True]


class ConfiguredTensor(Document):
    """A tensor in Triton's words; dims without the batch where requests are batched."""

    name: str
    data_type: str
    dims: list[int]


class InstanceGroup(Document):
    """Threads that run the model."""

    name: str
    count: int
    kind: str


class TransactionPolicy(Document):
    """One answer a request."""

    decoupled: Literal[False]


class DynamicBatching(Document):
    """How requests are put together."""

    max_queue_delay_microseconds: int
    priority_levels: int
    default_priority_level: int


class StringValue(Document):
    """A parameter's value."""

    string_value: str


class ModelConfig(Document):
    """How a model is run, in the words of Triton's model configuration."""

    name: str
    platform: str
    backend: str
    version_policy: dict[Literal["latest", "all", "specific"], dict[str, int | list[int]]]
    max_batch_size: int
    input: list[ConfiguredTensor]
    output: list[ConfiguredTensor]
    instance_group: list[InstanceGroup]
    default_model_filename: str
    model_transaction_policy: TransactionPolicy
    dynamic_batching: DynamicBatching | None = None
    """Left out where requests run alone."""
    parameters: dict[str, StringValue] = Field({})
    """What else is in force, such as `intra_op_thread_count` and `deadline_s`; `batching`: why requests run alone."""


class Duration(Document):
    """How often, and nanoseconds in all."""

    count: int
    ns: int


class InferenceStatistics(Document):
    """Predictions and their stages, as Triton counts them."""

    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    cache_hit: Duration
    cache_miss: Duration


class BatchStatistics(Document):
    """Runs of one size."""

    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class ModelStatistics(Document):
    """What a version did since the server started, over all workers."""

    name: str
    version: str
    last_inference: int
    """Milliseconds since 1970; 0 for never."""
    inference_count: int
    """Rows."""
    execution_count: int
    """Batches."""
    inference_stats: InferenceStatistics
    batch_stats: list[BatchStatistics]
    memory_usage: list[dict[str, Any]]
    response_stats: dict[str, Any]


class Statistics(Document):
    """What versions did."""

    model_stats: list[ModelStatistics]


class IndexEntry(Document):
    """A version in the repository."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str


class RepositoryIndex(RootModel[list[IndexEntry]]):
    """Every version in the repository."""


class Done(Document):
    """Nothing more to say."""


class OutputTensor(Document):
    """A tensor that is answered."""

    name: str
    datatype: Datatype
    shape: list[Annotated[int, Field(ge=0)]]
    data: list[float | str | bool | None]
    """In C order; null where a number is not finite."""


class InferResponse(Document):
    """An answer as the Open Inference Protocol has it."""

    id: str = ""
    """The request's, where it has one."""
    model_name: str
    model_version: str
    outputs: list[OutputTensor]
