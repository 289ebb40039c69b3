"""What this process takes of the machine, by the names that Prometheus' own clients give it."""

from __future__ import annotations

import os
import resource
import time
from functools import cache
from pathlib import Path


def usage() -> dict[str, float]:
    """Return seconds of processor time, bytes of memory, and file descriptors. Raises OSError where /proc is not."""
    fields = _fields()
    return {
        "process_cpu_seconds": (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
        "process_start_time_seconds": _started(),
        "process_virtual_memory_bytes": float(fields[20]),
        "process_resident_memory_bytes": float(fields[21]) * os.sysconf("SC_PAGE_SIZE"),
        "process_open_fds": float(len(os.listdir("/proc/self/fd"))),
        "process_max_fds": float(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
    }


def _fields() -> list[str]:
    """Return the fields of /proc/self/stat from the third on: the second may hold spaces (proc(5))."""
    return Path("/proc/self/stat").read_text().rpartition(")")[2].split()


@cache
def _started() -> float:
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + int(_fields()[19]) / os.sysconf("SC_CLK_TCK")
