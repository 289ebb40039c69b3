"""What the fleet says of itself in the words of the Open Inference Protocol and Triton's extensions of it.

Plain dictionaries in the protocol's JSON form, for every transport: HTTP writes them as they are, gRPC makes messages.
"""

from __future__ import annotations

import asyncio
from importlib.metadata import version as package_version
from typing import Any

from serving.deploy.fleet import Fleet
from serving.engine.model import Model
from serving.engine.request import LOW, NORMAL
from serving.engine.signature import TensorSpec
from serving.errors import ModelNotFound, NotReady
from serving.metrics.definitions import Sizes
from serving.metrics.metrics import Metrics
from serving.metrics.totals import VersionTotals
from serving.repository.manifest import MODEL_FILE
from serving.repository.traffic import Keep, Latest

EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "parameters",
    "schedule_policy",
    "statistics",
)

_TENSORFLOW = {"FP16": "HALF", "FP32": "FLOAT", "FP64": "DOUBLE", "BF16": "BFLOAT16", "BYTES": "STRING"}
"""TensorFlow's names of datatypes, where they are not the protocol's."""


def server() -> dict[str, Any]:
    """Describe the server: `GET /v2`, ServerMetadata."""
    return {"name": "serving", "version": package_version("serving"), "extensions": list(EXTENSIONS)}


