"""How every process of the server writes its log: one JSON object a line for machines, or text for people.

Whatever a request put into a message, a line stays a line: nobody can write a line of their own into the log.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
from types import TracebackType
from typing import Literal, TextIO, TypeAlias

from serving.log_pipe import LogPipe

Form: TypeAlias = Literal["json", "text"]

_TEXT = "%(asctime)s %(levelname)s %(name)s[%(process)d] %(message)s"
# C0, DEL and C1 steer terminals; the others end a line for some reader or turn its text around.
_UNSEEN = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\u202a-\\u202e\\u2066-\\u2069]")


class JsonLines(logging.Formatter):
    """Writes a record as one JSON object: time (UTC), level, logger, process, message, the `fields` that a record
    was given, exception where there is one.

    Everything outside ASCII, and every control character, is escaped.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        whole, milliseconds = time.gmtime(record.created), int(record.msecs)
        line: dict[str, object] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', whole)}.{milliseconds:03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line).replace("\x7f", "\\u007f")


class TextLines(logging.Formatter):
    """Writes a record for people; control characters in its message are shown as escapes."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line, without a traceback."""
        fields = " ".join(f"{k}={v}" for k, v in getattr(record, "fields", {}).items() if v is not None)
        record.message = visible(f"{record.message} {fields}".rstrip())
        return super().formatMessage(record)


def visible(text: str) -> str:
    r"""Return a text for a terminal: control characters, which could steer it, are shown as escapes.

    >>> visible("red \x1b[31m")
    'red \\x1b[31m'
    """
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def form_of(wanted: Form | None, stream: TextIO) -> Form:
    """Return the wanted form, or else text for a terminal and JSON for anything that may be read by a machine."""
    return wanted or ("text" if stream.isatty() else "json")


def configure(level: str, form: Form, pipe: LogPipe) -> None:
    """Send the log of this process, its warnings and its uncaught exceptions to `pipe`."""
    handler = logging.StreamHandler(pipe)
    formatter = JsonLines() if form == "json" else TextLines(_TEXT)
    handler.setFormatter(formatter)
    pipe.notice = lambda text: formatter.format(_record(text)) + handler.terminator
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    sys.excepthook = _uncaught
    threading.excepthook = lambda found: _uncaught(found.exc_type, found.exc_value, found.exc_traceback)
    # gRPC's core writes lines of its own to the process's stderr, past every formatter.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def _record(text: str) -> logging.LogRecord:
    return logging.LogRecord("serving.log", logging.WARNING, "", 0, text, None, None)


def _uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt | SystemExit):
        return
    exc_info = (kind, error, trace) if error is not None else None
    logging.getLogger("serving").critical("uncaught exception", exc_info=exc_info)
