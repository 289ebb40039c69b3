"""Long bodies and answers go to a process of their own, so that a stranger's small request keeps its time.

One process a worker: started for the first long body, ended when it is idle, replaced when it dies. It runs the same
codecs that read short bodies. What waits for it is bounded, takes turns by sender, and never waits past its deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pickle
import socket
import subprocess
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from serving.bodies.exchange import receive, send
from serving.engine.request import Request
from serving.errors import DeadlineExceeded, InvalidRequest, NotReady, QueueFull, ServingError
from serving.linux.sandbox import bare_environment

log = logging.getLogger("serving.bodies")

_START_S = 60.0
_GOING = "this server is going away"
_FAULT = "the server failed on this request; its log has the reason"
TURN_BYTES = 256 * 1024
"""Bytes that are worked on in one turn of the event loop; the rest of what came at once waits for the next ones."""


@dataclass(slots=True, eq=False)
class Job:
    """One body to decode, or answer to encode; `done` takes what comes of it, unless that is not wanted any more."""

    sender: Hashable
    codec: Any
    work: Callable[..., Any]
    given: tuple[Any, ...]
    done: Callable[[Any], None] | None
    timer: asyncio.TimerHandle | None = None


@dataclass(eq=False, repr=False)
class CodecPool:
    """The codec process of one worker, and what waits for it. All public methods belong to the event loop.

    memory_bytes: that a task may take. task_s: seconds after which a task is given up and its process ended.
    idle_s: seconds without a task after which the process ends. most_waiting: bodies that wait for it.
    """

    _: KW_ONLY
    memory_bytes: int = 1 << 30
    task_s: float = 30.0
    idle_s: float = 60.0
    most_waiting: int = 256
    busy_s: float = field(init=False, default=0.0)
    """Seconds in which the process was at work, added up."""

    def __post_init__(self) -> None:
        self._queues: OrderedDict[Hashable, deque[Job]] = OrderedDict()  # by sender, the next one first
        self._bodies = 0  # that wait
        self._busy = False
        self._began = 0.0
        self._idle: asyncio.TimerHandle | None = None
        self._spent = 0  # bytes worked on in this turn of the loop
        self._deferred: deque[tuple[Request, Callable[[], None]]] = deque()  # who asks again in the next ones
        self._closing = False
        # One thread speaks with the process, from start to end, and alone knows the attributes below.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="codecs")
        self._process: _Process | None = None

    def may_work_here(self, size: int) -> bool:
        """Tell whether so many bytes more may be decoded or encoded in this turn of the event loop, and count them."""
        if not self._spent:
            asyncio.get_running_loop().call_soon(self._turned)
        self._spent += size
        return self._spent <= TURN_BYTES and not self._deferred

    def work_later(self, request: Request, work: Callable[[], None]) -> None:
        """Have a body ask again in one of the next turns, as there was no room in this: it is quick all the same.

        In the process it would wait behind what is long, and many connections at once would all be sent there.
        """
        self._deferred.append((request, work))

    def _turned(self) -> None:
        self._spent = 0
        # While it is empty those in it have room, one after the other; who finds none goes back to its head.
        waiting, self._deferred = self._deferred, deque()
        while waiting and self._spent < TURN_BYTES:
            request, work = waiting.popleft()
            if not request.done:
                work()
        self._deferred += waiting

    def submit(
        self,
        request: Request,
        codec: Any,
        work: Callable[..., Any],
        given: tuple[Any, ...],
        done: Callable[[Any], None],
        *,
        deadline: float | None = None,
    ) -> Job:
        """Have `work(codec, *given)` done in the process; `done` gets what it returns, or a ServingError, on the loop.

        `work` is a function of a module. deadline: monotonic seconds at which it is answered DeadlineExceeded; None for
        an answer, whose request was let in already. Raises QueueFull.
        """
        loop = asyncio.get_running_loop()
        job = Job(request.sender, codec, work, given, done)
        if self._closing:
            loop.call_soon(self._answer, job, NotReady(_GOING))
            return job
        if deadline is not None:
            if self._bodies >= self.most_waiting:
                raise QueueFull("too many long bodies wait to be read: come back later")
            self._bodies += 1
            job.timer = loop.call_later(max(0.0, deadline - time.monotonic()), self._expire, job)
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        self._queues.setdefault(job.sender, deque()).append(job)
        if not self._busy:
            self._next(loop)
        return job

    @property
    def waiting(self) -> int:
        """How many bodies and answers wait for the process."""
        return sum(map(len, self._queues.copy().values()))

    def cancel(self, job: Job) -> None:
        """Drop a job whose caller has left, and what it holds; nothing is told."""
        job.done = None
        self._drop(job)

    def _drop(self, job: Job) -> None:
        if job.timer is not None:
            job.timer.cancel()
        queue = self._queues.get(job.sender)
        if queue is not None and job in queue:
            queue.remove(job)
            self._bodies -= job.timer is not None
            if not queue:
                del self._queues[job.sender]

    def _expire(self, job: Job) -> None:
        self._drop(job)
        self._answer(job, DeadlineExceeded("the deadline passed while the body waited to be read"))

    @staticmethod
    def _answer(job: Job, found: Any) -> None:
        """Tell what came of a job, once."""
        # Whoever waits for the model next needs the body no longer; and the caller and its job would hold each other.
        done, job.done, job.given = job.done, None, ()
        if job.timer is not None:
            job.timer.cancel()
        if done is not None:
            done(found)

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        """Give the process the next job: that of the sender who has waited longest for a turn."""
        self._busy = bool(self._queues)
        if self._closing:
            return
        if not self._busy:
            self._idle = loop.call_later(self.idle_s, self._retire)
            return
        sender, queue = self._queues.popitem(last=False)
        job = queue.popleft()
        if queue:
            self._queues[sender] = queue
        self._bodies -= job.timer is not None
        self._began = time.monotonic()
        doing = loop.run_in_executor(self._thread, self._do, job)
        doing.add_done_callback(lambda done: self._finished(job, done, loop))

    def _finished(self, job: Job, doing: asyncio.Future[Any], loop: asyncio.AbstractEventLoop) -> None:
        self.busy_s += time.monotonic() - self._began
        self._next(loop)
        if not doing.cancelled():
            self._answer(job, doing.result())

    def _retire(self) -> None:
        self._idle = None
        self._thread.submit(self._end)

    def refuse(self) -> None:
        """Answer all that waits, and what comes, NotReady; what the process does is given up."""
        self._closing = True
        if self._idle is not None:
            self._idle.cancel()
        if self._process is not None:
            self._process.kill()  # so that the thread, which may wait for it, comes back
        waiting = [job for queue in self._queues.values() for job in queue]
        self._queues.clear()
        self._bodies = 0
        loop = asyncio.get_running_loop()
        for job in waiting:
            loop.call_soon(self._answer, job, NotReady(_GOING))

    async def close(self) -> None:
        """End the process, whatever it does."""
        self.refuse()
        await asyncio.get_running_loop().run_in_executor(self._thread, self._end)
        self._thread.shutdown(wait=False)

    # On the thread

    def _do(self, job: Job) -> Any:
        for _ in range(2):
            if self._closing:
                return NotReady(_GOING)
            try:
                process = self._process or self._start()
                result, fault = process.ask(job, self.task_s)
            except TimeoutError:
                self._end()
                return InvalidRequest(f"this took over {self.task_s:g} s to read: send less in one request")
            # What it has read of this task, or we of its answer, can't be told from the next one's: it must end.
            except (OSError, EOFError):  # killed: perhaps by what it was given, perhaps not
                self._end()
                continue
            except ServingError as error:
                return error
            except Exception:  # a fault of ours must be answered, or the caller hangs
                log.exception("a long body or answer could not be handed on")
                self._end()
                return ServingError(_FAULT)
            if fault is None:
                return result
            log.error("a codec failed on a long body or answer:\n%s", fault)
            return ServingError(_FAULT)
        log.error("a long body or answer ended its codec process twice")
        return InvalidRequest("reading this ended the process that reads long bodies, twice: send less in one request")

    def _start(self) -> _Process:
        try:
            self._process = _Process(self.memory_bytes)
        except (OSError, EOFError) as error:
            log.error("the process for long bodies does not start: %r", error)
            raise NotReady("long bodies can't be read now: come back later") from None
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.end()


_pickled: WeakKeyDictionary[Any, bytes] = WeakKeyDictionary()
"""Codecs as the process is sent them, with each task: it keeps what it made of those that come again."""


class _Process:
    """A codec process."""

    def __init__(self, memory_bytes: int) -> None:
        self._sock, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603  nothing in it comes from outside
                [sys.executable, "-m", "serving.bodies.codec_process", str(theirs.fileno()), str(memory_bytes)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                cwd="/",
                env=bare_environment(),
            )
        try:
            self._sock.settimeout(_START_S)
            receive(self._sock)
        except (OSError, EOFError):
            self.end()
            raise

    def ask(self, job: Job, seconds: float) -> Any:
        """Have a job done. Raises TimeoutError, OSError or EOFError."""
        self._sock.settimeout(seconds)
        if job.codec not in _pickled:
            _pickled[job.codec] = pickle.dumps(job.codec, 5)
        send(self._sock, (_pickled[job.codec], job.work, job.given))
        return receive(self._sock)

    def kill(self) -> None:
        """End what it does; for any thread."""
        with contextlib.suppress(OSError):
            self._process.kill()

    def end(self) -> None:
        """Kill it: nothing that it does is wanted any more."""
        self._sock.close()
        self.kill()
        self._process.wait()
