"""Says what an export is at, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich.console import Console

Say: TypeAlias = Callable[[str], None]


@contextmanager
def progress() -> Iterator[Say]:
    """Show a line that turns while work goes on; what is said replaces it."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    with Console(stderr=True).status("exporting") as status:
        yield status.update
