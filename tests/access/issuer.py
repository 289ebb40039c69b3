"""An issuer of tokens for tests: its own keys, good tokens, and those that an attacker would try."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from functools import cache
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

AUDIENCE, ISSUER = "serving", "https://issuer.example"
SHARED = "k" * 48


@cache
def rsa_key(owner: str) -> rsa.RSAPrivateKey:
    """Make one RSA key for each owner; it takes a while."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@cache
def ec_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def jwks() -> str:
    """Return the public keys: `rsa` (RS256), `ec` (ES256), `shared` (HS256), and one for encryption."""
    public = json.loads(RSAAlgorithm.to_jwk(rsa_key("issuer").public_key()))
    curve = json.loads(ECAlgorithm.to_jwk(ec_key().public_key()))
    shared = base64.urlsafe_b64encode(SHARED.encode()).decode().rstrip("=")
    return json.dumps(
        {
            "keys": [
                {**public, "kid": "rsa", "alg": "RS256", "use": "sig", "key_ops": ["verify"]},
                {**curve, "kid": "ec", "alg": "ES256"},
                {"kty": "oct", "k": shared, "kid": "shared", "alg": "HS256"},
                {**public, "kid": "encryption", "alg": "RSA-OAEP", "use": "enc"},
                {**public, "kid": "unnamed"},
            ]
        }
    )


def claims(**changes: Any) -> dict[str, Any]:
    """Return claims that are in order; None takes one away."""
    whole = {"sub": "alice", "aud": AUDIENCE, "iss": ISSUER, "exp": time.time() + 600, **changes}
    return {name: value for name, value in whole.items() if value is not None}


def token(kid: str | None = "rsa", alg: str = "RS256", key: Any = None, extra: Any = None, **changes: Any) -> str:
    """Return a token, good unless something is changed."""
    keys = {"rsa": rsa_key("issuer"), "ec": ec_key(), "shared": SHARED}
    headers = {**({"kid": kid} if kid is not None else {}), **(extra or {})}
    return jwt.encode(claims(**changes), key if key is not None else keys.get(str(kid)), alg, headers)


def by_hand(header: dict[str, Any], body: dict[str, Any], secret: bytes | None) -> str:
    """Return a token that a library refuses to make: unsigned, or HS256 with any bytes as its secret."""

    def coded(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).decode().rstrip("=")

    signed = f"{coded(json.dumps(header).encode())}.{coded(json.dumps(body).encode())}"
    return f"{signed}.{coded(hmac.digest(secret, signed.encode(), hashlib.sha256)) if secret is not None else ''}"


def forged(scope: str) -> dict[str, str]:
    """Return tokens that must all be refused, by what is wrong with them."""
    public = rsa_key("issuer").public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    stranger = rsa_key("stranger")
    own = json.loads(RSAAlgorithm.to_jwk(stranger.public_key()))
    good = token(scope=scope)
    head, body, signature = good.split(".")
    return {
        "alg none": by_hand({"alg": "none", "kid": "rsa"}, claims(scope=scope), None),
        "alg None": by_hand({"alg": "None", "kid": "rsa"}, claims(scope=scope), None),
        "no alg": by_hand({"kid": "rsa"}, claims(scope=scope), None),
        "public key as HS secret": by_hand({"alg": "HS256", "kid": "rsa"}, claims(scope=scope), pem),
        "HS with an empty secret": by_hand({"alg": "HS256", "kid": "rsa"}, claims(scope=scope), b""),
        "empty secret, shared": by_hand({"alg": "HS256", "kid": "shared"}, claims(scope=scope), b""),
        "another alg of the same key": token(alg="RS512", scope=scope),
        "another alg of the shared key": token("shared", "HS384", scope=scope),
        "unknown kid": token("other", key=rsa_key("issuer"), scope=scope),
        "kid of a path": token("../../etc/passwd", key=rsa_key("issuer"), scope=scope),
        "no kid": token(None, key=rsa_key("issuer"), scope=scope),
        "kid of a key without alg": token("unnamed", key=rsa_key("issuer"), scope=scope),
        "kid of an encryption key": token("encryption", key=rsa_key("issuer"), scope=scope),
        "kid of another key": token("ec", key=rsa_key("issuer"), scope=scope),
        "a stranger's key": token(key=stranger, scope=scope),
        "a key of its own inside": token(key=stranger, extra={"jwk": own}, scope=scope),
        "a key elsewhere": token(key=stranger, extra={"jku": "http://127.0.0.1:1/jwks"}, scope=scope),
        "crit": token(extra={"crit": ["exp"], "exp": 1}, scope=scope),
        "no exp": token(exp=None, scope=scope),
        "no aud": token(aud=None, scope=scope),
        "no iss": token(iss=None, scope=scope),
        "no sub": token(sub=None, scope=scope),
        "an empty sub": token(sub="", scope=scope),
        "a sub that is no text": by_hand(
            {"alg": "HS256", "kid": "shared"}, claims(sub=7, scope=scope), SHARED.encode()
        ),
        "expired": token(exp=time.time() - 60, scope=scope),
        "exp is endless": by_hand({"alg": "HS256", "kid": "shared"}, claims(exp=float("inf")), SHARED.encode()),
        "not yet": token(nbf=time.time() + 600, scope=scope),
        "another audience": token(aud="other", scope=scope),
        "another issuer": token(iss="https://evil.example", scope=scope),
        "changed body": f"{head}.{token(scope=scope, sub='root').split('.')[1]}.{signature}",
        "no signature": f"{head}.{body}.",
        "nested head": f"{base64.urlsafe_b64encode(b'[' * 5000).decode().rstrip('=')}.{body}.{signature}",
        "not base64": "a.b.c",
    }
