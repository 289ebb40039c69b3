"""A receiver of OTLP over HTTP, made of OpenTelemetry's own protocol, for a process of its own.

It prints its port, and then a line of JSON for each span that it gets.
"""

from __future__ import annotations

import gzip
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


def attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        assert self.path == "/v1/traces", self.path
        for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for span in (span for scope in of_resource.scope_spans for span in scope.spans):
                told = {
                    "resource": attributes(of_resource.resource.attributes),
                    "name": span.name,
                    "kind": span.kind,
                    "trace": span.trace_id.hex(),
                    "id": span.span_id.hex(),
                    "parent": span.parent_span_id.hex(),
                    "state": span.trace_state,
                    "start": span.start_time_unix_nano,
                    "end": span.end_time_unix_nano,
                    "attributes": attributes(span.attributes),
                    "links": [link.span_id.hex() for link in span.links],
                    "status": span.status.code,
                }
                print(json.dumps(told), flush=True)
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


if __name__ == "__main__":
    with HTTPServer(("127.0.0.1", 0), Receiver) as server:
        print(server.server_port, flush=True)
        server.serve_forever()
