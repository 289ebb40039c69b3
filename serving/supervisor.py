"""The parent's work: starts the workers, replaces those that die or hang, and drains them all when told to end."""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing.connection
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from serving.access.access import Access
from serving.access.principal import AccessInvalid
from serving.access.rate_limits import Buckets, Rates
from serving.deploy import channel
from serving.deploy.deployment import Deployment
from serving.deploy.watch import watch_code
from serving.heartbeat import Heartbeat, Phase, Running
from serving.linux.limits import cores
from serving.metrics.counts import Counts
from serving.metrics.definitions import Key
from serving.metrics.totals import read_totals, settle, write_parent_snapshot
from serving.repository.quarantine import Quarantine
from serving.settings import Settings
from serving.signals import DRAIN, UNREADY
from serving.tls import TlsInvalid, server_context
from serving.worker import REFUSED, Assignment, work
from serving.worker_exits import WorkerExits
from serving.worker_process import Worker, listed

log = logging.getLogger("serving.server")

YOUNG_S = 10.0
"""Seconds that a worker is ready before its death says nothing of the next one's."""
RETRY_S = 5.0
"""Seconds until the next try where the system gives no process."""
HUNG_GRACE_S = 3.0
"""Seconds that a hanging worker gets between SIGTERM and SIGKILL: it may still answer for other models."""
CUT_SHORT_S = 5.0
"""Seconds that workers get to refuse what they have, after a second SIGTERM."""
_FIXED = ("host", "port", "uds", "grpc_port", "models", "state_dir", "reload")


class CannotReload(Exception):
    """The configuration can't be read again; the text is one line."""


