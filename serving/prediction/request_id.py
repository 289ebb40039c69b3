"""What a request is called in answers and in the log."""

from __future__ import annotations

import itertools
import re
import secrets

_FIT = re.compile(rb"[\x21-\x7e]{1,128}")
_ids = itertools.count()
_prefix = secrets.token_hex(8).encode()


def request_id(given: bytes | None) -> bytes:
    """Return the caller's request id where it is fit to be echoed and logged, else a new one."""
    if given is not None and _FIT.fullmatch(given):
        return given
    return b"%b-%x" % (_prefix, next(_ids))
