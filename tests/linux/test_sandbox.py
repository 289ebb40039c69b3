"""What a stranger's model can't do in the gate's process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86-64 has calls under two numbers")
def test_no_call_is_free_under_its_x32_number() -> None:
    """A call of the x32 ABI is refused as a forbidden one is, whichever it is: the same call under another number."""
    code = """
import ctypes, errno
from serving.linux.sandbox import no_network
assert no_network()
libc = ctypes.CDLL(None, use_errno=True)
for number in (41, 0x40000000 | 41, 0x40000000 | 39):  # socket, socket again, getpid
    assert libc.syscall(ctypes.c_long(number), 2, 1, 0) == -1
    assert ctypes.get_errno() == errno.EPERM, (number, ctypes.get_errno())
assert libc.syscall(ctypes.c_long(39)) > 0
"""
    subprocess.run([sys.executable, "-c", code], check=True)
