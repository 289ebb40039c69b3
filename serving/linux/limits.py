"""What this process may use of the machine, and bounds on what it takes."""

from __future__ import annotations

import contextlib
import math
import os
import resource
from pathlib import Path


def cores() -> int:
    """Return how many cores this process may use: affinity and cgroup quota, at least 1."""
    allowed: float = len(os.sched_getaffinity(0))
    for quota in (_quota_v2, _quota_v1):
        with contextlib.suppress(OSError, ValueError):  # no such file, or no quota: "max"
            allowed = min(allowed, quota())
            break
    return max(1, math.floor(allowed))


def _quota_v2() -> float:
    quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()[:2]
    return int(quota) / int(period)


def _quota_v1() -> float:
    folder = Path("/sys/fs/cgroup/cpu")
    quota = int((folder / "cpu.cfs_quota_us").read_text())
    return math.inf if quota <= 0 else quota / int((folder / "cpu.cfs_period_us").read_text())


def memory() -> int:
    """Return how many bytes of memory there are for this server: the machine's, or less where a cgroup says so."""
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such file, or no limit: "max"
            found = min(found, int(Path(file).read_text()))
    return found


def limit_data(size: int) -> None:
    """Have allocations fail in this process once its data has so many bytes."""
    _limit(resource.RLIMIT_DATA, size)


def raise_open_files() -> None:
    """Raise this process's limit of open files to what it may have: each connection takes one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def confine(memory_bytes: int, *, file_bytes: int | None = None, cpu_s: int | None = None) -> None:
    """Bound what this process takes from now on, for good; memory_bytes: beside what it has mapped.

    Where the machine's memory ends, it is killed before any process that serves.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _limit(resource.RLIMIT_AS, mapped + memory_bytes, for_good=True)
    _limit(resource.RLIMIT_CORE, 0, for_good=True)
    if file_bytes is not None:
        _limit(resource.RLIMIT_FSIZE, file_bytes, for_good=True)
    if cpu_s is not None:
        # The soft limit's signal, SIGXCPU, tells the parent why the process ended; the hard one's is a plain SIGKILL.
        _limit(resource.RLIMIT_CPU, cpu_s, for_good=True, spare=2)


def _limit(kind: int, value: int, *, for_good: bool = False, spare: int = 0) -> None:
    """Lower a soft limit, and the hard one too `for_good`: to `spare` more than it, as far as that is allowed."""
    soft, hard = (math.inf if bound == resource.RLIM_INFINITY else bound for bound in resource.getrlimit(kind))
    chosen = min(value, hard) if for_good else min(value, soft)
    most = min(chosen + spare, hard) if for_good else hard
    resource.setrlimit(kind, (int(chosen), resource.RLIM_INFINITY if most == math.inf else int(most)))
