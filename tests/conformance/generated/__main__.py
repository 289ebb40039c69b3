"""Make typed clients of the OpenAPI document, and ask the server: `python -m tests.conformance.generated [NAME ...]`.

What the document says wrongly is not generated, does not compile, or is not what comes. Python is made by
openapi-python-client, TypeScript by openapi-typescript and checked by tsc.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import httpx2 as httpx

from tests.conformance.clients.build import Missing
from tests.conformance.environments import environment
from tests.conftest import running

HERE = Path(__file__).parent
NPM = {"openapi-fetch": "0.17.0", "openapi-typescript": "7.13.0", "typescript": "5.9.3", "@types/node": "20.19.0"}
_TSC = ("--strict", "--noEmitOnError", "--target", "es2022", "--module", "nodenext", "--types", "node")


def python(folder: Path, document: Path) -> list[str]:
    """Generate the Python client; return the command that asks with it."""
    bin_folder = environment("openapi") / "bin"
    generate = [str(bin_folder / "openapi-python-client"), "generate", "--meta", "none"]
    where = ["--path", str(document), "--output-path", str(folder / "made")]
    said = _run([*generate, *where], PATH=f"{bin_folder}:{os.environ['PATH']}")
    if "WARNING" in said or "ERROR" in said:
        raise AssertionError(said)
    shutil.copy(HERE / "client.py", folder)
    return [str(bin_folder / "python"), str(folder / "client.py")]


def typescript(folder: Path, document: Path) -> list[str]:
    """Generate the types and compile the client against them; return the command that asks with it."""
    if shutil.which("npm") is None:
        raise Missing("npm is missing: apt-get install nodejs npm")
    (folder / "package.json").write_text(json.dumps({"type": "module", "private": True, "dependencies": NPM}))
    _run(["npm", "install", "--silent", "--no-audit", "--no-fund"], cwd=folder)
    shutil.copy(HERE / "client.ts", folder)
    _run(["npx", "openapi-typescript", str(document), "--output", "schema.ts"], cwd=folder)
    _run(["npx", "tsc", *_TSC, "--outDir", "out", "client.ts"], cwd=folder)
    return ["node", str(folder / "out" / "client.js")]


LANGUAGES: dict[str, Callable[[Path, Path], list[str]]] = {"python": python, "typescript": typescript}


def _run(command: list[str], cwd: Path | None = None, **environment: str) -> str:
    ended = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=300
    )
    if ended.returncode:
        raise AssertionError(f"{' '.join(command[:2])}: {ended.stdout}{ended.stderr}")
    return ended.stdout + ended.stderr


def main(names: list[str]) -> int:
    """Print a line for each point; return 1 where one is not kept."""
    kept = True
    with running() as server:
        for name in names or LANGUAGES:
            with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
                document = Path(folder) / "openapi.json"
                document.write_bytes(httpx.get(f"{server.url}/openapi.json", timeout=20).content)
                try:
                    client = LANGUAGES[name](Path(folder), document)
                    lines = _run([*client, server.url]).splitlines()
                except Missing as missing:
                    print(f"{name}: not asked: {missing}")
                    continue
                except AssertionError as error:
                    lines = [f"no: {error}"]
                kept = kept and bool(lines) and all(line.startswith("yes") for line in lines)
                for line in lines:
                    print(f"{name}: {line}", flush=True)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
