"""The real command with a fault built in: `python -m tests.drills.faulty run ...`, the fault named by FAULTS.

FAULTS is JSON, and each key works in every process of the server, workers included (a spawned process imports its main
module anew):
  "kill": value       a row for iris 2 whose first cell is this ends its worker with SIGSEGV, as a bad kernel does
  "hang": value       such a row stops the whole process: its thread keeps the interpreter and never gives it up
  "stuck": value      such a row never comes back from the model, and the event loop goes on
  "deaf": value       such a row ends its worker's listening to the coordinator
  "slow": seconds     each batch takes so much longer
  "shadow": seconds   each copy for a shadow takes so much longer, and fails
  "leak": bytes       each batch leaves so much behind: a control that the memory drill has to fail
  "wait": path        all workers but the first do not begin until there is a file of this name
  "no_process": path  while there is a file of this name the system gives no process; it is asked often
  "crash_at_start"    every worker dies before it is ready
  "switch": seconds   threads take turns so often, where one does not give its turn up
  "clock": seconds    the wall clock jumps by so much a second after the start
  "boot": name        the server takes itself for one on a machine of this name
  "off": [names]      defences that are switched off, for controls: bisection, departed, quarantine, hang, polite,
                      respawn, unclean (deaths of servers speak against what is tried), shrink, fair, estimate (of
                      what a request waits), aside (loads are off the event loop), spare (shadows run on what is left),
                      proof (that rows are independent, before they run together), events (of the models folder),
                      looks (at it),
                      recover (sockets that were lent to threads); of gRPC: calm, blocks, counted
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import sys
import threading
import time
from concurrent.futures import Executor, Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FAULTS: dict[str, Any] = json.loads(os.environ.get("FAULTS", "{}"))
_kept: list[bytes] = []
_ends: list[Any] = []


def _bad(inputs: tuple[Any, ...], value: float) -> bool:
    return inputs[0].dtype.kind == "f" and bool((inputs[0].reshape(len(inputs[0]), -1)[:, 0] == value).any())


def _replace(owner: Any, name: str, by: Any) -> None:
    """Put something in the place of what a module or a class has; a name that is gone would make a control harmless."""
    assert hasattr(owner, name), f"{owner} has no {name}"
    setattr(owner, name, by)


def _in_the_model() -> None:
    from serving.engine.session import OnnxSession

    run = OnnxSession.run

    def faulty(self: OnnxSession, inputs: tuple[Any, ...]) -> Any:
        if threading.current_thread().name.startswith("load"):
            return run(self, inputs)  # warming up is no request
        if "kill" in FAULTS and threading.current_thread().name.startswith("iris-2") and _bad(inputs, FAULTS["kill"]):
            os.kill(os.getpid(), signal.SIGSEGV)
            time.sleep(60)
        if "stuck" in FAULTS and _bad(inputs, FAULTS["stuck"]):
            time.sleep(3600)
        if "deaf" in FAULTS and _bad(inputs, FAULTS["deaf"]):
            _deafen()
        if "hang" in FAULTS and _bad(inputs, FAULTS["hang"]):
            _hold_the_interpreter()
        if "slow" in FAULTS:
            time.sleep(FAULTS["slow"])
        if "leak" in FAULTS:
            _kept.append(b"\1" * FAULTS["leak"])
        return run(self, inputs)

    _replace(OnnxSession, "run", faulty)


def _in_the_shadow() -> None:
    from serving.deploy.shadow import Shadow

    def run(inputs: tuple[Any, ...]) -> Any:
        time.sleep(FAULTS["shadow"])
        raise RuntimeError("a shadow that fails")

    _replace(Shadow, "_session", lambda self: SimpleNamespace(run=run))


def _deafen() -> None:
    """Read from the channel no more, in whatever worker this is."""
    for loop, transport in _ends:
        loop.call_soon_threadsafe(transport.pause_reading)


def _note_ends() -> None:
    from serving.deploy.channel import Channel

    made = Channel.connection_made

    def noted(self: Channel, transport: Any) -> None:
        made(self, transport)
        _ends.append((asyncio.get_running_loop(), transport))

    _replace(Channel, "connection_made", noted)


def _hold_the_interpreter() -> None:
    """Never let another thread of this process run: one call into C that keeps the lock."""
    import ctypes

    ctypes.PyDLL(None).sleep(3600)


def _wait_to_start(go: Path) -> None:
    from serving import worker

    serve = worker._serve

    def late(given: Any, *rest: Any, **named: Any) -> None:
        while given.slot and not go.exists():
            time.sleep(0.02)
        serve(given, *rest, **named)

    worker._serve = late


def _no_process(there: Path) -> None:
    from multiprocessing.context import SpawnProcess

    from serving import supervisor

    start = SpawnProcess.start

    def refused(self: SpawnProcess) -> None:
        if self.name.startswith("worker-") and there.exists():
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        start(self)

    _replace(SpawnProcess, "start", refused)
    supervisor.RETRY_S = 0.2


def _off(name: str) -> None:
    if name == "bisection":
        from serving.engine.isolation import Isolation
        from serving.errors import ServingError

        def whole(self: Isolation, requests: list[Any]) -> list[Any]:
            try:
                return self._run(requests)
            except ServingError as error:
                return [error for _ in requests]

        _replace(Isolation, "outcomes", whole)
    elif name in ("departed", "recover"):
        _off_in_predictions(name)
    elif name == "quarantine":
        import serving.worker_exits

        _replace(serving.worker_exits, "select_culprit", lambda deaths, last: None)
    elif name == "hang":
        from serving.supervisor import Supervisor

        _replace(Supervisor, "_watch", lambda self, now: None)
    elif name == "shrink":
        from serving.deploy.memory_reclaim import MemoryReclaim

        _replace(MemoryReclaim, "tick", lambda self, sessions: None)
    elif name == "respawn":
        from serving.supervisor import Supervisor

        _replace(Supervisor, "_died", lambda self, worker, code: None)
    elif name == "polite":
        from serving.http_api.fast_path.protocol import FastPath

        _replace(FastPath, "shutdown", lambda self: self.transport.close())
    elif name == "fair":
        _one_queue()
    elif name == "estimate":
        from serving.engine.latency_model import LatencyModel

        _replace(LatencyModel, "waits", lambda self, allowance, most: (0.0, 0.0))
    elif name == "aside":
        import serving.deploy.fleet

        _replace(serving.deploy.fleet, "ThreadPoolExecutor", _Here)
    elif name == "spare":
        from serving.deploy import shadow

        shadow.HEAVY_S, shadow.REST, shadow.LONG_REST = float("inf"), 0, 0
        _replace(shadow.Shadow, "_spare", lambda self: True)
    elif name in ("calm", "blocks", "counted"):
        _off_in_grpc(name)


def _off_in_predictions(name: str) -> None:
    if name == "departed":
        from serving.prediction.prediction import Prediction

        _replace(Prediction, "cancel", lambda self: None)
    else:
        from serving.prediction.direct import DirectPrediction

        _replace(DirectPrediction, "recover", lambda self: False)


def _deaths_unseen() -> None:
    """Take servers that died for ones that ended as they should."""
    from serving.deploy.analysis_runner import AnalysisRunner

    _replace(AnalysisRunner, "server_died", lambda self, tried: None)


def _one_queue() -> None:
    """Run the batches of all models one after another, in the order in which they came."""
    from concurrent.futures import ThreadPoolExecutor

    from serving.engine.isolation import Isolation

    alone, real = ThreadPoolExecutor(1), Isolation.outcomes

    def queued(self: Isolation, requests: list[Any]) -> list[Any]:
        return alone.submit(real, self, requests).result()

    _replace(Isolation, "outcomes", queued)


class _Here(Executor):
    """Runs all at once, on the thread that asks: the event loop's."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done


