"""`ServerReflection` of both versions: tells clients without .proto files what may be called here.

Source: https://github.com/grpc/grpc/blob/master/doc/server-reflection.md.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from serving.grpc_api.status import Status
from serving.protocols.messages import message, pool


class Reflection:
    """Describes `services`, in the messages of one version of the protocol."""

    def __init__(self, package: str, *services: str) -> None:
        self._services = services
        self._response = message("ServerReflectionResponse", package)

    async def info(self, requests: AsyncIterator[Any], _: Any) -> AsyncIterator[Any]:
        """Answer each question."""
        async for request in requests:
            response = self._response(valid_host=request.host)
            response.original_request.CopyFrom(request)
            try:
                self._answer(request, response)
            except KeyError:
                response.error_response.error_code = Status.NOT_FOUND
                response.error_response.error_message = "there is no such symbol, file or extension"
            yield response

    def _answer(self, request: Any, response: Any) -> None:
        kind = request.WhichOneof("message_request")
        if kind == "list_services":
            for name in self._services:
                response.list_services_response.service.add(name=name)
        elif kind == "file_by_filename":
            found = pool.FindFileByName(request.file_by_filename)
            response.file_descriptor_response.file_descriptor_proto.append(found.serialized_pb)
        elif kind == "file_containing_symbol":
            found = pool.FindFileContainingSymbol(request.file_containing_symbol)
            response.file_descriptor_response.file_descriptor_proto.append(found.serialized_pb)
        elif kind == "all_extension_numbers_of_type":
            kind_found = pool.FindMessageTypeByName(request.all_extension_numbers_of_type)
            response.all_extension_numbers_response.base_type_name = kind_found.full_name
        else:  # nothing here has extensions
            raise KeyError(kind)
