"""Triton's `config.pbtxt` beside a model: what of it counts here.

Source: https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto. Its other fields say
what the ONNX file says itself, or choose a backend and devices: they are passed over.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from serving.errors import InvalidRequest
from serving.repository.traffic import Keep, Latest

log = logging.getLogger("serving.settings")

CONFIG_FILE = "config.pbtxt"
_MOST_INSTANCES = 64
_MOST_DELAY_S = 1.0

# The parser passes over a field that it does not know, if it is a list of messages only with the colon that may be left
# out. Strings and comments stay as they are.
_LIST = re.compile(r"""#[^\n]*|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|(?P<field>[A-Za-z_]\w*)[ \t\r\n]*\[""")

# As in the source, with presence for numbers: 0 and nothing are not the same.
_MESSAGES = {
    "Latest": "num_versions 1 uint32",
    "All": "",
    "Specific": "versions 1 *int64",
    "VersionPolicy": "latest 1 Latest, all 2 All, specific 3 Specific",
    "InstanceGroup": "count 2 int32",
    "QueuePolicy": "timeout_action 1 TimeoutAction, default_timeout_microseconds 2 uint64, max_queue_size 4 uint32",
    "DynamicBatching": "preferred_batch_size 1 *int32, max_queue_delay_microseconds 2 uint64, "
    "default_queue_policy 6 QueuePolicy",
    "Text": "string_value 1 string",
    "Parameter": "key 1 string, value 2 Text",
    "ModelConfig": "version_policy 3 VersionPolicy, max_batch_size 4 int32, instance_group 7 *InstanceGroup, "
    "dynamic_batching 11 DynamicBatching, parameters 14 *Parameter",
}
_ENUMS = {"TimeoutAction": ("REJECT", "DELAY")}
_THREADS = "intra_op_thread_count"
"""A parameter of Triton's onnxruntime backend: https://github.com/triton-inference-server/onnxruntime_backend."""
_MOST_THREADS = 1024


@dataclass(frozen=True, slots=True)
class TritonConfig:
    """None: not in it."""

    max_batch_size: int | None = None
    delay_s: float | None = None
    max_queued_rows: int | None = None
    timeout_s: float | None = None
    threads: int | None = None
    instances: int | None = None
    keep: Keep | None = None


def parse(text: str, name: str) -> TritonConfig:
    """Read the file of a model. Raises InvalidRequest, which names the field or the line."""
    from google.protobuf import text_format  # noqa: PLC0415  only where a model has such a file

    message = _message_class()()
    try:
        text_format.Parse(_LIST.sub(_with_colon, text), message, allow_unknown_field=True)
    except text_format.ParseError as error:
        raise InvalidRequest(f"{CONFIG_FILE}: {error}"[:500]) from None
    size = message.max_batch_size if message.HasField("max_batch_size") else None
    if size is not None and size < 0:
        raise InvalidRequest(f"{CONFIG_FILE}: max_batch_size: should be 0 or more")
    delay_s = None
    if message.HasField("dynamic_batching"):
        dynamic = message.dynamic_batching
        delay_s = dynamic.max_queue_delay_microseconds / 1e6
        if delay_s > _MOST_DELAY_S:
            raise InvalidRequest(f"{CONFIG_FILE}: dynamic_batching.max_queue_delay_microseconds: should be 1 s at most")
        if dynamic.preferred_batch_size:
            log.info(
                "%s: %s: preferred_batch_size is not needed here: batches are as large as they come", name, CONFIG_FILE
            )
    instances = sum(max(1, group.count) for group in message.instance_group)
    if instances > _MOST_INSTANCES:
        raise InvalidRequest(
            f"{CONFIG_FILE}: instance_group: asks for {instances} instances: {_MOST_INSTANCES} at most"
        )
    queue = message.dynamic_batching.default_queue_policy
    return TritonConfig(
        max_batch_size=size,
        delay_s=delay_s,
        # Triton counts requests, each of up to max_batch_size rows.
        max_queued_rows=queue.max_queue_size * max(1, size or 1) or None,
        timeout_s=queue.default_timeout_microseconds / 1e6 or None if queue.timeout_action == 0 else None,
        threads=_threads(message),
        instances=instances or None,
        keep=_keep(message),
    )


def _threads(message: Any) -> int | None:
    """Return the threads of one run; None where they are left to the server, which Triton writes as 0."""
    text = next((parameter.value.string_value for parameter in message.parameters if parameter.key == _THREADS), "0")
    if not text.isdecimal() or not text.isascii() or len(text) > 4 or int(text) > _MOST_THREADS:
        raise InvalidRequest(f"{CONFIG_FILE}: parameters.{_THREADS}: should be a whole number up to {_MOST_THREADS}")
    return int(text) or None


def _keep(message: Any) -> Keep | None:
    if not message.HasField("version_policy"):
        return None
    policy = message.version_policy
    if policy.HasField("specific"):
        versions = tuple(str(version) for version in policy.specific.versions)
        if not versions or any(version.startswith(("-", "0")) for version in versions):
            raise InvalidRequest(f"{CONFIG_FILE}: version_policy.specific.versions: should list versions such as 1")
        return versions
    if policy.HasField("latest"):
        return Latest(latest=min(1000, max(1, policy.latest.num_versions)))
    return "all" if policy.HasField("all") else None


def _with_colon(found: re.Match[str]) -> str:
    return f"{found['field']}: [" if found["field"] else found[0]


@cache
def _message_class() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # noqa: PLC0415

    fields = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="config.proto", package="triton", syntax="proto2")
    for name, values in _ENUMS.items():
        enum = file.enum_type.add(name=name)
        for place, value in enumerate(values):
            enum.value.add(name=value, number=place)
    for name, text in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field in filter(None, text.split(", ")):
            called, number, kind = field.split()
            repeated, kind = kind.startswith("*"), kind.lstrip("*")
            made = message.field.add(name=called, number=int(number))
            made.label = fields.LABEL_REPEATED if repeated else fields.LABEL_OPTIONAL
            if kind in _MESSAGES:
                made.type, made.type_name = fields.TYPE_MESSAGE, f".triton.{kind}"
            elif kind in _ENUMS:
                made.type, made.type_name = fields.TYPE_ENUM, f".triton.{kind}"
            else:
                made.type = fields.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("triton.ModelConfig"))