def _unproved() -> None:
    """Take all rows for independent."""
    from serving.engine.batching import Independence
    from serving.gate.results import GateResults

    _replace(GateResults, "independence", lambda *given: Independence(proved=True))


def _no_events() -> None:
    """Take the models folder for one on a mount that tells of no change: only the coordinator's own scans see one."""
    from serving.deploy import deployment

    _replace(deployment, "watch", lambda *_: None)


def _no_looks() -> None:
    """Look at the models folder once, and then after an hour."""
    from serving.deploy import coordinator, deployment

    _replace(deployment, "watch", lambda *_: None)
    coordinator.SCAN_S = 3600.0


_OTHERS = {"unclean": _deaths_unseen, "proof": _unproved, "events": _no_events, "looks": _no_looks}


def _off_in_grpc(name: str) -> None:
    from serving.grpc_api.call import Call
    from serving.http2 import connection, frame_reader, hpack, idle_frames

    if name == "calm":
        _replace(idle_frames.IdleFrames, "add", lambda self, *_, **__: None)
    elif name == "blocks":
        hpack.MAX_LIST_BYTES = frame_reader.MAX_BLOCK_BYTES = connection.MAX_BLOCK_BYTES = 2**30  # type: ignore[attr-defined]
    else:
        _replace(Call, "hold", lambda self, size: None)


if FAULTS:
    _in_the_model()
    if "deaf" in FAULTS:
        _note_ends()
    if "shadow" in FAULTS:
        _in_the_shadow()
    for switched in FAULTS.get("off", ()):
        _OTHERS[switched]() if switched in _OTHERS else _off(switched)
    if "clock" in FAULTS:
        began, real = time.monotonic(), time.time
        time.time = lambda: real() + (FAULTS["clock"] if time.monotonic() - began > 1 else 0)
    if "boot" in FAULTS:
        from serving.repository import servers

        _replace(servers, "_boot", lambda: FAULTS["boot"])
    if "wait" in FAULTS:
        _wait_to_start(Path(FAULTS["wait"]))
    if "no_process" in FAULTS:
        _no_process(Path(FAULTS["no_process"]))
    if "switch" in FAULTS:
        sys.setswitchinterval(FAULTS["switch"])
    if FAULTS.get("crash_at_start"):
        import serving.http_api.services

        _replace(serving.http_api.services, "make_services", lambda *_, **__: os.abort())

if __name__ == "__main__":
    from serving.cli import main

    main()
