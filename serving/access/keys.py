"""Bearer keys, one a line: name, scopes, SHA-256 of the key; then optionally created=, expires=, revoked=,
requests_per_s= and rows_per_s=.

    ci deploy,predict 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08 expires=2027-02-22T22:00:00Z

The key itself is not kept anywhere: it has 256 random bits, so that its bare SHA-256 can't be searched.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime

from serving.access.principal import SCOPES, AccessInvalid, Scope
from serving.access.rate_limits import UNLIMITED, Rates

PREFIX = "serving_"
"""Begins every key that is made here, so that scanners of repositories and logs know one when they see it."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_ANY_DIGEST = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
_TIMES = ("created", "expires", "revoked")
_FACTS = (*_TIMES, *Rates._fields)
_RATE = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


@dataclass(frozen=True, slots=True)
class Key:
    """One key. Times are seconds since the epoch."""

    name: str
    scopes: frozenset[Scope]
    digest: bytes
    created: float | None = None
    expires: float | None = None
    revoked: float | None = None
    rates: Rates = UNLIMITED

    def state(self, now: float) -> str:
        """Return `live`, `expired` or `revoked`."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "live"

    def line(self) -> str:
        """Write the key as a line of a keys file."""
        times = [(name, getattr(self, name)) for name in _TIMES]
        facts = [f"{name}={written(at)}" for name, at in times if at is not None]
        facts += [f"{name}={rate:.15g}" for name, rate in self.rates._asdict().items() if rate is not None]
        return " ".join([self.name, ",".join(sorted(self.scopes)), self.digest.hex(), *facts])


def generate() -> str:
    """Make a new key."""
    return PREFIX + secrets.token_urlsafe(32)


def digest(key: bytes) -> bytes:
    """Return what is kept of a key."""
    return hashlib.sha256(key).digest()


def are_entries(value: str) -> bool:
    """Tell whether a setting holds keys themselves, rather than a file's path."""
    return _ANY_DIGEST.search(value) is not None


def parse(text: str) -> tuple[Key, ...]:
    """Read keys, one a line; `#` begins a comment.

    Raises AccessInvalid, naming the line and never what is in it: it may be a key that was put there by mistake.
    """
    keys: list[Key] = []
    for number, line in enumerate(text.split("\n"), 1):
        fields = line.partition("#")[0].split()
        if not fields:
            continue
        key = _entry(fields, number)
        if any(key.name == other.name for other in keys):
            raise AccessInvalid(f"line {number}: the name {key.name!r} is there twice")
        if any(key.digest == other.digest for other in keys):
            raise AccessInvalid(f"line {number}: the same key is there twice")
        keys.append(key)
    return tuple(keys)


def _entry(fields: list[str], number: int) -> Key:
    if len(fields) < 3:
        raise AccessInvalid(f"line {number}: expected a name, scopes and the SHA-256 of a key")
    name, scopes, hashed, *facts = fields
    if not NAME.fullmatch(name):
        raise AccessInvalid(f"line {number}: the name is not letters, digits, dot, dash, underscore; 64 at most")
    named = scopes.split(",")
    if not SCOPES.issuperset(named):
        raise AccessInvalid(f"line {number}: the scopes are not among {', '.join(sorted(SCOPES))}, with commas between")
    if not _DIGEST.fullmatch(hashed):
        raise AccessInvalid(f"line {number}: the third word is not a SHA-256 in 64 small hexadecimal digits")
    given: dict[str, float] = {}
    for fact in facts:
        what, _, value = fact.partition("=")
        if what not in _FACTS or what in given:
            raise AccessInvalid(f"line {number}: after the SHA-256 only {'=, '.join(_FACTS)}= may follow, once each")
        read = _time if what in _TIMES else _rate
        given[what] = read(value, f"line {number}: {what}=")
    rates = Rates(*(given.pop(name, None) for name in Rates._fields))
    return Key(name, frozenset(s for s in SCOPES if s in named), bytes.fromhex(hashed), rates=rates, **given)


def _rate(text: str, at: str) -> float:
    if not _RATE.fullmatch(text) or not float(text):
        raise AccessInvalid(f"{at} is not a rate: write a number above 0, such as 100 or 0.5")
    return float(text)


def _time(text: str, at: str) -> float:
    try:
        read = datetime.fromisoformat(text)
    except ValueError:
        raise AccessInvalid(f"{at} is not a time: write 2027-02-22T22:00:00Z") from None
    return (read if read.tzinfo is not None else read.replace(tzinfo=UTC)).timestamp()


def written(at: float) -> str:
    """Write a time as keys files have it.

    >>> written(0)
    '1970-01-01T00:00:00Z'
    """
    return datetime.fromtimestamp(int(at), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
