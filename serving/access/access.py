"""Authorization: one decision from an Authorization header and a scope, the same for every transport."""

from __future__ import annotations

import hmac
import logging
import re
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from serving.access.keys import Key, are_entries, digest, parse
from serving.access.principal import ANYONE, SCOPES, AccessInvalid, Principal, Scope
from serving.access.rate_limits import UNLIMITED, Buckets, RateLimit, Rates
from serving.access.watched_file import WatchedFile
from serving.errors import Forbidden, ServingError, Unauthenticated

if TYPE_CHECKING:
    from serving.access.tokens import Issuer

log = logging.getLogger("serving.access")

HOW = (
    "changes by network are refused, since no key with the scope deploy is configured: on the server's machine run "
    "`serving keys create --name NAME --scope deploy`, and start the server with `--keys serving.keys`"
)
_SEND = "send the header `Authorization: Bearer <key>`"
_ALWAYS: frozenset[Scope] = frozenset({"deploy"})
_MOST_VERIFIED = 1024
_LONGEST = 8192
_CREDENTIAL = re.compile(rb"[Bb][Ee][Aa][Rr][Ee][Rr] ([A-Za-z0-9._~+/-]+=*)")


class _Verified(NamedTuple):
    caller: Principal
    until: float  # seconds since the epoch


@dataclass(frozen=True, slots=True)
class _State:
    """All that one reading of keys and tokens decides.

    It has its own cache, so that a decision under way while the keys change can't leave a revoked key in the new one.
    """

    keys: tuple[Key, ...]
    issuer: Issuer | None
    closed: frozenset[Scope]
    verified: dict[bytes, _Verified] = field(default_factory=dict)

    @property
    def deployable(self) -> bool:
        """Whether there is a credential that may deploy."""
        return self.issuer is not None or any("deploy" in key.scopes for key in self.keys)


