"""What an export says of itself while it works."""

from __future__ import annotations

import io
import os
import pty
import sys

import pytest

from serving.export.progress import progress


def test_progress_is_shown_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal a line on stderr says what the export is at; into a file nothing is written."""
    reader, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as screen, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", screen)
        patch.setenv("TERM", "xterm")
        with progress() as say:
            say("comparing")
            shown = b""
            while b"comparing" not in shown:  # it is drawn some times a second
                shown += os.read(reader, 4096)
    os.close(reader)
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    with progress() as say:
        say("comparing")
    assert file.getvalue() == ""
