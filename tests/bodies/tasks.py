"""What tests have done in the codec process; imports little, since that process does too."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


class Toy:
    """Stands for a codec."""

    def __init__(self, number: int = 0) -> None:
        self.number = number


def pid(codec: Any) -> int:
    return os.getpid()


def echoed(codec: Any, given: Any) -> Any:
    return given


def killed(codec: Any, marks: str, times: int) -> int:
    """End the process by force the first `times` times; then return how often it was tried."""
    tried = len(list(Path(marks).iterdir())) + 1
    if tried <= times:
        (Path(marks) / str(tried)).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return tried


def blocked(codec: Any, gate: str) -> str:
    """Work until a file is there."""
    while not Path(gate).exists():
        time.sleep(0.005)
    return "blocked"


def greedy(codec: Any, size: int) -> int:
    return len(bytearray(size))


def failing(codec: Any) -> None:
    raise KeyError("secret")


def loaded(codec: Any) -> list[str]:
    return sorted(sys.modules)


def toys(codec: Any) -> int:
    return sum(type(found) is Toy for found in gc.get_objects())
