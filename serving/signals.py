"""The orders that a parent gives its workers by signal.

A stop signal often reaches the whole process group: from systemd, `timeout` or Ctrl-C. It is the parent's to act on;
its workers ignore SIGTERM and SIGINT as long as it lives, and take these two, which nobody else sends.
"""

from __future__ import annotations

import signal

DRAIN = signal.SIGUSR1
"""Finish what was accepted and end; once more: refuse what is left."""
UNREADY = signal.SIGUSR2
"""Say unready and go on serving, until load balancers have noticed."""
