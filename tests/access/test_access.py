"""Decisions: keys and tokens from files that change, what is open, and what is never told."""

from __future__ import annotations

import hmac
import itertools
import json
import logging
import os
import time
from pathlib import Path

import pytest

from serving.access import access as access_module
from serving.access.access import Access
from serving.access.key_store import KeyStore
from serving.access.keys import Key, digest, parse
from serving.access.principal import ANYONE, AccessInvalid
from serving.access.rate_limits import Rates
from serving.errors import Forbidden, Unauthenticated
from tests.access import issuer

PREDICT, DEPLOY = frozenset({"predict"}), frozenset({"deploy"})


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "serving.keys")


@pytest.fixture
def file(tmp_path: Path) -> str:
    return str(tmp_path / "serving.keys")


def bearer(key: str) -> bytes:
    return f"Bearer {key}".encode()


def tokens(tmp_path: Path) -> Access:
    (tmp_path / "jwks.json").write_text(issuer.jwks())
    return Access(jwks=tmp_path / "jwks.json", audience=issuer.AUDIENCE, issuer=issuer.ISSUER)


def test_keys_rotate_without_a_restart(store: KeyStore, file: str) -> None:
    """A new key is taken once the file is read anew, beside the old one; a revoked one is refused, also if cached."""
    old = store.create("app", PREDICT)
    access = Access(keys=file)
    assert access.decide(bearer(old), "predict").name == "app"
    new = store.create("app-2", PREDICT)
    with pytest.raises(Unauthenticated):
        access.decide(bearer(new), "predict")
    access.refresh()
    assert access.decide(bearer(old), "predict").name == "app"
    assert access.decide(bearer(new), "predict").name == "app-2"
    store.revoke("app")
    access.refresh()
    with pytest.raises(Unauthenticated, match="revoked"):
        access.decide(bearer(old), "predict")
    assert access.decide(bearer(new), "predict").name == "app-2"


def test_revoking_the_last_key_opens_nothing(store: KeyStore, file: str) -> None:
    """A scope that only a revoked or expired key has stays closed, in a running server and in one that starts."""
    key = store.create("app", PREDICT)
    store.create("old", frozenset({"metrics"}), expires=time.time() - 1)
    access = Access(keys=file)
    store.revoke("app")
    access.refresh()
    for judge in (access, Access(keys=file)):
        for scope in ("predict", "metrics"):
            for header in (None, bearer(key)):
                with pytest.raises(Unauthenticated):
                    judge.decide(header, scope)  # type: ignore[arg-type]


def test_what_was_closed_stays_closed_while_it_runs(store: KeyStore, file: str, tmp_path: Path) -> None:
    """Lines that vanish, a file cut short, emptied, broken or gone never open what was closed."""
    store.create("app", PREDICT)
    store.create("ci", DEPLOY)
    text = Path(file).read_text()
    access = Access(keys=file)
    for damaged in (text.splitlines()[1], text[:40], "", "# nothing\n", "\x00\x01", None, "x" * 2_000_000):
        if damaged is None:
            os.unlink(file)
        else:
            Path(file).write_text(damaged)
        access.refresh()
        with pytest.raises(Unauthenticated):
            access.decide(None, "predict")
    os.unlink(file)
    os.mkfifo(file)
    access.refresh()
    with pytest.raises(Unauthenticated):
        access.decide(None, "predict")


