"""The README's and the manual's own commands, run as they are written; what a page shows after one is what it prints.

```bash, ```python and ```javascript blocks are run, in order, in a folder that has `models/`, beside a server of it;
```console blocks are not. A ```json or ```text block right after one is all that it prints.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.own import grpc_address
from tests.conftest import MODELS, ROOT, Server

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
RUNNERS = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"], "javascript": ["node", "-e"]}
SHOWN = {"json", "text"}


def blocks(page: Path) -> list[tuple[str, str]]:
    return [(found[1], found[2]) for found in BLOCK.finditer(page.read_text())]


PAGES = sorted(
    page for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")] if any(k in RUNNERS for k, _ in blocks(page))
)


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a copy of the shipped models, in `models/` of an empty folder."""
    folder = tmp_path_factory.mktemp("manual")
    shutil.copytree(MODELS, folder / "models", ignore=shutil.ignore_patterns(".*"))
    server = Server("--grpc-port", "0", "--jobs-database-url", "sqlite", models=folder / "models")
    try:
        yield server.wait()
    finally:
        server.stop()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_does_what_the_page_says(page: Path, beside: Server) -> None:
    """A newcomer who copies each command gets what is written below it, and no error."""
    grpc = grpc_address(beside)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SERVING_")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    printed = None
    for kind, text in blocks(page):
        if kind in RUNNERS and shutil.which(RUNNERS[kind][0]):
            here = text.replace("127.0.0.1:8080", beside.url.removeprefix("http://")).replace("127.0.0.1:8081", grpc)
            ended = subprocess.run(
                [*RUNNERS[kind], here],
                cwd=beside.models.parent,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert ended.returncode == 0, f"{text}\n{ended.stdout}{ended.stderr}"
            printed = ended.stdout
        elif kind in SHOWN and printed is not None:
            same = json.loads if kind == "json" else str.strip
            assert same(printed) == same(text)
            printed = None
        else:
            printed = None
