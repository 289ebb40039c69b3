"""JSON Web Tokens of an issuer whose public keys lie in a local JWKS file. The only owner of PyJWT.

The algorithm is the one that the key's own `alg` names; what a token says about itself (`alg`, `jwk`, `jku`, `x5u`)
decides nothing. Sources: RFC 7517, RFC 7519, RFC 8725 (best current practices).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any

import jwt

from serving.access.principal import SCOPES, AccessInvalid, Principal
from serving.errors import Unauthenticated, by_kind

log = logging.getLogger("serving.access")

ALGORITHMS = {
    "RSA": ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    "EC": ("ES256", "ES384", "ES512"),
    "OKP": ("EdDSA",),
    "oct": ("HS256", "HS384", "HS512"),
}
"""Algorithms by a key's `kty`; a key with another one is not used."""

LEEWAY_S = 10
"""Seconds by which the issuer's clock may differ from ours."""
_CLAIMS = ["exp", "aud", "iss", "sub"]
_REFUSALS: dict[type[Exception], str] = {
    jwt.ExpiredSignatureError: "the token has expired",
    jwt.ImmatureSignatureError: "the token is not valid yet",
    jwt.InvalidAudienceError: "the token is for another audience",
    jwt.InvalidIssuerError: "the token is from another issuer",
}


class Issuer:
    """Verifies tokens from `issuer` for `audience`. jwks: text of a JWKS. Raises AccessInvalid where it has no key."""

    def __init__(self, jwks: str, *, audience: str, issuer: str) -> None:
        self._audience = audience
        self._issuer = issuer
        self._keys = _read(jwks)

    def verify(self, token: str) -> tuple[Principal, float]:
        """Return the caller, and until when: seconds since the epoch.

        Raises Unauthenticated, whose text holds nothing of the token.
        """
        try:
            key = self._key(jwt.get_unverified_header(token))
            claims = jwt.decode(
                token,
                key,
                algorithms=[key.algorithm_name],
                audience=self._audience,
                issuer=self._issuer,
                leeway=LEEWAY_S,
                options={"require": _CLAIMS, "enforce_minimum_key_length": True},
            )
            return Principal(_name(claims), frozenset(s for s in SCOPES if s in _scopes(claims))), float(claims["exp"])
        except jwt.MissingRequiredClaimError as error:
            text = f"the token has no {error.claim}: exp, aud, iss and sub are required"
            raise Unauthenticated(text, invalid=True) from None
        except Exception as error:  # a token is a stranger's: whatever it breaks, it is not let in
            # Only the kind: the text may hold what the token holds.
            log.debug("a token was refused: %s", type(error).__name__)
            text = by_kind(_REFUSALS, error, "the token is not one of a known key")
            raise Unauthenticated(text, invalid=True) from None

    def _key(self, header: Mapping[str, Any]) -> jwt.PyJWK:
        if "crit" in header:  # RFC 7515, 4.1.11: whoever does not know an extension that matters must refuse
            raise jwt.InvalidTokenError
        kid = header.get("kid")
        return self._keys[kid if isinstance(kid, str) else None]


def _read(text: str) -> dict[str | None, jwt.PyJWK]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise AccessInvalid("is not JSON") from None
    listed = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(listed, list):
        raise AccessInvalid('is not {"keys": [...]}')
    keys: dict[str | None, jwt.PyJWK] = {}
    for place, one in enumerate(listed):
        if not isinstance(one, dict):
            raise AccessInvalid(f"/keys/{place}: is not an object")
        uses = one.get("key_ops", ["verify"])
        if one.get("use", "sig") != "sig" or not isinstance(uses, list) or "verify" not in uses:
            continue  # for encryption
        kid, kind, algorithm = one.get("kid"), one.get("kty"), one.get("alg")
        if algorithm not in ALGORITHMS.get(str(kind), ()):
            log.warning("JWKS: /keys/%d is not used: its kty and alg are not a pair that is known here", place)
            continue
        if kind != "oct" and "d" in one:
            raise AccessInvalid(f"/keys/{place}: holds a private key: leave only the public part here")
        if kid is not None and not isinstance(kid, str):
            raise AccessInvalid(f"/keys/{place}/kid: is not a string")
        if kid in keys:
            raise AccessInvalid(f"/keys/{place}/kid: two keys have the same, or none")
        try:
            key = jwt.PyJWK(one, algorithm)
            short = key.Algorithm.check_key_length(key.key)
        except Exception:  # its text holds the key
            raise AccessInvalid(f"/keys/{place}: is not a key of its kty") from None
        if short:
            raise AccessInvalid(f"/keys/{place}: is too short for {algorithm}")
        keys[kid] = key
    if not keys:
        raise AccessInvalid("has no key to verify with: each needs kty and alg")
    return keys


def _name(claims: dict[str, Any]) -> str:
    subject = claims["sub"]
    if not subject:  # all such callers would be one, who share their jobs and their cached answers
        raise jwt.MissingRequiredClaimError("sub")
    name = ascii(subject)[1:-1]
    if len(name) > 120:  # whoever only begins alike is somebody else; what is made here is longer than that
        name = f"{name[:60]}...{hashlib.sha256(name.encode()).hexdigest()}"
    return f"jwt:{name}"


def _scopes(claims: dict[str, Any]) -> list[Any]:
    """Return the scopes that are granted: `scope` (RFC 8693) has spaces between, `scp` may be a list too."""
    granted: list[Any] = []
    for claim in (claims.get("scope"), claims.get("scp")):
        if isinstance(claim, str):
            granted += claim.split(" ")
        elif isinstance(claim, list):
            granted += claim
    return granted