class Access:
    """Authorizes requests. `deploy` is always closed; `predict` and `metrics` are open until a key names them.

    keys: lines of keys themselves, also with semicolons between, or a file of them. jwks: a JWKS file, which closes
    everything and needs audience and issuer. token_rates: of each subject of tokens; keys name their own. buckets:
    where what callers take is counted, together with whoever else has them. What is closed stays so until a restart.
    Raises AccessInvalid where keys or JWKS can't be read now.
    """

    def __init__(
        self,
        *,
        keys: str | None = None,
        jwks: Path | None = None,
        audience: str | None = None,
        issuer: str | None = None,
        token_rates: Rates = UNLIMITED,
        buckets: Buckets | None = None,
    ) -> None:
        if jwks is not None and not (audience and issuer):
            raise AccessInvalid("a JWKS file needs --jwt-audience and --jwt-issuer: without them any token would do")
        if jwks is None and (audience or issuer or token_rates != UNLIMITED):
            raise AccessInvalid("what is set of JWT says nothing without --jwks, the file of the issuer's keys")
        if keys is not None and not keys.strip():
            raise AccessInvalid("the keys are empty: name a file, or leave the setting out")
        self._entries = keys if keys is not None and are_entries(keys) else None
        self._key_file = WatchedFile(Path(keys), "the keys file") if keys and self._entries is None else None
        self._jwks_file = WatchedFile(jwks, "the JWKS file") if jwks is not None else None
        self._expected = (audience or "", issuer or "")
        self._token_rates = token_rates
        self._buckets = buckets if buckets is not None else Buckets()
        self._reading = threading.Lock()
        self._complained = float("-inf")
        self._refusals = 0
        self._state = self._read(frozenset())

    @property
    def configured(self) -> bool:
        """Whether there is any key: without one, nothing but deploying is or can become closed."""
        return bool(self._entries or self._key_file or self._jwks_file)

    @property
    def closed(self) -> frozenset[Scope]:
        """The scopes that need a credential now."""
        return self._state.closed

    def decide(
        self,
        authorization: bytes | str | None,
        scope: Scope,
        *,
        among: frozenset[str] | None = None,
        quiet: bool = False,
    ) -> Principal:
        """Return the caller. Raises Unauthenticated without a good credential, Forbidden where it lacks the scope.

        among: names of the only callers that are let in, also where the scope is open; None: all who have it. quiet:
        whether a refusal is kept out of the log, since nothing is refused by it.
        """
        try:
            return self._decide(authorization, scope, among)
        except (Unauthenticated, Forbidden) as error:
            if not quiet:
                self._complain(scope, error)
            raise

    def _complain(self, scope: Scope, error: ServingError) -> None:
        """Log a refusal, once a second at most: whoever tries keys must not fill the log."""
        self._refusals += 1
        now = time.monotonic()
        if now - self._complained >= 1:
            log.warning(
                "refused to %s: %s (%d refusals since the last such line)", scope, error.message, self._refusals
            )
            self._complained, self._refusals = now, 0

    def _decide(self, authorization: bytes | str | None, scope: Scope, among: frozenset[str] | None) -> Principal:
        state = self._state
        if scope not in state.closed and among is None:
            return ANYONE
        if scope == "deploy" and not state.deployable:
            raise Forbidden(HOW)
        if isinstance(authorization, str):
            authorization = authorization.encode("utf-8", "replace")
        verified = state.verified.get(authorization) if authorization is not None else None
        if verified is None or verified.until <= time.time():
            verified = self._verify(state, authorization)
        if scope not in verified.caller.scopes and scope in state.closed:
            raise Forbidden(f"this credential does not have the scope {scope}", scope=scope)
        if among is not None and verified.caller.name not in among:
            raise Forbidden("this model's settings name others who may: ask who runs it")
        return verified.caller

    def _verify(self, state: _State, authorization: bytes | None) -> _Verified:
        if authorization is None:
            raise Unauthenticated(f"this needs a key: {_SEND}")
        found = _CREDENTIAL.fullmatch(authorization) if len(authorization) <= _LONGEST else None
        if found is None:
            raise Unauthenticated(f"the Authorization header is not a bearer credential: {_SEND}")
        verified = self._by_key(state, found[1]) or self._by_token(state, found[1])
        if verified is None:
            raise Unauthenticated("the key is not known: it may be mistyped, or withdrawn", invalid=True)
        # Only what was verified is kept, so that strangers can't push others out.
        if len(state.verified) >= _MOST_VERIFIED:
            state.verified.clear()
        state.verified[authorization] = verified
        return verified

    def _by_key(self, state: _State, given: bytes) -> _Verified | None:
        hashed = digest(given)
        matching = None
        # Every one, in constant time: the time says nothing of how near a guess was, or which key it hit.
        for key in state.keys:
            if hmac.compare_digest(key.digest, hashed):
                matching = key
        if matching is None:
            return None
        now = matching.state(time.time())
        if now != "live":
            raise Unauthenticated(f"the key has been revoked or has expired: it is {now}", invalid=True)
        limit = self._limit(matching.digest, matching.rates)
        return _Verified(Principal(matching.name, matching.scopes, limit), matching.expires or float("inf"))

    def _by_token(self, state: _State, given: bytes) -> _Verified | None:
        if state.issuer is None or given.count(b".") != 2:
            return None
        caller, until = state.issuer.verify(given.decode())
        return _Verified(replace(caller, limit=self._limit(caller.name.encode(), self._token_rates)), until)

    def _limit(self, identity: bytes, rates: Rates) -> RateLimit | None:
        return RateLimit(self._buckets, identity, rates) if rates != UNLIMITED else None

    def refresh(self) -> None:
        """Read anew what has changed on disk; to be called about once a second, off the event loop."""
        files = [file for file in (self._key_file, self._jwks_file) if file is not None]
        if any(file.changed() for file in files):
            self.reload()

    def reload(self) -> None:
        """Read everything anew. What can't be read is logged, and what was read last stays in force."""
        with self._reading:
            try:
                self._state = self._read(self._state.closed)
            except AccessInvalid as error:
                log.error("%s; the keys that were read before stay in force", error)
                return
            except Exception:  # whatever a file holds, the next reading must come: it may revoke a key
                log.exception("keys could not be read anew; those that were read before stay in force")
                return
        log.info("keys and tokens are read anew: %d keys", len(self._state.keys))

    def _read(self, closed: frozenset[Scope]) -> _State:
        keys, issuer = self._read_keys(), self._read_issuer()
        # Revoked and expired keys count: taking the last key away must not open what it was made to close.
        named = frozenset[Scope]().union(*(key.scopes for key in keys))
        return _State(keys, issuer, closed | _ALWAYS | named | (SCOPES if issuer is not None else frozenset()))

    def _read_keys(self) -> tuple[Key, ...]:
        if self._entries is not None:
            return _named("the keys", self._entries.replace(";", "\n"))
        if self._key_file is None:
            return ()
        text, mode = self._key_file.read()
        if mode & 0o077:
            log.warning("the keys file %s is open to others: chmod 600 it", self._key_file.path)
        keys = _named(f"the keys file {self._key_file.path}", text)
        if not keys:
            # An editor that is half through writing leaves such a file, and it would open everything.
            raise AccessInvalid(f"the keys file {self._key_file.path} holds no key: `serving keys create` makes one")
        return keys

    def _read_issuer(self) -> Issuer | None:
        if self._jwks_file is None:
            return None
        text, mode = self._jwks_file.read()
        if mode & 0o022:
            log.warning("the JWKS file %s can be written by others: chmod 644 it", self._jwks_file.path)
        from serving.access.tokens import Issuer  # noqa: PLC0415  cryptography takes memory: only where it is wanted

        audience, issuer = self._expected
        try:
            return Issuer(text, audience=audience, issuer=issuer)
        except AccessInvalid as error:
            raise AccessInvalid(f"the JWKS file {self._jwks_file.path}: {error}") from None


def _named(what: str, text: str) -> tuple[Key, ...]:
    try:
        return parse(text)
    except AccessInvalid as error:
        raise AccessInvalid(f"{what}: {error}") from None
