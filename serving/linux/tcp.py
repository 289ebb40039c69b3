"""How a connection ends whose client may not be reading."""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import termios

_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER for no time at all."""
_CLOSED = 7
"""TCP_CLOSE in Linux's netinet/tcp.h."""


def reset(transport: asyncio.Transport) -> None:
    """Reset a connection, and drop what the kernel still holds for its client.

    Closed in the usual way, the kernel would keep that for minutes, and a client that does not read would not learn of
    the end.
    """
    sock = transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    transport.abort()


def close_or_reset(transport: asyncio.Transport) -> None:
    """Close a connection, or reset it where its client has not received all that was sent."""
    sock = transport.get_extra_info("socket")
    try:
        waiting = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0]
    except OSError:  # it is closed already
        waiting = 0
    if waiting:
        reset(transport)
    else:
        transport.abort()


def has_left(transport: asyncio.Transport) -> bool:
    """Tell whether the client has reset the connection, which only the kernel knows while nothing is read from it."""
    sock = transport.get_extra_info("socket")
    try:
        return bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _CLOSED)
    except OSError:
        return True