def metadata(fleet: Fleet, name: str, version: str | None = None) -> dict[str, Any]:
    """Describe a model's tensors: `GET /v2/models/{name}`, ModelMetadata. Raises ModelNotFound or NotReady."""
    model = fleet.get(name, version)

    def ports(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
        return [{"name": s.name, "datatype": s.datatype, "shape": list(s.shape)} for s in specs]

    return {
        "name": name,
        "versions": list(fleet.models[name].versions) if version is None else [version],
        "platform": "onnxruntime_onnx",
        "inputs": ports(model.signature.inputs),
        "outputs": ports(model.signature.outputs),
    }


def signature_def(model: Model) -> dict[str, Any]:
    """Describe a model's features and outputs: `GET /v1/models/{name}/metadata` of TensorFlow Serving.

    Source: https://www.tensorflow.org/tfx/serving/api_rest#model_metadata_api.
    """
    signature = model.signature
    rows = () if signature.batch == "none" else (-1,)

    def tensor(name: str, datatype: str, shape: tuple[int, ...]) -> dict[str, Any]:
        dims = [{"size": str(size), "name": ""} for size in shape]
        dtype = f"DT_{_TENSORFLOW.get(datatype, datatype)}"
        return {"name": name, "dtype": dtype, "tensor_shape": {"dim": dims, "unknown_rank": False}}

    definition = {
        "inputs": {f.name: tensor(f.name, f.datatype, (*rows, *f.shape)) for f in signature.features},
        "outputs": {o.name: tensor(o.name, o.datatype, o.shape) for o in signature.outputs},
        "method_name": "tensorflow/serving/predict",
    }
    return {
        "model_spec": {"name": model.name, "signature_name": "", "version": model.version},
        "metadata": {"signature_def": {"signature_def": {"serving_default": definition}}},
    }


def config(fleet: Fleet, name: str, version: str | None = None) -> dict[str, Any]:
    """Describe how a model is run, as Triton's model configuration: dims without the batch where it has one.

    Raises ModelNotFound or NotReady.
    """
    model = fleet.get(name, version)
    batched, limits = model.batched, model.limits

    def ports(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
        return [
            {
                "name": spec.name,
                "data_type": "TYPE_STRING" if spec.datatype == "BYTES" else f"TYPE_{spec.datatype}",
                "dims": list(spec.shape[1:] if batched else spec.shape),
            }
            for spec in specs
        ]

    made: dict[str, Any] = {
        "name": name,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "version_policy": _version_policy(fleet.models[name].traffic.keep),
        "max_batch_size": limits.max_batch_rows if batched else 0,
        "input": ports(model.signature.inputs),
        "output": ports(model.signature.outputs),
        "instance_group": [{"name": name, "count": limits.instances, "kind": "KIND_CPU"}],
        "default_model_filename": MODEL_FILE,
        "model_transaction_policy": {"decoupled": False},
    }
    if batched:
        made["dynamic_batching"] = {
            "max_queue_delay_microseconds": round(limits.max_delay * 1e6),
            "priority_levels": LOW + 1,  # the protocol counts from 1
            "default_priority_level": NORMAL + 1,
        }
    parameters = {
        "intra_op_thread_count": str(model.session.threads),
        "deadline_s": f"{limits.deadline_s:g}",
        "max_queued_rows": str(limits.max_queued_rows),
        **({} if batched else {"batching": f"off: {model.batching.reason}"}),
        **({"execution_providers": ", ".join(p.name for p in limits.providers)} if limits.providers else {}),
        **({"response_cache": str(limits.cache)} if limits.cache else {}),
    }
    made["parameters"] = {name: {"string_value": value} for name, value in parameters.items()}
    return made


def _version_policy(keep: Keep) -> dict[str, Any]:
    if isinstance(keep, Latest):
        return {"latest": {"num_versions": keep.latest}}
    return {"all": {}} if keep == "all" else {"specific": {"versions": [int(version) for version in keep]}}


def index(fleet: Fleet, *, ready: bool = False) -> list[dict[str, str]]:
    """List every version in the repository with its state; `ready` leaves out what can't answer."""

    def state(name: str, version: str, reason: str) -> dict[str, str]:
        return {"name": name, "version": version, "state": "UNAVAILABLE" if reason else "READY", "reason": reason}

    found = [state(model.name, model.version, "") for model in fleet.live()]
    if not ready:
        unloaded = {name: served.unloaded for name, served in fleet.models.items()} | fleet.unloaded
        found += [state(name, version, "unloaded") for name, versions in unloaded.items() for version in versions]
        found += [state(problem.name, problem.version, problem.reason) for problem in fleet.problems]
    return found


async def statistics(
    fleet: Fleet, metrics: Metrics | None, name: str | None = None, version: str | None = None
) -> list[dict[str, Any]]:
    """Count and time what models did, over all workers, as Triton's statistics: for all, for a name, for a version.

    Raises ModelNotFound, or NotReady where nothing is counted.
    """
    if metrics is None:
        raise NotReady("nothing is counted here: the server runs with --no-metrics")
    models: list[Model]
    if name:
        only = fleet.get(name, version)
        models = [only] if version else list(fleet.models[name].versions.values())
    elif version:
        raise ModelNotFound("a version needs the name of its model")
    else:
        models = fleet.live()
    # On a thread: it reads and adds up what all workers counted.
    found = await asyncio.to_thread(metrics.statistics, [(model.name, model.version) for model in models])
    return [_statistics(model, *found[model.name, model.version]) for model in models]


def _statistics(model: Model, total: VersionTotals, sizes: Sizes) -> dict[str, Any]:
    def duration(count: float, seconds: float) -> dict[str, int]:
        return {"count": round(count), "ns": round(seconds * 1e9)}

    queued, batches = total.queued, total.batches
    answering = max(0.0, total.prediction_seconds - total.failing_seconds)
    return {
        "name": model.name,
        "version": model.version,
        "last_inference": round(total.last * 1000),
        "inference_count": round(total.rows),
        "execution_count": round(batches),
        "inference_stats": {
            "success": duration(total.ok, answering),
            "fail": duration(total.failed, total.failing_seconds),
            "queue": duration(queued, total.queue_seconds),
            "compute_input": duration(queued, total.decode_seconds),
            "compute_infer": duration(queued, total.request_inference_seconds),
            "compute_output": duration(queued, total.encode_seconds),
            "cache_hit": duration(total.cache_hits + total.cache_joined, 0),
            "cache_miss": duration(total.cache_misses, 0),
        },
        # How long a batch is put together and taken apart is not measured of each size.
        "batch_stats": [
            {
                "batch_size": size,
                "compute_input": duration(number, 0.0),
                "compute_infer": duration(number, seconds),
                "compute_output": duration(number, 0.0),
            }
            for size, (number, seconds) in sorted(sizes.items())
        ],
        "memory_usage": [],
        "response_stats": {},
    }
