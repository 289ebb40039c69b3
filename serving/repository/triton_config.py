"""Triton's `config.pbtxt` beside a model: what of it counts here.

Source: https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto. Its other fields say
what the ONNX file says itself, or choose a backend and devices: they are passed over.
"""

from __future__ import annotations

import logging
import re
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from serving.errors import InvalidRequest
from serving.repository.traffic import Keep, Latest

log = logging.getLogger("serving.settings")

CONFIG_FILE = "config.pbtxt"
_MOST_INSTANCES = 64
_MOST_DELAY_S = 1.0

# The parser passes over a field that it does not know, if it is a list of messages only with the colon that may be left
# out. Strings and comments stay as they are.
_LIST = re.compile(r"""#[^\n]*|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|(?P<field>[A-Za-z_]\w*)[ \t\r\n]*\[""")

_THREADS = "intra_op_thread_count"
"""A parameter of Triton's onnxruntime backend: https://github.com/triton-inference-server/onnxruntime_backend."""
_MOST_THREADS = 1024


class TritonConfig(NamedTuple):
    """What it says. batched: False where requests run alone. own: what is set, by the names of `Limits`."""

    batched: bool
    own: dict[str, Any]
    keep: Keep | None


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
    own = {
        "max_batch_rows": size or None,
        # Triton counts requests, each of up to max_batch_size rows.
        "max_queued_rows": queue.max_queue_size * max(1, size or 1) or None,
        "max_delay": delay_s,
        "deadline_s": queue.default_timeout_microseconds / 1e6 or None if queue.timeout_action == 0 else None,
        "instances": instances or None,
        "threads": _threads(message),
    }
    return TritonConfig(size != 0, {name: value for name, value in own.items() if value is not None}, _keep(message))


def _threads(message: Any) -> int | None:
    """Return the threads of one run; None where they are left to the server, which Triton writes as 0."""
    text = message.parameters[_THREADS].string_value if _THREADS in message.parameters else "0"
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
    """Return the protocol's own message, from its descriptors alone: what reads them otherwise is far above."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # noqa: PLC0415

    content = files("serving.protocols").joinpath("protos/descriptors.binpb").read_bytes()
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(content).file:
        pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))
