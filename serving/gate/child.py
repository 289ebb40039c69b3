"""The gate's process: loads the libraries once, then forks for each version a child with limits, and waits for it.

Speaks with `gate.Gate` in lines of JSON: a task in, findings out. A child that dies or overstays costs only itself.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from pathlib import Path

import onnx
from pydantic import ValidationError

from serving.engine.batching import Independence
from serving.gate.checks import Examination
from serving.gate.findings import ROWS, Findings, Task
from serving.gate.report import Check
from serving.linux.limits import confine
from serving.linux.sandbox import die_with, no_network

_MOST_ANSWER = 8 * 1024 * 1024


def main() -> None:
    """Examine what is asked for, one at a time, until the server closes the pipe."""
    _lower_priority()
    _preload()
    asked, answers = sys.stdin.buffer, sys.stdout.buffer
    for line in iter(asked.readline, b""):
        findings = _in_child(Task.model_validate_json(line), asked.fileno())
        answers.write(findings.model_dump_json().encode() + b"\n")
        answers.flush()


def _lower_priority() -> None:
    """Take the lowest priority of all processes.

    Where the kernel groups processes by session (autogroup), a process's nice value counts only within its session,
    and the session's against the others'.
    """
    os.setpriority(os.PRIO_PROCESS, 0, 19)
    with contextlib.suppress(OSError):  # a kernel without
        Path("/proc/self/autogroup").write_text("19")


def _preload() -> None:
    """Have onnx register its operators now: each child would do it anew, which takes longer than a small model."""
    graph = onnx.helper.make_graph([], "none", [], [])
    onnx.checker.check_model(onnx.helper.make_model(graph))


def _in_child(task: Task, asked: int) -> Findings:
    read, write = os.pipe()
    parent = os.getpid()
    # Forked, so that the libraries are loaded once. This process has one thread, and numpy starts none (see its
    # environment): a lock that another thread held now would stay locked in the child.
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            _confine(task, parent, write)
            _examine(task, write)
        finally:
            os._exit(70)  # no clean-up of a copy of the parent's state
    os.close(write)
    try:
        text, late = _listen(read, asked, task.limits.wall_s)
    finally:
        os.close(read)
        # The child leads its own group; after this nothing of it is left.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    return _read(text, status, late, task)


def _confine(task: Task, parent: int, keep: int) -> None:
    """Take from this process all that a model does not need."""
    os.setsid()
    _lower_priority()  # again: the new session has a priority of its own
    die_with(parent)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.closerange(3, keep)
    os.closerange(keep + 1, 256)  # there are few: none of the server's own were passed on
    os.environ.clear()
    memory_bytes = task.limits.memory_bytes or min(2 * 2**30 + 6 * task.size, _free_memory() * 3 // 4)
    # Last, for what comes before needs what these forbid, and nothing of the model may run before them.
    confine(memory_bytes, file_bytes=4 * task.size + 64 * 2**20, cpu_s=task.limits.cpu_s)
    no_network()


def _free_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _examine(task: Task, write: int) -> None:
    """Say in lines what is looked at, and in JSON what was found: at the end, and before what may end this process."""
    with os.fdopen(write, "wb") as pipe:

        def tell(said: str | Findings) -> None:
            text = said if isinstance(said, str) else said.model_dump_json()
            pipe.write(text.encode() + b"\n")
            pipe.flush()

        tell(Examination(task, tell).run())
    os._exit(0)


def _listen(pipe: int, asked: int, wall_s: float) -> tuple[bytes, bool]:
    """Read all that the child says; ends early, and says so, when its time is over."""
    text = bytearray()
    until = time.monotonic() + wall_s
    while len(text) < _MOST_ANSWER:
        left = until - time.monotonic()
        if left <= 0:
            return bytes(text), True
        ready, _, _ = select.select([pipe, asked], [], [], left)
        if pipe in ready:
            part = os.read(pipe, 65536)
            if not part:
                break
            text += part
        elif asked in ready:
            # No second task is sent before the first is answered: the pipe was closed, so the server has ended.
            return bytes(text), True
    return bytes(text), False


def _read(text: bytes, status: int, late: bool, task: Task) -> Findings:
    at = "the start"
    found = None
    for line in text.splitlines():
        if not line.startswith(b"{"):
            at = line.decode(errors="replace")
            continue
        with contextlib.suppress(ValidationError):  # it may have died in the middle of it
            found = Findings.model_validate_json(line)
    if found is not None:
        if at == ROWS and found.independence is None:  # it did not outlive the trial, which refuses nothing
            reason = "the trial of its rows did not end" if late else "the trial of its rows ended its process"
            found.independence = Independence(proved=False, reason=reason)
            found.checks.append(Check(name=ROWS, outcome="warned", detail=f"{reason}: requests run alone"))
        return found
    if late:
        return Findings(reasons=[f"it did not end within {task.limits.wall_s:g} s at: {at}"])
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGXCPU:
            return Findings(reasons=[f"it took more than {task.limits.cpu_s} s of processor time at: {at}"])
        return Findings(reasons=[f"it ended its process ({signal.Signals(number).name}) at: {at}"])
    return Findings(reasons=[f"it ended its process at: {at}"])


if __name__ == "__main__":
    main()
