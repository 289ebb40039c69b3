"""The messages of `inference.GRPCInferenceService`, in a descriptor pool of their own.

A client's stubs of the same protocol may live in this process: in the default pool the two would collide. Built from
the table below instead of generated code, which runs with one major version of protobuf only.
Source: https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/open_inference_grpc.proto,
and Triton's superset of it, https://github.com/triton-inference-server/common (grpc_service.proto, model_config.proto).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from serving.errors import InvalidRequest

SERVICE = "inference.GRPCInferenceService"

# "name number type": `*` before a type repeats it, `|oneof` behind it makes a choice, `map:` maps strings to it.
_DURATION = "StatisticDuration"
_MESSAGES = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "live 1 bool",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "ready 1 bool",
    "ModelReadyRequest": "name 1 string, version 2 string",
    "ModelReadyResponse": "ready 1 bool",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "name 1 string, version 2 string, extensions 3 *string",
    "ModelMetadataRequest": "name 1 string, version 2 string",
    "ModelMetadataResponse": "name 1 string, versions 2 *string, platform 3 string, inputs 4 *.TensorMetadata, "
    "outputs 5 *.TensorMetadata",
    "ModelMetadataResponse.TensorMetadata": "name 1 string, datatype 2 string, shape 3 *int64",
    "InferParameter": "bool_param 1 bool|parameter_choice, int64_param 2 int64|parameter_choice, "
    "string_param 3 string|parameter_choice, double_param 4 double|parameter_choice, "
    "uint64_param 5 uint64|parameter_choice",
    "InferTensorContents": "bool_contents 1 *bool, int_contents 2 *int32, int64_contents 3 *int64, "
    "uint_contents 4 *uint32, uint64_contents 5 *uint64, fp32_contents 6 *float, fp64_contents 7 *double, "
    "bytes_contents 8 *bytes",
    "ModelInferRequest": "model_name 1 string, model_version 2 string, id 3 string, parameters 4 map:InferParameter, "
    "inputs 5 *.InferInputTensor, outputs 6 *.InferRequestedOutputTensor, raw_input_contents 7 *bytes",
    "ModelInferRequest.InferInputTensor": "name 1 string, datatype 2 string, shape 3 *int64, "
    "parameters 4 map:InferParameter, contents 5 InferTensorContents",
    "ModelInferRequest.InferRequestedOutputTensor": "name 1 string, parameters 2 map:InferParameter",
    "ModelInferResponse": "model_name 1 string, model_version 2 string, id 3 string, parameters 4 map:InferParameter, "
    "outputs 5 *.InferOutputTensor, raw_output_contents 6 *bytes",
    "ModelInferResponse.InferOutputTensor": "name 1 string, datatype 2 string, shape 3 *int64, "
    "parameters 4 map:InferParameter, contents 5 InferTensorContents",
    "ModelStreamInferResponse": "error_message 1 string, infer_response 2 ModelInferResponse",
    "ModelConfigRequest": "name 1 string, version 2 string",
    "ModelConfigResponse": "config 1 ModelConfig",
    "ModelConfig": "name 1 string, platform 2 string, version_policy 3 ModelVersionPolicy, max_batch_size 4 int32, "
    "input 5 *ModelInput, output 6 *ModelOutput, instance_group 7 *ModelInstanceGroup, "
    "default_model_filename 8 string, dynamic_batching 11 ModelDynamicBatching|scheduling_choice, "
    "parameters 14 map:ModelParameter, backend 17 string, model_transaction_policy 19 ModelTransactionPolicy",
    "ModelVersionPolicy": "latest 1 .Latest|policy_choice, all 2 .All|policy_choice, "
    "specific 3 .Specific|policy_choice",
    "ModelVersionPolicy.Latest": "num_versions 1 uint32",
    "ModelVersionPolicy.All": "",
    "ModelVersionPolicy.Specific": "versions 1 *int64",
    "ModelInput": "name 1 string, data_type 2 DataType, dims 4 *int64",
    "ModelOutput": "name 1 string, data_type 2 DataType, dims 3 *int64",
    "ModelInstanceGroup": "name 1 string, count 2 int32, kind 4 .Kind",
    "ModelDynamicBatching": "max_queue_delay_microseconds 2 uint64, priority_levels 4 uint64, "
    "default_priority_level 5 uint64",
    "ModelTransactionPolicy": "decoupled 1 bool",
    "ModelParameter": "string_value 1 string",
    "ModelStatisticsRequest": "name 1 string, version 2 string",
    "ModelStatisticsResponse": "model_stats 1 *ModelStatistics",
    "ModelStatistics": "name 1 string, version 2 string, last_inference 3 uint64, inference_count 4 uint64, "
    "execution_count 5 uint64, inference_stats 6 InferStatistics, batch_stats 7 *InferBatchStatistics",
    "InferStatistics": ", ".join(
        f"{name} {number} {_DURATION}"
        for number, name in enumerate(
            ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss"),
            1,
        )
    ),
    "InferBatchStatistics": f"batch_size 1 uint64, compute_input 2 {_DURATION}, compute_infer 3 {_DURATION}, "
    f"compute_output 4 {_DURATION}",
    _DURATION: "count 1 uint64, ns 2 uint64",
    "ModelRepositoryParameter": "bool_param 1 bool|parameter_choice, int64_param 2 int64|parameter_choice, "
    "string_param 3 string|parameter_choice, bytes_param 4 bytes|parameter_choice",
    "RepositoryIndexRequest": "repository_name 1 string, ready 2 bool",
    "RepositoryIndexResponse": "models 1 *.ModelIndex",
    "RepositoryIndexResponse.ModelIndex": "name 1 string, version 2 string, state 3 string, reason 4 string",
    "RepositoryModelLoadRequest": "repository_name 1 string, model_name 2 string, "
    "parameters 3 map:ModelRepositoryParameter",
    "RepositoryModelLoadResponse": "",
    "RepositoryModelUnloadRequest": "repository_name 1 string, model_name 2 string, "
    "parameters 3 map:ModelRepositoryParameter",
    "RepositoryModelUnloadResponse": "",
}
_ENUMS = {
    "DataType": ["TYPE_INVALID", "TYPE_BOOL"]
    + [f"TYPE_{sign}INT{bits}" for sign in ("U", "") for bits in (8, 16, 32, 64)]
    + ["TYPE_FP16", "TYPE_FP32", "TYPE_FP64", "TYPE_STRING", "TYPE_BF16"],
    "ModelInstanceGroup.Kind": ["KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"],
}
UNARY = (
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelInfer",
    "ModelConfig",
    "ModelStatistics",
    "RepositoryIndex",
    "RepositoryModelLoad",
    "RepositoryModelUnload",
)
STREAM = "ModelStreamInfer"

_Field = descriptor_pb2.FieldDescriptorProto


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="grpc_service.proto", package="inference", syntax="proto3")
    made: dict[str, descriptor_pb2.DescriptorProto] = {}
    for full in sorted(_MESSAGES, key=lambda name: name.count(".")):
        outer, _, name = full.rpartition(".")
        made[full] = (made[outer].nested_type if outer else file.message_type).add(name=name)
    for full, values in _ENUMS.items():
        outer, _, name = full.rpartition(".")
        enum = (made[outer].enum_type if outer else file.enum_type).add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for full, text in _MESSAGES.items():
        for field in filter(None, text.split(", ")):
            _add_field(made[full], full, field)
    service = file.service.add(name="GRPCInferenceService")
    for method in UNARY:
        service.method.add(
            name=method, input_type=f".inference.{method}Request", output_type=f".inference.{method}Response"
        )
    service.method.add(
        name=STREAM,
        input_type=".inference.ModelInferRequest",
        output_type=".inference.ModelStreamInferResponse",
        client_streaming=True,
        server_streaming=True,
    )
    return file


def _add_field(message: descriptor_pb2.DescriptorProto, full: str, text: str) -> None:
    name, number, kind = text.split()
    kind, _, choice = kind.partition("|")
    field = message.field.add(name=name, number=int(number), label=_Field.LABEL_OPTIONAL)
    if choice:
        if choice not in [one.name for one in message.oneof_decl]:
            message.oneof_decl.add(name=choice)
        field.oneof_index = 0
    if kind.startswith("map:"):
        entry = message.nested_type.add(name="ParametersEntry")
        entry.options.map_entry = True
        _add_field(entry, f"{full}.ParametersEntry", "key 1 string")
        _add_field(entry, f"{full}.ParametersEntry", f"value 2 {kind[4:]}")
        kind = "*.ParametersEntry"
    if kind.startswith("*"):
        field.label, kind = _Field.LABEL_REPEATED, kind[1:]
    scalar = getattr(_Field, f"TYPE_{kind.upper()}", None) if kind.islower() else None
    if scalar is not None:
        field.type = scalar
        return
    field.type_name = f".inference.{full}{kind}" if kind.startswith(".") else f".inference.{kind}"
    field.type = _Field.TYPE_ENUM if field.type_name[11:] in _ENUMS else _Field.TYPE_MESSAGE


pool = descriptor_pool.DescriptorPool()
pool.Add(_file())
for _standard in (health_pb2, reflection_pb2):  # reflection describes them too
    pool.AddSerializedFile(_standard.DESCRIPTOR.serialized_pb)


def message(name: str) -> Any:
    """Return the class of a message by its name within the package."""
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"inference.{name}"))


def reader(kind: Any) -> Callable[[bytes], Any]:
    """Return what reads messages of a class; it raises InvalidRequest of bytes that are none."""
    parse, name = kind.FromString, kind.DESCRIPTOR.name

    def read(data: bytes) -> Any:
        try:
            return parse(data)
        except Exception:  # protobuf's own kind of error differs between its implementations
            raise InvalidRequest(f"the bytes are no {name}") from None

    return read
