"""A server's side of HTTP/2 without I/O: bytes in, events and bytes out. It knows no sockets, no clock, and no gRPC."""
