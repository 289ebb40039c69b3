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
_AGREE_S = 0.5
"""Seconds that a client has to agree to the end of an idle TLS connection."""


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
    if _unsent(transport):
        reset(transport)
    else:
        transport.abort()


def close_idle(transport: asyncio.Transport) -> None:
    """Close a connection on which nothing is owed.

    Over TLS both sides have to agree on the end, and who keeps a connection for later does not look at it: such a
    client is told, and not waited for.
    """
    received = not _unsent(transport)
    transport.close()
    if received and transport.get_extra_info("sslcontext") is not None:
        asyncio.get_running_loop().call_later(_AGREE_S, transport.abort)


def half_close(transport: asyncio.Transport) -> None:
    """End this side's half of a connection; over TLS, which has no halves, all of it behind what was written."""
    if transport.get_extra_info("sslcontext") is None:
        transport.write_eof()
    else:
        transport.close()


def _unsent(transport: asyncio.Transport) -> int:
    """Return how many bytes the kernel holds that the client has not received."""
    sock = transport.get_extra_info("socket")
    try:
        unsent: int = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0]
    except (OSError, ValueError):  # it is closed already
        return 0
    return unsent


def has_left(transport: asyncio.Transport) -> bool:
    """Tell whether the client has reset the connection, which only the kernel knows while nothing is read from it."""
    sock = transport.get_extra_info("socket")
    if sock.family == socket.AF_UNIX:
        return False  # writing to it has failed by then, and the transport has ended
    try:
        return bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _CLOSED)
    except OSError:
        return True
