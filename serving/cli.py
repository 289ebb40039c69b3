"""Where the `serving` command begins: with nothing, for each worker process imports this again."""

from __future__ import annotations


def main() -> None:
    """Run the command line."""
    from serving.command_line import main as run  # noqa: PLC0415

    run()


if __name__ == "__main__":
    main()
