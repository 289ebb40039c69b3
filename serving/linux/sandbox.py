"""Takes from a process what a stranger's model does not need: the network, new programs, a life beyond its parent's."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct
import sys

_PR_SET_PDEATHSIG = 1
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
_ALLOW = 0x7FFF0000
_REFUSE = 0x00050000 | errno.EPERM

# socket, socketpair, connect, bind, execve, execveat, ptrace, process_vm_writev; by machine, since numbers differ.
_CALLS = {
    "x86_64": (0xC000003E, (41, 53, 42, 49, 59, 322, 101, 311)),
    "aarch64": (0xC00000B7, (198, 199, 203, 200, 221, 281, 117, 271)),
}


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def bare_environment() -> dict[str, str]:
    """Return an environment for a Python process: this one's modules, no credentials, and no threads of numpy's own."""
    return {
        "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LC_ALL": "C.UTF-8",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent, which has this pid, ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the kernel was asked
        os._exit(71)


def no_network() -> bool:
    """Refuse this process sockets and programs from now on; False where the kernel or machine has no such filter."""
    known = _CALLS.get(platform.machine())
    if known is None:
        return False
    filters = _filter(*known)
    buffer = ctypes.create_string_buffer(filters, len(filters))
    program = _Program(len(filters) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None)
    # Without it the kernel takes no filter from a process that is not root's.
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False
    return bool(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) == 0)


def _filter(architecture: int, calls: tuple[int, ...]) -> bytes:
    """Assemble classic BPF over struct seccomp_data: the call's number at 0, the architecture at 4.

    A jump is the number of instructions to skip. Forbidden calls jump to the last one, which refuses; so do all of the
    x32 ABI, which has the same calls under numbers of its own.
    """

    def op(code: int, yes: int, no: int, value: int) -> bytes:
        return struct.pack("=HBBI", code, yes, no, value)

    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    count = len(calls)
    return b"".join(
        [
            op(load, 0, 0, 4),
            op(equal, 1, 0, architecture),
            op(give, 0, 0, _REFUSE),
            op(load, 0, 0, 0),
            op(at_least, count + 1, 0, 0x40000000),  # x32
            *(op(equal, count - index, 0, number) for index, number in enumerate(calls)),
            op(give, 0, 0, _ALLOW),
            op(give, 0, 0, _REFUSE),
        ]
    )
