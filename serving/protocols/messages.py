"""The messages of every service on the gRPC port, in a descriptor pool of their own.

A client's stubs of the same protocols may live in this process: in the default pool they would collide. The classes are
made of `protos/descriptors.binpb` and not of generated code, which runs with one major version of protobuf only;
`make protos` writes that file from the .proto files beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from serving.errors import InvalidRequest

SERVICE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"
REFLECTION = "grpc.reflection.v1.ServerReflection"
REFLECTION_ALPHA = "grpc.reflection.v1alpha.ServerReflection"
STREAM = "ModelStreamInfer"

pool = descriptor_pool.DescriptorPool()
for _file in descriptor_pb2.FileDescriptorSet.FromString(
    files("serving.protocols").joinpath("protos/descriptors.binpb").read_bytes()
).file:
    pool.Add(_file)

UNARY = tuple(method.name for method in pool.FindServiceByName(SERVICE).methods if method.name != STREAM)


def message(name: str, package: str = "inference") -> Any:
    """Return the class of a message by its name within its package."""
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}"))


def reader(kind: Any) -> Callable[[bytes], Any]:
    """Return what reads messages of a class; it raises InvalidRequest of bytes that are none."""
    parse, name = kind.FromString, kind.DESCRIPTOR.name

    def read(data: bytes) -> Any:
        try:
            return parse(data)
        except Exception:  # protobuf's own kind of error differs between its implementations
            raise InvalidRequest(f"the bytes are no {name}") from None

    return read
