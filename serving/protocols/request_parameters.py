"""Parameters of Open Inference requests, the same over HTTP and gRPC: what they ask for, and what is not offered."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from serving.engine.request import priority_of
from serving.errors import InvalidRequest
from serving.protocols.strict_json import kind

_SHARED = "shared_memory_region"


def options_of(parameters: dict[str, Any]) -> tuple[bool, float | None, int | None, bool]:
    """Read the request's own parameters: whether outputs are raw unless they say, timeout in seconds, priority, and
    whether it is to be explained. Raises InvalidRequest.
    """
    timeout = parameters.get("timeout", 0)
    if type(timeout) is not int or timeout < 0:
        raise InvalidRequest("/parameters/timeout: should be a whole number of microseconds")
    if parameters.get("sequence_id", 0) not in (0, ""):
        raise InvalidRequest("/parameters/sequence_id: is not offered, models keep no state: leave it out")
    priority = parameters.get("priority", 0)
    place = priority_of(priority if type(priority) is int else -1, "/parameters/priority")
    binary = flag(parameters, "binary_data_output", "/parameters", default=False)
    explain = flag(parameters, "explain", "/parameters", default=False)
    return binary, timeout / 1e6 if timeout else None, place if priority else None, explain


def flag(parameters: dict[str, Any], name: str, at: str, *, default: bool) -> bool:
    """Read a parameter that is true or false. Raises InvalidRequest."""
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InvalidRequest(f"{at}/{name}: should be true or false, and is {kind(value)}")
    return value


def classes_of(parameters: dict[str, Any], at: str) -> int:
    """Read how many of the greatest an output is asked for; 0: the tensor itself. Raises InvalidRequest."""
    classes = parameters.get("classification", 0)
    if type(classes) is not int:
        raise InvalidRequest(f"{at}/parameters/classification: should be a whole number, 1 or more")
    return classes


def refuse_shared(parameters: Container[str], at: str) -> None:
    """Refuse a tensor that lies in shared memory. Raises InvalidRequest."""
    if _SHARED in parameters:
        raise InvalidRequest(f"{at}/parameters/{_SHARED}: shared memory is not offered: send the data itself")
