"""Where the `serving` command begins: with nothing, for each worker process imports this again."""

from __future__ import annotations

import gc

gc.disable()  # while hundreds of modules are imported, none of which goes again; who imports ends it


def main() -> None:
    """Run the command line."""
    from serving.command_line import main as run  # noqa: PLC0415

    gc.enable()
    run()


if __name__ == "__main__":
    main()
