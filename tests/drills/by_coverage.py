"""The decoders under atheris: `python -m tests.drills.by_coverage FOLDER [--plant] CORPUS [libFuzzer flags]`."""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    """Fuzz until libFuzzer's own limits; a fault ends the process with its exit status for errors."""
    import atheris

    # First, so that what it imports is instrumented.
    with atheris.instrument_imports(include=["serving"]):
        from tests.drills.decoders import Decoders, Planted, unpacked

    decoders = Decoders(Path(sys.argv.pop(1)))
    plant = "--plant" in sys.argv
    chosen = Planted(decoders) if plant else decoders
    atheris.Setup([a for a in sys.argv if a != "--plant"], lambda data: chosen.read(unpacked(data)) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