def test_a_broken_file_leaves_the_last_keys_in_force(
    store: KeyStore, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A keys file that can't be read any more is logged, once for each change, and keys go on working."""
    key = store.create("app", PREDICT)
    access = Access(keys=file)
    Path(file).write_text("nonsense")
    for _ in range(3):
        access.refresh()
    assert access.decide(bearer(key), "predict").name == "app"
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 1


def test_a_key_expires_though_it_was_verified(
    store: KeyStore, file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Key and token are refused from the second that they end, also where they have just been used."""
    now = time.time()
    key = store.create("app", PREDICT, expires=now + 100)
    token = issuer.token(scope="predict", exp=int(now) + 100)
    for access, given in ((Access(keys=file), key), (tokens(tmp_path), token)):
        assert access.decide(bearer(given), "predict")
        with monkeypatch.context() as later:
            later.setattr(access_module.time, "time", lambda: now + 200)
            if given is key:
                with pytest.raises(Unauthenticated, match="expired"):
                    access.decide(bearer(given), "predict")
    short = issuer.token(scope="predict", exp=time.time() - 9)  # within the leeway of clocks
    access = tokens(tmp_path)
    assert access.decide(bearer(short), "predict").name == "jwt:alice"
    time.sleep(1.5)
    with pytest.raises(Unauthenticated, match="expired"):
        access.decide(bearer(short), "predict")


def test_a_token_names_its_caller_without_tricks(tmp_path: Path) -> None:
    """A subject can't pass for a key's name, and brings no line break into logs."""
    access = tokens(tmp_path)
    given = issuer.token(scope="deploy", sub="ci\nroot\x1b[31m")
    assert access.decide(bearer(given), "deploy").name == r"jwt:ci\nroot\x1b[31m"


def test_subjects_that_begin_alike_are_not_the_same_caller(tmp_path: Path) -> None:
    """However long they are: each has jobs and rates of its own, under a name that a database takes."""
    access = tokens(tmp_path)
    subjects = ["é" * 200, "é" * 201, "é" * 199 + "e"]
    names = {access.decide(bearer(issuer.token(scope="jobs", sub=each)), "jobs").name for each in subjects}
    assert (len(names), max(map(len, names)) <= 256) == (3, True)
    # Nor who calls himself as a long subject is called here.
    made = access.decide(bearer(issuer.token(scope="jobs", sub="a" * 200)), "jobs").name
    taken = issuer.token(scope="jobs", sub=made.removeprefix("jwt:"))
    assert access.decide(bearer(taken), "jobs").name != made


def test_a_jwks_file_is_read_anew(tmp_path: Path) -> None:
    """Taking a key out of the JWKS file refuses its tokens, cached ones too; the others go on."""
    access = tokens(tmp_path)
    first, second = issuer.token(scope="deploy"), issuer.token("ec", "ES256", scope="deploy")
    assert access.decide(bearer(first), "deploy")
    assert access.decide(bearer(second), "deploy")
    kept = [key for key in json.loads(issuer.jwks())["keys"] if key["kid"] == "ec"]
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": kept}))
    access.refresh()
    assert access.decide(bearer(second), "deploy")
    with pytest.raises(Unauthenticated):
        access.decide(bearer(first), "deploy")


@pytest.mark.parametrize("name", issuer.forged("deploy"))
def test_forged_tokens_are_refused(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No forged token passes, and neither the answer nor the log at its most talkative has a word of it."""
    caplog.set_level(logging.DEBUG)
    given = issuer.forged("deploy")[name]
    with pytest.raises(Unauthenticated) as refused:
        tokens(tmp_path).decide(bearer(given), "deploy")
    told = refused.value.message + caplog.text
    assert not [part for part in given.split(".") if len(part) > 8 and part in told]


def test_strangers_fill_nothing(
    store: KeyStore, file: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad credentials are kept nowhere and logged nowhere; good ones are kept in bounded number."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(access_module, "_MOST_VERIFIED", 10)
    key = store.create("app", PREDICT)
    access = Access(keys=file)
    for number in range(100):
        with pytest.raises(Unauthenticated):
            access.decide(f"Bearer wrong-{number}", "predict")
    assert not access._state.verified
    for spelling in itertools.product(*zip("bearer", "BEARER", strict=True)):
        access.decide(f"{''.join(spelling)} {key}", "predict")
    assert 0 < len(access._state.verified) <= 10
    assert "wrong-" not in caplog.text
    assert key not in caplog.text


def test_every_key_is_compared_in_constant_time(store: KeyStore, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever key is given, all are compared, by hmac.compare_digest on hashes: time tells nothing."""
    keys = [store.create(f"app{n}", PREDICT) for n in range(5)]
    access = Access(keys=file)
    compared: list[int] = []
    compare = hmac.compare_digest

    def counted(one: bytes, other: bytes) -> bool:
        compared[-1] += 1
        assert len(one) == len(other) == 32
        return compare(one, other)

    monkeypatch.setattr(access_module.hmac, "compare_digest", counted)
    for key in (*keys, "wrong"):
        compared.append(0)
        try:
            access.decide(bearer(key), "predict")
        except Unauthenticated:
            assert key == "wrong"
    assert compared == [5] * 6


def test_nothing_configured_is_open_but_for_deploying() -> None:
    """Without keys anyone may predict and read metrics; changes are refused with the way to allow them."""
    access = Access()
    assert access.decide(b"Bearer x", "predict") is access.decide(None, "metrics") is ANYONE
    with pytest.raises(Forbidden, match="serving keys create --name NAME --scope deploy"):
        access.decide(b"Bearer x", "deploy")


def test_keys_from_the_environment() -> None:
    """Lines of keys stand for a file, also with semicolons between."""
    entries = ";".join(Key(name, PREDICT, digest(name.encode())).line() for name in ("a", "b"))
    access = Access(keys=entries)
    assert access.decide("Bearer b", "predict").name == "b"


HASH = "0" * 64


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("app predict", "line 1: expected a name, scopes and the SHA-256"),
        (f"app predict {HASH}\na/b predict {HASH[:-1]}1", "line 2: the name"),
        (f"app write {HASH}", "line 1: the scopes are not among deploy, jobs, metrics, predict"),
        (f"app , {HASH}", "scopes"),
        (f"app predict {HASH[1:]}", "third word is not a SHA-256"),
        (f"app predict {HASH} expires=soon", "expires= is not a time"),
        (f"app predict {HASH} expire=2027-01-01", "after the SHA-256 only"),
        (f"app predict {HASH} requests_per_s=0", "requests_per_s= is not a rate"),
        (f"app predict {HASH} rows_per_s=1e400", "rows_per_s= is not a rate"),
        (f"app predict {HASH} rows_per_s=1 rows_per_s=2", "once each"),
        (f"app predict {HASH}\napp predict {HASH[:-1]}1", "'app' is there twice"),
        (f"app predict {HASH}\nb deploy {HASH}", "same key is there twice"),
    ],
)
def test_a_line_that_is_wrong_is_named(text: str, told: str) -> None:
    """A keys file with a mistake is refused as a whole, with the line and what is wrong, and without its text."""
    with pytest.raises(AccessInvalid, match=told) as refused:
        parse(text)
    assert HASH[:20] not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda keys: [], "no key to verify with"),
        (lambda keys: [{**keys[0], "d": "AQAB"}], "private key"),
        (lambda keys: [keys[0], keys[0]], "two keys have the same"),
        (lambda keys: [{**keys[0], "n": "!"}], "not a key of its kty"),
        (lambda keys: [{**keys[0], "alg": "HS256"}], "no key to verify with"),
        (lambda keys: [{**keys[0], "alg": "none"}], "no key to verify with"),
        (lambda keys: ["x"], "/keys/0: is not an object"),
        (lambda keys: [{**keys[2], "k": "c2hvcnQ"}], "too short for HS256"),
        (lambda keys: [{**keys[0], "key_ops": 5}], "no key to verify with"),
    ],
)
def test_a_jwks_that_is_wrong_is_refused(change: object, told: str, tmp_path: Path) -> None:
    """A JWKS file without a fit key, or with a private one, is refused when the server starts."""
    keys = change(json.loads(issuer.jwks())["keys"])  # type: ignore[operator]
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": keys}))
    with pytest.raises(AccessInvalid, match=told):
        Access(jwks=tmp_path / "jwks.json", audience="a", issuer="i")


def test_a_jwks_needs_audience_and_issuer(tmp_path: Path) -> None:
    """Tokens without a wanted audience and issuer would let in what was made for another server."""
    with pytest.raises(AccessInvalid, match="--jwt-audience"):
        Access(jwks=tmp_path / "jwks.json", issuer="i")
    with pytest.raises(AccessInvalid, match="--jwks"):
        Access(audience="a", issuer="i")
    with pytest.raises(AccessInvalid, match="--jwks"):
        Access(token_rates=Rates(requests_per_s=1))


def test_refusals_are_in_the_log_and_can_not_fill_it(
    store: KeyStore, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A line says what was refused, and never what was sent; a flood of refusals is one line."""
    store.create("app", frozenset({"predict"}))
    access = Access(keys=file)
    for _ in range(50):
        with pytest.raises(Unauthenticated):
            access.decide("Bearer guessed", "predict")
    with pytest.raises(Unauthenticated):
        access.decide("Bearer guessed", "predict", quiet=True)
    (line,) = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert "refused to predict: the key is not known" in line
    assert "guessed" not in line


def test_names_close_what_is_open_to_all_others(store: KeyStore, file: str) -> None:
    """Where names are given, only their bearers may, also of a scope that is open; without any key nobody may."""
    ci, app = store.create("ci", DEPLOY), store.create("app", DEPLOY)
    access = Access(keys=file)
    assert access.decide(None, "predict") is ANYONE
    assert access.decide(bearer(ci), "predict", among=frozenset({"ci", "gone"})).name == "ci"
    with pytest.raises(Forbidden, match="name others who may"):
        access.decide(bearer(app), "predict", among=frozenset({"ci"}))
    with pytest.raises(Forbidden):
        access.decide(bearer(ci), "predict", among=frozenset())
    for nobody in (access, Access()):
        with pytest.raises(Unauthenticated):
            nobody.decide(None, "predict", among=frozenset({"ci", "anyone"}))
    caller = store.create("caller", PREDICT)
    access.refresh()
    with pytest.raises(Forbidden, match="scope predict"):
        access.decide(bearer(ci), "predict", among=frozenset({"ci"}))
    assert access.decide(bearer(caller), "predict", among=frozenset({"caller"})).name == "caller"
