"""Keys from `serving keys` to a running server: the real command, real sockets, fast path and gRPC."""

from __future__ import annotations

import queue
import re
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx2 as httpx
import pytest
from typer.testing import CliRunner

from serving.access.key_store import KeyStore
from serving.access.principal import AccessInvalid
from serving.access.rate_limits import Rates
from serving.command_line import app
from serving.protocols.messages import SERVICE, message
from tests.commands.test_command import command
from tests.conftest import MODELS, running

Wait = Callable[[Callable[[], bool]], None]
ROW = {"instances": [[5.1, 3.5, 1.4, 0.2]]}


def test_make_use_and_revoke_a_key(tmp_path: Path, eventually: Wait) -> None:
    """A key of `serving keys create` is served by the fast path, and not once revoked, on an open connection too."""
    file = str(tmp_path / "serving.keys")
    made = command("keys", "create", "--name", "app", "--scope", "predict", "--keys", file)
    asked = ["keys", "create", "--name", "kept", "--scope", "predict", "--expires", "90d"]
    kept = CliRunner().invoke(app, asked, env={"SERVING_KEYS": file})
    assert stat.S_IMODE(Path(file).stat().st_mode) == 0o600
    key, other = made.stdout.strip(), kept.stdout.strip()
    assert key not in Path(file).read_text()
    rated = ["keys", "create", "--name", "rated", "--scope", "predict", "--requests-per-s", "1234.5"]
    assert CliRunner().invoke(app, [*rated, "--keys", file]).exit_code == 0
    wrong = CliRunner().invoke(app, ["keys", "list", "--keys", f"{file}.old"])
    assert (wrong.exit_code, "there is no keys file" in wrong.stderr) == (2, True)
    listed = CliRunner().invoke(app, ["keys", "list", "--keys", file]).stdout
    assert "1234.5" in listed
    assert "app" in listed
    assert "live" in listed
    with running("--keys", file, "--grpc-port", "0") as server, httpx.Client(base_url=server.url) as client:

        def status(given: str | None) -> int:
            headers = {"authorization": f"Bearer {given}"} if given is not None else {}
            return client.post("/v1/models/iris:predict", json=ROW, headers=headers).status_code

        port = re.search(r"gRPC: 127\.0\.0\.1:(\d+)", server.output())
        assert port is not None
        with grpc.insecure_channel(f"127.0.0.1:{port[1]}") as channel:
            stream = Stream(channel, key)
            assert stream.answered()
            # Twice each: the second time the fast path knows the head and does not parse it.
            assert [status(given) for given in (key, key, None, None, "x", "x", other)] == [200, 200, *[401] * 4, 200]
            assert CliRunner().invoke(app, ["keys", "revoke", "app", "--keys", file]).exit_code == 0
            eventually(lambda: status(key) == 401)
            assert not stream.answered()
            assert stream.code() is grpc.StatusCode.UNAUTHENTICATED
        assert [status(other), status(key), status(None)] == [200, 401, 401]
        for secret in (key, other):
            assert secret not in server.output()
        big = httpx.post(f"{server.url}/v1/models/iris:predict", content=b" " * 15_000_000)
        assert big.status_code == 401


class Stream:
    """One ModelStreamInfer call, to which requests are added as they come."""

    def __init__(self, channel: grpc.Channel, key: str) -> None:
        self._requests: queue.Queue[bytes] = queue.Queue()
        call = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
        self._call = call(iter(self._requests.get, None), metadata=(("authorization", f"Bearer {key}"),), timeout=60)

    def answered(self) -> bool:
        """Send a request; tell whether an answer comes rather than the end of the call."""
        self._requests.put(message("ModelInferRequest")(model_name="iris").SerializeToString())
        try:
            next(self._call)
        except grpc.RpcError:
            return False
        return True

    def code(self) -> grpc.StatusCode:
        """Return how the call has ended."""
        code: grpc.StatusCode = self._call.code()
        return code


def test_many_writers_lose_no_key(tmp_path: Path) -> None:
    """Keys that are made and revoked at the same time are all there; no reader sees half a file."""
    store = KeyStore(tmp_path / "serving.keys")

    def one(number: int) -> None:
        store.create(f"k{number}", frozenset({"predict"}))
        if number % 2:
            store.revoke(f"k{number}")
        store.read()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(40)))
    assert {key.name for key in store.read()} == {f"k{n}" for n in range(40)}
    assert sum(key.revoked is not None for key in store.read()) == 20
    assert [p.name for p in tmp_path.iterdir()] == ["serving.keys"]


def test_a_change_that_would_break_the_file_is_not_made(tmp_path: Path) -> None:
    """A running server would keep the old keys, also those that are revoked later: what is there stays."""
    store = KeyStore(tmp_path / "serving.keys")
    store.create("app", frozenset({"predict"}))
    with pytest.raises(AccessInvalid, match="scopes"):
        store.create("ops", frozenset({"admin"}))  # type: ignore[arg-type]
    with pytest.raises(AccessInvalid, match="requests_per_s"):
        store.create("ops", frozenset({"predict"}), rates=Rates(1e12, None))
    assert [key.name for key in store.read()] == ["app"]


def test_hands_and_comments_are_kept(tmp_path: Path) -> None:
    """What people wrote into the file stays when the command changes it, and so does a link."""
    real = tmp_path / "real.keys"
    real.write_text(f"# ours; see the wiki\nci deploy {'a' * 64}")
    link = tmp_path / "serving.keys"
    link.symlink_to(real)
    KeyStore(link).create("app", frozenset({"predict"}))
    KeyStore(link).revoke("ci")
    assert link.is_symlink()
    assert real.read_text().startswith(f"# ours; see the wiki\nci deploy {'a' * 64} revoked=")
    assert [key.name for key in KeyStore(link).read()] == ["ci", "app"]


def test_mistakes_are_explained(tmp_path: Path) -> None:
    """The command and the server say in one line what is wrong, with a status that is not 0."""
    file = str(tmp_path / "serving.keys")
    missing = command("run", "--port", "0", "--models", str(MODELS), "--keys", file)
    assert missing.returncode == 1
    assert "can't be read: No such file" in missing.stderr
    assert "Traceback" not in missing.stderr
    for arguments in (
        ("create", "--name", "a", "--scope", "write"),
        ("create", "--name", "a b", "--scope", "predict"),
        ("create", "--name", "a", "--scope", "predict", "--expires", "soon"),
        ("create", "--name", "a", "--scope", "predict", "--rows-per-s", "-1"),
        ("revoke", "nobody"),
    ):
        answer = CliRunner().invoke(app, ["keys", *arguments, "--keys", file])
        assert answer.exit_code == 2
        assert answer.stderr.startswith("serving: ")
        assert answer.stderr.count("\n") == 1
        assert answer.stdout == ""
