"""The codec process: what is long is done elsewhere, in turns, within bounds, and whatever happens to that process."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from serving.bodies.codec_pool import CodecPool
from serving.engine.session import OnnxSession
from serving.engine.signature import Described
from serving.errors import DeadlineExceeded, InvalidRequest, PayloadTooLarge, QueueFull, ServingError
from serving.protocols import predict_v1
from serving.protocols.codec import Elsewhere
from tests.bodies.tasks import Toy, blocked, echoed, failing, greedy, killed, loaded, pid, toys
from tests.conftest import MODELS

Wait = Callable[[Callable[[], bool]], None]


class Asker:
    def __init__(self, sender: Any = None) -> None:
        self.sender = sender


class Asking:
    """A pool on a running loop, asked with `await`."""

    def __init__(self, pool: CodecPool) -> None:
        self.pool = pool
        self.toy = Toy()
        self.order: list[Any] = []

    def submit(
        self, work: Any, *given: Any, sender: Any = None, seconds: float = 60, codec: Any = None
    ) -> asyncio.Future[Any]:
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def done(found: Any) -> None:
            self.order.append(sender)
            answered.set_result(found)

        asker: Any = Asker(sender)
        self.job = self.pool.submit(asker, codec or self.toy, work, given, done, deadline=time.monotonic() + seconds)
        return answered


def with_pool(scenario: Callable[[Asking], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        asking = Asking(CodecPool(**options))
        try:
            await scenario(asking)
        finally:
            await asking.pool.close()

    asyncio.run(run())


def alive(number: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_arrays_arrive_as_they_were_sent() -> None:
    """Numbers of any type, BF16 among them, and strings come back equal, whatever their shape."""
    rng = np.random.default_rng(0)
    arrays = [
        rng.random((3, 5)),
        np.asfortranarray(rng.random((4, 2)).astype(np.float32)),
        np.array([["é", ""], ["x" * 10_000, "\0"]], object),
        np.array([str(i) for i in range(10_000)], object),
        np.empty((0, 4), np.int64),
        np.array(7),
        rng.random(6).astype(ml_dtypes.bfloat16),
    ]

    async def scenario(asking: Asking) -> None:
        for sent, got in zip(arrays, await asking.submit(echoed, arrays), strict=True):
            assert got.dtype == sent.dtype
            np.testing.assert_array_equal(got, sent)

    with_pool(scenario)


def test_a_process_that_is_killed_is_replaced_and_asked_again(tmp_path: Path) -> None:
    """One that dies while it reads costs the caller time, not the answer."""

    async def scenario(asking: Asking) -> None:
        first = await asking.submit(pid)
        assert await asking.submit(killed, str(tmp_path), 1) == 2
        assert await asking.submit(pid) != first

    with_pool(scenario)


def test_what_kills_the_process_twice_is_refused(tmp_path: Path) -> None:
    """A body that ends its reader every time is refused in words, and the next one is read."""

    async def scenario(asking: Asking) -> None:
        refused = asking.submit(killed, str(tmp_path), 9)
        behind = asking.submit(echoed, "next")
        assert isinstance(await refused, InvalidRequest)
        assert "twice" in (await refused).message
        assert await behind == "next"

    with_pool(scenario)


def test_a_deadline_holds_while_others_are_read(tmp_path: Path) -> None:
    """Who waits behind something slow is told so at the deadline, and not read afterwards."""
    gate = tmp_path / "gate"

    async def scenario(asking: Asking) -> None:
        slow = asking.submit(blocked, str(gate))
        late = asking.submit(killed, str(tmp_path), 9, sender="late", seconds=0.05)
        assert isinstance(await late, DeadlineExceeded)
        assert not slow.done()
        gate.touch()
        assert await slow == "blocked"
        assert await asking.submit(echoed, 1) == 1

    with_pool(scenario)
    assert [gate] == list(tmp_path.iterdir())


def test_what_is_read_past_its_deadline_is_answered_at_it(tmp_path: Path) -> None:
    """A body that is being read when its time is over does not keep its caller waiting."""
    gate = tmp_path / "gate"

    async def scenario(asking: Asking) -> None:
        assert isinstance(await asking.submit(blocked, str(gate), seconds=0.05), DeadlineExceeded)
        gate.touch()
        assert await asking.submit(echoed, 1) == 1

    with_pool(scenario)


def test_senders_take_turns(tmp_path: Path) -> None:
    """However much one sends at once, another waits for one of them at the most."""
    gate = tmp_path / "gate"

    async def scenario(asking: Asking) -> None:
        many = [asking.submit(blocked, str(gate), sender="many") for _ in range(5)]
        few = [asking.submit(echoed, name, sender=name) for name in ("one", "two")]
        gate.touch()
        await asyncio.gather(*many, *few)
        assert asking.order[:4] == ["many", "many", "one", "two"] or asking.order[:3] == ["many", "one", "two"]

    with_pool(scenario)


def test_the_line_is_bounded_and_who_leaves_makes_room(tmp_path: Path) -> None:
    """Beyond the bound a body is refused at once; a caller that leaves gives its place back."""
    gate = tmp_path / "gate"

    async def scenario(asking: Asking) -> None:
        first = asking.submit(blocked, str(gate))
        asking.submit(echoed, 1)
        leaving = asking.job
        second = asking.submit(echoed, 2)
        with pytest.raises(QueueFull):
            asking.submit(echoed, 3)
        asking.pool.cancel(leaving)
        third = asking.submit(echoed, 3)
        gate.touch()
        assert [await first, await second, await third] == ["blocked", 2, 3]
        assert len(asking.order) == 3

    with_pool(scenario, most_waiting=2)


def test_memory_is_bounded() -> None:
    """What takes more than it may is refused in words, and the process goes on."""

    async def scenario(asking: Asking) -> None:
        before = await asking.submit(pid)
        refused = await asking.submit(greedy, 1 << 30)
        assert isinstance(refused, PayloadTooLarge)
        assert "binary protocol" in refused.message
        assert await asking.submit(pid) == before

    with_pool(scenario, memory_bytes=1 << 28)


def test_what_takes_too_long_is_given_up(tmp_path: Path) -> None:
    """A task over its time is refused, and the next one does not wait for it."""

    async def scenario(asking: Asking) -> None:
        stuck, behind = asking.submit(blocked, str(tmp_path / "never")), asking.submit(echoed, 1)
        assert isinstance(await stuck, InvalidRequest)
        assert await behind == 1

    with_pool(scenario, task_s=0.5)


def test_closing_does_not_wait_for_what_is_read(tmp_path: Path) -> None:
    """A server that ends waits for no body that nobody wants any more; what waits, or still comes, is told so."""

    async def scenario(asking: Asking) -> None:
        first = await asking.submit(pid)
        asked = [asking.submit(blocked, str(tmp_path / "never"), sender=sender) for sender in "abc"]
        await asking.pool.close()
        assert not alive(first)
        asked.append(asking.submit(pid))
        assert all(isinstance(found, ServingError) for found in await asyncio.wait_for(asyncio.gather(*asked), 20))

    async def run() -> None:
        await scenario(Asking(CodecPool()))

    asyncio.run(run())


def test_a_fault_of_ours_is_logged_and_told_without_its_insides(caplog: pytest.LogCaptureFixture) -> None:
    """What a codec raises that is no answer goes to the log, and the caller learns that it is there."""

    async def scenario(asking: Asking) -> None:
        found = await asking.submit(failing)
        assert type(found) is ServingError
        assert "secret" not in found.message

    with_pool(scenario)
    assert "secret" in caplog.text


def test_it_ends_when_idle(eventually: Wait) -> None:
    """A process that nobody needs is not kept; the next long body starts one."""

    async def scenario(asking: Asking) -> None:
        first = await asking.submit(pid)
        await asyncio.to_thread(eventually, lambda: not alive(first))
        assert await asking.submit(pid) != first

    with_pool(scenario, idle_s=0.05)


def test_it_reads_with_nothing_but_codecs() -> None:
    """It loads neither onnxruntime nor a web framework: it starts fast, and holds little."""
    signature = OnnxSession(MODELS / "iris" / "1" / "model.onnx", warm_rows=1).signature

    async def scenario(asking: Asking) -> None:
        codec = predict_v1.Codec(Described("iris", "1", signature))
        body = b'{"instances":[%b]}' % b",".join([b"[1,2,3,4]"] * 9000)
        long = codec.begin([], body, lambda size: True, len(body))
        assert isinstance(long, Elsewhere)
        decoded = await asking.submit(long.work, *long.given, codec=codec)
        assert decoded.inputs[0].tolist() == [[1, 2, 3, 4]] * 9000
        modules = await asking.submit(loaded, codec=codec)
        assert not {"onnxruntime", "fastapi", "starlette", "uvicorn", "prometheus_client", "grpc"} & set(modules)

    with_pool(scenario)


def test_codecs_are_made_once_and_forgotten() -> None:
    """The process makes a codec that comes again only once, and keeps those of 64 versions at the most."""

    async def scenario(asking: Asking) -> None:
        kept = Toy()
        for _ in range(3):
            assert await asking.submit(toys, codec=kept) == 1
        for number in range(1, 70):
            last = await asking.submit(toys, codec=Toy(number))
        assert last == 64
        assert await asking.submit(toys, codec=kept) == 64

    with_pool(scenario)


ORPHAN = """
import asyncio, time
from serving.bodies.codec_pool import CodecPool
from tests.bodies.tasks import pid
from tests.bodies.test_codec_pool import Asking
async def run():
    print(await Asking(CodecPool()).submit(pid), flush=True)
    await asyncio.sleep(60)
asyncio.run(run())
"""


def test_it_ends_with_its_worker(eventually: Wait) -> None:
    """A worker that is killed leaves no process behind."""
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        number = int(worker.stdout.readline())
        assert alive(number)
        worker.kill()
    eventually(lambda: not alive(number))
