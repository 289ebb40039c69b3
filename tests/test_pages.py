"""Memory for long bodies: it comes with the bytes and goes with the body, whoever lets go of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from serving.pages import OWN_PAGES_FROM, GatheredText, pages

Wait = Callable[[Callable[[], bool]], None]
SIZE = 32 * 2**20


def held() -> int:
    """Return the bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_body_is_what_came() -> None:
    """A body, long or short after all, whole or less than was announced, is its pieces in a row."""
    for size in (0, 5, OWN_PAGES_FROM - 1, OWN_PAGES_FROM, OWN_PAGES_FROM + 5000):
        gathered = GatheredText(2 * OWN_PAGES_FROM)
        body = os.urandom(size)
        for at in range(0, size, 70_000):
            gathered.add(body[at : at + 70_000])
            assert len(gathered) == min(size, at + 70_000)
        whole = gathered.whole()
        assert len(whole) == size
        assert bytes(whole) == body
        assert whole.find(body[-3:]) == body.find(body[-3:])
        assert whole.rfind(body[:3]) == body.rfind(body[:3])


def test_an_announcement_takes_no_memory() -> None:
    """Room for a body that does not come costs nothing."""
    before = held()
    announced = [GatheredText(SIZE) for _ in range(8)]
    assert held() - before < SIZE // 8
    del announced


def test_memory_goes_with_the_last_tensor(eventually: Wait) -> None:
    """A body's memory stays while a tensor is a view of it, and is given back after."""
    before = held()
    body = pages(SIZE)
    body.write(bytes(SIZE))
    tensor = np.frombuffer(body, np.uint8)
    del body
    assert tensor.sum() == 0
    assert held() - before > SIZE // 2
    del tensor
    eventually(lambda: held() - before < SIZE // 4)


def test_what_waits_to_be_given_back_is_bounded() -> None:
    """However fast bodies come and go, few of them are in memory at a time."""
    before = most = held()
    for _ in range(60):
        body = pages(SIZE // 4)
        body.write(bytes(SIZE // 4))
        most = max(most, held())
        del body
    assert most - before < 3 * SIZE
