"""Where the `serving` command begins: with nothing, for each worker process imports this again."""

from __future__ import annotations

import gc
import os
import sys

gc.disable()  # while hundreds of modules are imported, none of which goes again; who imports ends it


def main() -> None:
    """Run the command line."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who starts this: a client's socket would get its number
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  stays open
    from serving.command_line import main as run  # noqa: PLC0415

    gc.enable()
    run()


if __name__ == "__main__":
    main()
