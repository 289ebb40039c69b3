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
    """End a connection, and what the kernel still holds for its client: closed in the usual way, it keeps that for
    minutes, and the client, which has not read, never learns of the end.
    """
    sock = transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    transport.abort()


def close_or_reset(transport: asyncio.Transport) -> None:
    """End a connection in the usual way, or with a reset where its client has not taken all that was sent."""
    sock = transport.get_extra_info("socket")
    try:
        waiting = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0]
    except OSError:  # it has ended by itself
        waiting = 0
    if waiting:
        reset(transport)
    else:
        transport.abort()


def has_left(transport: asyncio.Transport) -> bool:
    """Tell whether the client's end has said that nobody is there any more: its reset is seen by the kernel alone."""
    sock = transport.get_extra_info("socket")
    try:
        return bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _CLOSED)
    except OSError:
        return True
