"""A pod of the manifest in a real container: its user, rights and volumes, and the runtime's default seccomp profile.

Needs root, and Debian's runc and golang-github-containers-common (for the profile).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx

from tests.conftest import MODELS, ROOT
from tests.drills.drill import Report, drill
from tests.drills.rolling_update import CONTAINER, SPEC
from tests.drills.steady import PATH, ROW, until

PROFILE = Path("/usr/share/containers/seccomp.json")
LONG = json.dumps({"instances": [[5.1, 3.5, 1.4, 0.2]] * 4000}).encode()
"""For the process that reads long bodies."""


@drill("confined", "confined as the manifest says, a pod serves, examines and follows new versions, and drains")
def confined(report: Report) -> None:
    """Run it in runc; ask it, publish to it, and end it."""
    with tempfile.TemporaryDirectory() as folder, _pod(Path(folder)) as (process, url, models):
        report.exactly("ready", float(until(lambda: _status(f"{url}/v2/health/ready") == 200, 60) < 60), 1)
        statuses = [httpx.post(url + PATH, content=body, timeout=30).status_code for body in (ROW, LONG)]
        report.exactly("predictions answered, short and long", statuses.count(200), 2)
        facts = [_facts(pid) for pid in _processes()]
        report.at_least("processes, with those of gate and codec", len(facts), 4)
        report.exactly(
            "of them without rights, behind a filter", sum(fact == ("0", "1", "2") for fact in facts), len(facts)
        )
        shutil.copytree(MODELS / "iris" / "2", models / "iris" / "3")
        took = until(lambda: _version(url) == "3", 30)
        report.at_most("until a new version serves, examined first", took, 20, "s")
        report.exactly("problems it names", len(httpx.get(f"{url}/v1/models").json().get("problems", [])), 0)
        process.send_signal(signal.SIGTERM)
        report.exactly("exit status after SIGTERM", process.wait(SPEC["terminationGracePeriodSeconds"]), 0)
    with tempfile.TemporaryDirectory() as folder, _pod(Path(folder), writable=()) as (process, url, _):
        until(lambda: process.poll() is not None, 30)
        report.control("without its volumes it does not start", process.poll() not in (None, 0))


@contextmanager
def _pod(folder: Path, writable: tuple[str, ...] = ("/tmp", "/var/lib/serving")) -> Iterator[Any]:
    """Run the manifest's container; yield its process, its URL and the models folder."""
    if shutil.which("runc") is None:
        raise SystemExit("this drill needs runc: apt-get install runc golang-github-containers-common")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    models = folder / "models"
    shutil.copytree(MODELS / "iris", models / "iris")
    for name in ("bin", "lib", "lib64"):
        (folder / "rootfs").mkdir(exist_ok=True)
        (folder / "rootfs" / name).symlink_to(f"usr/{name}")
    (folder / "config.json").write_text(json.dumps(_config(models, port, writable)))
    folder.chmod(0o755)
    models.chmod(0o755)
    name = f"drill-{os.getpid()}-{port}"
    process = subprocess.Popen(["runc", "run", "--bundle", str(folder), name])
    try:
        yield process, f"http://127.0.0.1:{port}", models
    finally:
        subprocess.run(["runc", "delete", "--force", name], check=False, stderr=subprocess.DEVNULL)
        process.wait(60)


def _config(models: Path, port: int, writable: tuple[str, ...]) -> dict[str, Any]:
    pod, own = SPEC["securityContext"], CONTAINER["securityContext"]
    assert pod["runAsNonRoot"]
    assert own["readOnlyRootFilesystem"]
    assert own["capabilities"]["drop"] == ["ALL"]
    given = {entry["name"]: entry["value"] for entry in CONTAINER["env"] if "value" in entry}
    environment = given | {"PATH": "/usr/bin", "SERVING_WORKERS": "2", "PYTHONDONTWRITEBYTECODE": "1"}
    read = {str(path): str(path) for path in (Path("/usr"), Path("/etc"), Path(sys.base_prefix), ROOT)} | {
        "/models": str(models)
    }
    flags = [flag if flag != "9000" else "0" for flag in CONTAINER["args"]]
    return {
        "ociVersion": "1.0.2",
        "process": {
            "args": [sys.executable, "-m", "serving.cli", *flags, "--port", str(port)],
            "cwd": "/",
            "env": [f"{name}={value}" for name, value in environment.items()],
            "user": {"uid": pod["runAsUser"], "gid": pod["runAsGroup"], "umask": 18},
            "capabilities": {},
            "noNewPrivileges": not own["allowPrivilegeEscalation"],
        },
        "root": {"path": "rootfs", "readonly": True},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {
                "destination": "/dev",
                "type": "tmpfs",
                "source": "tmpfs",
                "options": ["nosuid", "mode=755", "size=65536k"],
            },
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["mode=1777", "size=65536k"]},
            *({"destination": to, "type": "bind", "source": at, "options": ["rbind", "ro"]} for to, at in read.items()),
            *(
                {"destination": to, "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777", "size=64m"]}
                for to in writable
            ),
        ],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts")], "seccomp": _seccomp()},
    }


def _seccomp() -> dict[str, Any]:
    """Return the profile as a runtime has it for a process without capabilities on this machine."""
    profile = json.loads(PROFILE.read_text())
    rules = [
        {key: rule[key] for key in ("names", "action", "args", "errnoRet") if rule.get(key) is not None}
        for rule in profile["syscalls"]
        if not rule.get("includes", {}).get("caps")
        and "amd64" in rule.get("includes", {}).get("arches", ["amd64"])
        and "amd64" not in rule.get("excludes", {}).get("arches", [])
    ]
    return {"defaultAction": profile["defaultAction"], "architectures": ["SCMP_ARCH_X86_64"], "syscalls": rules}


def _status(url: str) -> int:
    try:
        return httpx.get(url, timeout=5).status_code
    except httpx.TransportError:
        return 0


def _version(url: str) -> str:
    return str(httpx.post(url + PATH, content=ROW, timeout=30).json()["model_version"])


def _processes() -> list[int]:
    user = f"Uid:\t{SPEC['securityContext']['runAsUser']}\t"
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/status") if user in _read(path)]


def _facts(pid: int) -> tuple[str, ...]:
    """Return the capabilities that a process can have, whether it may get no more, and 2 where calls are filtered."""
    text = _read(Path(f"/proc/{pid}/status"))
    found = [re.search(rf"^{name}:\s*0*(\d+)$", text, re.MULTILINE) for name in ("CapBnd", "NoNewPrivs", "Seccomp")]
    return tuple(match[1] if match else "" for match in found)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has ended
        return ""
