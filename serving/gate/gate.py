"""The gate: every version passes it before a worker loads it.

Looking at a model means running it, so all of that happens in a disposable process with limits (`child`); here are the
rules: what is asked, what the answer means, and which verdicts are kept.
"""

from __future__ import annotations

import contextlib
import select
import subprocess
import sys
import time
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from pydantic import ValidationError

from serving.engine.batching import RULES
from serving.engine.providers import PACKAGES
from serving.errors import ModelInvalid, NotReady
from serving.gate.compatibility import breaking
from serving.gate.findings import Findings, Limits, Task
from serving.gate.report import Check, Report
from serving.linux.files import write_whole
from serving.linux.sandbox import bare_environment
from serving.repository import manifest
from serving.repository.manifest import MODEL_FILE, Hashes, Manifest
from serving.repository.state_directory import subfolder

if TYPE_CHECKING:
    from typing import Self

_START_S = 60.0
_GRACE_S = 10.0
_MOST_REASON = 500


@cache
def runtime() -> str:
    """Return the version of onnxruntime, without loading it; of each package that brings it, where others do."""
    found = {}
    for package in ("onnxruntime", *PACKAGES.values()):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = package_version(package)
    return ", ".join(
        version if package == "onnxruntime" else f"{package} {version}" for package, version in found.items()
    )


class Gate:
    """One process that examines versions one after another; its libraries are loaded once.

    Used by one thread, but for `close`, which also ends what another thread examines.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self, *, for_good: bool = False) -> None:
        """End the process and what it examines. for_good: nothing is examined after it either."""
        self._ended = self._ended or for_good
        process, self._process = self._process, None
        if process is not None:
            process.kill()  # its child dies with it
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()

    def examine(
        self,
        folder: Path,
        *,
        serving: Path | None = None,
        prepare_in: Path | None = None,
    ) -> Report:
        """Examine the version in a folder; `serving` is the folder of the one that callers use now.

        prepare_in: an empty folder that gets the prepared form, where there is one. Never raises for what lies in it;
        NotReady where the gate's own process ends.
        """
        began = time.time()
        try:
            found = manifest.read(folder) or manifest.of(folder, Hashes())
        except ModelInvalid as error:
            return unreadable(error.message)
        task = Task(folder=folder.resolve(), size=found.size, limits=self._limits, prepare_in=prepare_in)
        findings = self._ask(task)
        now = Findings()
        if serving is not None:
            task = Task(folder=serving.resolve(), size=_size(serving), limits=self._limits, measure_only=True)
            now = self._ask(task)
        report = judge(found, findings, now, at=began)
        if prepare_in is not None and not report.prepared:
            # What lies there would be kept, and serve: not where its answers were not seen to be the model's.
            (prepare_in / MODEL_FILE).unlink(missing_ok=True)
        return report

    def _ask(self, task: Task) -> Findings:
        """Send one task and return its findings. Raises NotReady; a process that fails is replaced next time."""
        wait = self._limits.wall_s + _GRACE_S
        if self._process is None:
            self._process = _start()
            wait += _START_S
        if self._ended:  # looked at here, for `close` may have come before there was a process that it could end
            self.close()
            raise NotReady("the server ends, and examines nothing any more")
        asks, answers = self._process.stdin, self._process.stdout
        if asks is None or answers is None:
            raise RuntimeError("the gate's process has no pipes")
        line = b""
        with contextlib.suppress(OSError, ValueError):  # the latter where another thread has closed them
            asks.write(task.model_dump_json().encode() + b"\n")
            asks.flush()
            poll = select.poll()  # select() takes no descriptor above 1023, and a busy server has those
            poll.register(answers, select.POLLIN)
            if poll.poll(1000 * wait):
                line = answers.readline()
        if not line:
            self.close()
            raise NotReady("the gate's own process ended or did not answer: try again")
        return read(line)


def read(line: bytes) -> Findings:
    """Read findings, and check them as everything from outside: the process that wrote them ran a stranger's model."""
    try:
        found = Findings.model_validate_json(line)
    except ValidationError:
        return Findings(reasons=["the gate's process gave no sensible answer"])
    if found.signature is None and not found.reasons:
        found.reasons = ["the gate's process gave no answer"]
    found.reasons = [_shown(reason) for reason in found.reasons]
    if found.independence is not None:
        found.independence = found.independence.model_copy(update={"rules": RULES})
    return found


def unreadable(reason: str) -> Report:
    """Make the verdict on what is no whole model: nothing was run."""
    check = Check(name="files", outcome="refused", detail=reason)
    return Report(ok=False, content="", runtime=runtime(), time=time.time(), reasons=(reason,), checks=(check,))


def judge(found: Manifest, findings: Findings, now: Findings, *, at: float) -> Report:
    """Make the verdict on a version from what was found of it and of the version that serves now."""
    checks, reasons = [*findings.checks], [*findings.reasons]
    broken: list[str] = []
    if findings.signature is not None and now.signature is not None:
        broken = [_shown(reason) for reason in breaking(now.signature, findings.signature)]
        detail = "; ".join(broken)
        refused = bool(broken) and not found.allow_breaking
        checks.append(Check(name="signature", outcome="refused" if refused else "passed", detail=detail))
        if refused:
            reasons.append(f"breaking for callers of the version that serves: {detail}")
    return Report(
        ok=not reasons,
        content=found.content,
        runtime=runtime(),
        time=at,
        reasons=tuple(reasons),
        breaking=tuple(broken),
        checks=tuple(checks),
        independence=findings.independence,
        size_bytes=found.size,
        figures=findings.figures,
        beside=now.figures,
        extensions=tuple(_shown(name) for name in findings.extensions),
    )


def verdict(state_dir: Path, content: str) -> Report | None:
    """Return the kept verdict on a version's content with this onnxruntime; None where there is none to trust."""
    try:
        kept = Report.model_validate_json(place(state_dir, content).read_bytes())
    except (OSError, ValueError):
        return None
    fits = kept.content == content and kept.runtime == runtime()
    current = not kept.ok or (kept.independence is not None and kept.independence.rules == RULES)
    return kept if fits and current else None


def report(state_dir: Path, folder: Path) -> Report | None:
    """Return the kept verdict on the version in a folder, as it is now; None where there is none. Reads all of it."""
    try:
        found = manifest.read(folder) or manifest.of(folder, Hashes())
    except ModelInvalid:
        return None
    return verdict(state_dir, found.content)


def keep(state_dir: Path, made: Report) -> None:
    """Keep a verdict where `verdict` finds it. Raises OSError.

    Not one that depends on more than the content: on what this server allows, or on the version that served then.
    """
    if made.content and not made.extensions and (made.ok or not made.breaking):
        subfolder(state_dir, "reports")
        write_whole(place(state_dir, made.content), made.text())


def place(state_dir: Path, content: str) -> Path:
    """Return the file of the verdict on a version's content."""
    return state_dir / "reports" / f"{content}.json"


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "serving.gate.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=bare_environment(),
        cwd="/",
        start_new_session=True,
    )


def _size(folder: Path) -> int:
    try:
        return (manifest.read(folder) or manifest.of(folder, Hashes())).size
    except ModelInvalid:
        return 0


def _shown(text: str) -> str:
    """Make a text that a model had a part in fit for a terminal and a log."""
    return "".join(c if c.isprintable() else "?" for c in text[:_MOST_REASON])
