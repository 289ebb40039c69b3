"""Where migrations begin: a database without tables gets those of `tables.py`, and the mark of the last one."""

from __future__ import annotations

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Change nothing."""
