"""What a worker notes in memory that outlives it: signs of life, and which version each of its threads runs.

The parent reads it: of a worker that is silent, to know that it hangs; of one that died, to know which model ran. It
is anonymous memory (no file that a full disk could refuse), and a note is one store of eight bytes, which the other
process sees whole or not at all.
"""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import re
import threading
import time
from dataclasses import dataclass
from enum import IntEnum
from multiprocessing import reduction
from typing import Any

RECORDS = 1024
"""Threads of models that can be told apart; those beyond run unrecorded."""
_CELLS = 24  # of eight bytes each: since when, which thread, then the text
_HEAD = 3  # the last sign of life, the phase, and how far the worker lags behind the coordinator
_TEXT = (_CELLS - 2) * 8
_CRASHED = re.compile(r"Current thread 0x([0-9a-f]+)")


class Phase(IntEnum):
    """How far a worker has come."""

    STARTING = 0
    """It takes no connections yet."""
    LOADED = 1
    """Its models are loaded, and taking connections is next."""
    READY = 2
    """From now on silence means that it hangs."""
    ENDING = 3
    """It finishes what it has: the parent bounds that by the drain time, not by silence."""


@dataclass(frozen=True, slots=True)
class Running:
    """A version that a thread was running, or loading: since when, in monotonic seconds; the thread's identity."""

    name: str
    version: str
    since: float
    loading: bool
    thread: float


class Record:
    """One thread's notes.

    `since[0]` is set to monotonic seconds before a run, to minus as much before a load, which may take long without
    being stuck, and to 0 after it.
    """

    __slots__ = ("_close", "since")

    def __init__(self, since: Any, close: Any = None) -> None:
        self.since = since
        self._close = close

    def close(self) -> None:
        """Free the record, once the thread runs nothing any more."""
        # First: it must not count, with another's start, between the moment it is free and its next text.
        self.since[0] = 0.0
        if self._close is not None:
            self._close()


def unrecorded() -> Record:
    """Make a record that nobody reads."""
    return Record(memoryview(bytearray(8)).cast("d"))


class Heartbeat:
    """The notes of one worker. It can be given to a spawned process, and both then see the same memory."""

    def __init__(self, notes: int | None = None, crash: int | None = None) -> None:
        self._notes = os.memfd_create("serving-notes") if notes is None else notes
        self._crash = os.memfd_create("serving-crash") if crash is None else crash
        size = 8 * (_HEAD + RECORDS * _CELLS)
        if notes is None:
            os.ftruncate(self._notes, size)
        self._memory = mmap.mmap(self._notes, size)
        self._cells = memoryview(self._memory).cast("d")
        self._lock = threading.Lock()
        self._free = list(range(RECORDS - 1, -1, -1))

    def __reduce__(self) -> Any:
        return _opened, (reduction.DupFd(self._notes), reduction.DupFd(self._crash))

    def close(self) -> None:
        """Free the memory, on the parent's side."""
        self._cells.release()
        self._memory.close()
        for descriptor in (self._notes, self._crash):
            os.close(descriptor)

    # The worker's side.

    def catch_crashes(self) -> None:
        """Have the interpreter write down which thread it was when a signal such as SIGSEGV ends this process."""
        faulthandler.enable(file=self._crash, all_threads=True)

    def beat(self) -> None:
        """Give a sign of life; the event loop does so ten times a second."""
        self._cells[0] = time.monotonic()

    def enter(self, phase: Phase) -> None:
        """Say that the worker has come to a phase."""
        self.beat()  # first: the parent measures the silence of one that is ready
        self._cells[1] = phase

    def open(self, name: str, version: str) -> Record:
        """Take a record for the calling thread, which will run this version."""
        with self._lock:
            if not self._free:
                return unrecorded()
            number = self._free.pop()
        at = _HEAD + number * _CELLS
        text = f"{name}/{version}".encode()[:_TEXT]
        # The text is whole before `since` makes it count.
        self._memory[8 * (at + 2) : 8 * (at + _CELLS)] = text.ljust(_TEXT, b"\0")
        self._cells[at + 1] = _thread_number(threading.get_ident())
        return Record(self._cells[at : at + 1], lambda: self._give_back(number))

    def _give_back(self, number: int) -> None:
        with self._lock:
            self._free.append(number)

    # The parent's side.

    @property
    def phase(self) -> Phase:
        """How far the worker has come."""
        return Phase(int(self._cells[1]))

    @property
    def last_sign(self) -> float:
        """Monotonic seconds of the last sign of life; one clock for all processes of a machine."""
        return self._cells[0]

    @property
    def lag(self) -> float:
        """Seconds for which the worker has left something unacknowledged that the coordinator told it.

        The parent measures it, and the worker, which can't, reports it.
        """
        return self._cells[2]

    @lag.setter
    def lag(self, seconds: float) -> None:
        self._cells[2] = seconds

    def running(self) -> list[Running]:
        """Return what was being run when the worker died, or is now; the one whose thread crashed alone, if known."""
        found = []
        for at in range(_HEAD, len(self._cells), _CELLS):
            since = self._cells[at]
            if since:
                text = self._memory[8 * (at + 2) : 8 * (at + _CELLS)].rstrip(b"\0").decode(errors="replace")
                name, _, version = text.rpartition("/")
                found.append(Running(name, version, abs(since), since < 0, self._cells[at + 1]))
        crashed = _CRASHED.search(self._written())
        if crashed is None:
            return found
        thread = _thread_number(int(crashed[1], 16))
        return [running for running in found if running.thread == thread] or found

    def crash(self) -> str:
        """Return what the interpreter wrote down of the thread that crashed, in one line; empty where none did."""
        written = self._written()
        what = written.split("\n", 1)[0]
        crashed = _CRASHED.search(written)
        where = written[crashed.end() :].split("\n\n", 1)[0].splitlines()[1:] if crashed is not None else []
        return "; ".join([what, *(line.strip() for line in where[:10])])

    def _written(self) -> str:
        with contextlib.suppress(OSError):
            return os.pread(self._crash, 65536, 0).decode(errors="replace")
        return ""


def _opened(notes: Any, crash: Any) -> Heartbeat:
    return Heartbeat(notes.detach(), crash.detach())


def _thread_number(identity: int) -> float:
    """Make a thread's identity, an address, fit a cell: addresses have 48 bits, and a double holds 53."""
    return float(identity & ((1 << 53) - 1))