class Supervisor:
    """Keeps `settings.workers` workers serving from one socket. `reread` gives the settings anew, for SIGHUP."""

    def __init__(
        self,
        settings: Settings,
        sock: socket.socket,
        grpc: socket.socket | None,
        reread: Callable[[], Settings],
    ) -> None:
        self._settings, self._reread = settings, reread
        self._sock, self._grpc = sock, grpc
        self._context = multiprocessing.get_context("spawn")  # onnxruntime sessions do not survive fork
        self._workers: list[Worker] = []
        self._due: list[float] = []
        """When to start each worker that is missing."""
        self._metrics_dir = Path(tempfile.mkdtemp(prefix="serving-metrics-"))
        self._deployment = Deployment(
            settings.models,
            (lambda versions: read_totals(self._metrics_dir, versions)) if settings.metrics else None,
            state_dir=settings.state_dir,
            loads_at_once=max(1, cores() // 2),
            extension_ops=settings.extension_ops,
        )
        self._quarantine = Quarantine(settings.models, settings.state_dir)
        self._exits = WorkerExits()
        self._buckets = Buckets.shared()
        self._before: Settings | None = None
        """While a reload is in progress, the settings of the workers that it replaces."""
        self._served = False
        self._ends_asked = 0
        self._held: dict[tuple[str, str], str] = {}
        self._lags: dict[Key, float] = {}
        self._reload_asked = False
        self._watched_at = self._awake_since = time.monotonic()

    def run(self) -> int:
        """Run until told to end; return the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        signal.signal(signal.SIGHUP, self._ask_reload)
        edits_end = threading.Event()
        if self._settings.reload:
            watch_code(Path.cwd(), lambda: self._ask_reload(signal.SIGHUP, None), edits_end)
        self._apply_quarantine()
        self._deployment.start()
        try:
            self._fill(time.monotonic())
            while not self._ends_asked:
                if not self._tick():
                    return REFUSED
            self._deployment.conclude()
            self._await_unready()
            return self._drain()
        finally:
            edits_end.set()
            # Last of all: while workers drain, the coordinator's silence would be taken for a fault.
            self._deployment.stop()
            shutil.rmtree(self._metrics_dir, ignore_errors=True)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._ends_asked += 1

    def _ask_reload(self, number: int, frame: FrameType | None) -> None:
        self._reload_asked = True

    # One worker's life.

    @property
    def _staying(self) -> list[Worker]:
        """The workers that were not told to end."""
        return [worker for worker in self._workers if worker.kill_at is None]

    def _fill(self, at: float) -> None:
        """Have as many workers started as are missing."""
        self._due += [at] * (self._settings.workers - len(self._staying) - len(self._due))

    def _spawn(self) -> None:
        """Start a worker; where the system gives no process, try again later."""
        # The lowest number that no worker has: a replacement goes on from the counters of a dead one.
        slot = next(slot for slot in itertools.count() if all(worker.slot != slot for worker in self._workers))
        with contextlib.ExitStack() as made:
            try:
                heartbeat = made.enter_context(contextlib.closing(Heartbeat()))
                counts = made.enter_context(contextlib.closing(Counts.shared()))
                ours, theirs = map(made.enter_context, channel.pair())
                assignment = Assignment(
                    settings=self._settings,
                    sock=self._sock,
                    grpc=self._grpc,
                    slot=slot,
                    metrics_dir=self._metrics_dir,
                    parent=os.getpid(),
                    heartbeat=heartbeat,
                    counts=counts,
                    buckets=self._buckets,
                    link=theirs,
                    announces=slot == 0 and not self._served,
                )
                process = self._context.Process(target=work, args=(assignment,), name=f"worker-{slot}")
                process.start()
            except OSError as error:
                log.error("worker %d can't be started: %s", slot, error.strerror)
                self._due.append(time.monotonic() + RETRY_S)
                return
            made.pop_all()
        theirs.close()  # the worker's end must close with the worker
        link = self._deployment.coordinator.attach(ours)
        self._workers.append(Worker(slot, process, heartbeat, link, counts, self._settings))

    def _retire(self, worker: Worker, grace: float) -> None:
        """Tell a worker to end, and kill it once the grace time is over."""
        if worker.kill_at is None:
            worker.kill_at = time.monotonic() + grace
            worker.order(DRAIN)

    def _reap(self) -> Iterator[tuple[Worker, int | None]]:
        """Forget the workers that have ended, one by one, with their exit codes."""
        for worker in [worker for worker in self._workers if not worker.process.is_alive()]:
            self._workers.remove(worker)
            # Before its number is taken again: the next worker of it counts on from what is written here.
            settle(self._metrics_dir, worker.slot, worker.counts)
            yield worker, worker.process.exitcode

    # While serving.

    def _tick(self) -> bool:
        """Do what is due, and wait a moment for a death. False where a worker refused to start at all."""
        for due in [due for due in self._due if due <= time.monotonic()]:
            self._due.remove(due)
            self._spawn()
        multiprocessing.connection.wait([worker.process.sentinel for worker in self._workers], timeout=0.1)
        now = time.monotonic()
        for (
            worker
        ) in self._workers:  # before the dead are counted: one may have been ready, and killed, since the last look
            if worker.ready_at is None and worker.is_ready:
                worker.ready_at = now
                self._served = True
            if worker.kill_at is not None and now > worker.kill_at:
                worker.kill()
        for worker, code in self._reap():
            if code == REFUSED and not self._served:
                self._drain()
                return False
            if worker.kill_at is None and not self._ends_asked:
                self._died(worker, code)
            worker.close()
        self._watch(now)
        if self._before is None and self._reload_asked:
            self._reload_asked = False
            self._reload()
        self._advance()
        return True

    def _died(self, worker: Worker, code: int | None) -> None:
        """Say why a worker died by itself, blame the model that it ran, and have it replaced."""
        now = time.monotonic()
        why, reason = self._exits.cause(code)
        ran = worker.heartbeat.running() if reason in ("crash", "memory") else []
        doing = f" while it ran {listed(ran)}" if ran else ""
        early = worker.ready_at is None or now - worker.ready_at < YOUNG_S
        # A kill from outside says nothing of the next worker.
        wait = 0.0
        if reason != "killed" or worker.ready_at is None:
            wait = self._exits.wait(worker.slot, early=early)
        log.error("worker %d %s%s; its replacement starts in %.1f s", worker.slot, why, doing, wait)
        if wait and (row := self._exits.in_a_row(worker.slot)):
            log.error("worker %d is in a crash loop: %d deaths in a row, each within %.0f s of its start or before it "
                      "was ready", worker.slot, row, YOUNG_S)  # fmt: skip
        if crash := worker.heartbeat.crash():
            log.error("what worker %d was doing: %s", worker.slot, crash)
        if self._before is not None and worker.settings is self._settings and worker.ready_at is None:
            log.error("the reload is given up, the old workers and their configuration stay: the new worker ended "
                      "before it was ready")  # fmt: skip
            self._settings, self._before = self._before, None
        self._fill(now + wait)
        self._restarted(reason, ran, why)

    def _restarted(self, reason: str, ran: list[Running], why: str) -> None:
        """Count a restart, and the death against the versions that ran; the second one quarantines."""
        self._deployment.died({(running.name, running.version) for running in ran})
        culprit = self._exits.blame(ran, reason)
        if culprit is not None:
            log.error("%s %s is quarantined: it ended two workers (the last %s)", *culprit, why)
            self._quarantine.add(*culprit, f"it ended two workers; the last {why}")
            self._apply_quarantine()
        self._write_snapshot()

    def _apply_quarantine(self) -> None:
        """Have the coordinator serve what is in quarantine no more, and all else again, where that has changed."""
        held = {(case.name, case.version): case.reason for case in self._quarantine.cases()}
        if held == self._held:
            return
        for name, version in self._held.keys() - held.keys():
            log.info("%s %s is in quarantine no more", name, version)
        self._held = held
        self._deployment.coordinator.quarantine(held)
        self._write_snapshot()

    def _watch(self, now: float) -> None:
        """Replace workers that hang, once a second: silent ones, and those whose model never comes back."""
        if now - self._watched_at < 1:
            return
        if now - self._watched_at > 3:
            self._awake_since = now  # this process did not run either: the whole machine stood still
        self._watched_at = now
        self._exits.note_oom_kills()
        self._apply_quarantine()  # the file changes by hand, and other servers of the folder write to it
        self._measure_lag(now)
        for worker in [worker for worker in self._staying if worker.is_ready]:
            why, ran = worker.hangs(now, awake_since=self._awake_since)
            if why:
                log.error("worker %d %s; it is replaced", worker.slot, why)
                self._retire(worker, HUNG_GRACE_S)
                self._fill(now)
                self._restarted("hang", ran, "hung")

    def _measure_lag(self, now: float) -> None:
        """Tell each worker, and who scrapes any of them, how far it is behind; a worker that is deaf can't know."""
        lags: dict[Key, float] = {}
        for worker in self._workers:
            seconds = min(worker.link.behind(now), now - self._awake_since)
            worker.heartbeat.lag = round(seconds, 1) if seconds > 1 else 0.0
            lags["serving_worker_lag_seconds", (str(worker.slot),)] = worker.heartbeat.lag
            unfinished = self._deployment.coordinator.unfinished[worker.link]
            lags["serving_worker_changes_pending", (str(worker.slot),)] = unfinished
        for model, (generation, refused) in self._deployment.coordinator.asked.items():
            lags["serving_model_asked_generation", (model,)] = generation
            lags["serving_model_refused", (model,)] = float(refused)
        self._lags = lags
        self._write_snapshot()

    def _write_snapshot(self) -> None:
        """Put what only the parent knows into the folder that every scrape adds up."""
        write_parent_snapshot(
            self._metrics_dir,
            counters={("serving_worker_restarts", (reason,)): n for reason, n in self._exits.restarts.items()},
            gauges={("serving_model_quarantined", version): 1.0 for version in self._held} | self._lags,
        )

    # Reload: one new worker at a time, ready before an old one drains.

    def _reload(self) -> None:
        try:
            fresh = self._reread()
            check_credentials(fresh)
        except (CannotReload, AccessInvalid, TlsInvalid) as error:
            log.error("the configuration is not read again, the old one stays: %s", error)
            return
        fixed = {name: getattr(self._settings, name) for name in _FIXED}
        changed = [name for name, value in fixed.items() if getattr(fresh, name) != value]
        if changed:
            log.warning("%s can only change with a restart", ", ".join(changed))
        log.info("configuration read again: %d workers are replaced one by one", len(self._workers))
        self._before, self._settings = self._settings, fresh.model_copy(update=fixed)
        logging.getLogger().setLevel(self._settings.log_level.upper())
        self._fill(time.monotonic())

    def _advance(self) -> None:
        """Take the next step of a reload, if one is in progress and the step before it is done.

        Which step that is follows from who is there: so a worker that dies meanwhile, or a process that the system does
        not give, costs a reload time and never a worker that serves.
        """
        staying = self._staying
        old = [worker for worker in staying if worker.settings is not self._settings]
        starting = [worker for worker in staying if worker not in old and not worker.is_ready]
        if self._before is None or self._due or starting or len(staying) < len(self._workers):
            return
        if not old:
            self._before = None
            log.info("every worker is new")
        elif len(staying) > self._settings.workers:
            self._retire(old[0], self._settings.drain_s + 2)
        else:
            self._spawn()

    # The end.

    def _await_unready(self) -> None:
        """Go on accepting until load balancers have noticed that this server is unready, or another signal comes."""
        until = time.monotonic() + self._settings.drain_delay_s
        if self._settings.drain_delay_s:
            log.info("unready, and accepting for another %.0f s", self._settings.drain_delay_s)
            for worker in self._workers:
                worker.order(UNREADY)
        asked = self._ends_asked
        while time.monotonic() < until and self._ends_asked == asked:
            time.sleep(0.05)

    def _drain(self) -> int:
        """Let every worker finish what it accepted; return 0 where all did. A second signal cuts it short."""
        # Ours too: as long as any process has it open, the system takes connections that nobody will answer.
        self._sock.close()
        for worker in [worker for worker in self._workers if worker.heartbeat.phase is Phase.STARTING]:
            # It holds the socket open, and would take what connects meanwhile with it.
            worker.process.kill()
            worker.process.join()
            self._workers.remove(worker)
        # Later than the workers' own end of the time, in which they refuse what is left: killed, they would reset it.
        until = time.monotonic() + self._settings.drain_s + 2
        for worker in self._workers:
            if worker.kill_at is None:  # one that a reload has told already would take it for haste
                worker.order(DRAIN)
        bad: dict[int, int | None] = {}
        asked = self._ends_asked
        while self._workers:
            multiprocessing.connection.wait([worker.process.sentinel for worker in self._workers], timeout=0.1)
            bad |= {worker.slot: code for worker, code in self._reap() if code != 0}
            if self._ends_asked > asked:
                asked = self._ends_asked
                until = min(until, time.monotonic() + CUT_SHORT_S)
                for worker in self._workers:
                    worker.order(DRAIN)
            if time.monotonic() > until:
                for worker in self._workers:
                    worker.kill()
        if bad:
            log.error("workers that did not end cleanly: %s", bad)
        return 1 if bad else 0


def check_credentials(settings: Settings) -> None:
    """Read keys and certificates, as every worker will. Raises AccessInvalid or TlsInvalid."""
    Access(
        keys=settings.keys,
        jwks=settings.jwks,
        audience=settings.jwt_audience,
        issuer=settings.jwt_issuer,
        token_rates=Rates(settings.jwt_requests_per_s, settings.jwt_rows_per_s),
    )
    server_context(settings.tls_cert, settings.tls_key, settings.tls_client_ca, "http/1.1")
