"""A folder that is gone is told from one in which models came and went."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.deploy.folder_guard import FolderGuard
from serving.repository.repository import Contents, ModelVersion, Problem


def seen(*names: str, bad: tuple[str, ...] = (), device: int = 1) -> Contents:
    found = tuple(ModelVersion(name, "1", Path(name), "content") for name in names)
    return Contents(found, tuple(Problem(name, "1", "half copied") for name in bad), {}, {}, device=device)


UNREADABLE = Contents(
    (), (Problem("", "", "the models folder can't be read: stale file handle"),), {}, {}, unreadable=True
)


@pytest.mark.parametrize(
    ("served", "now", "says"),
    [
        ((), seen(), ""),
        ((), UNREADABLE, "can't be read"),
        (("a", "b"), UNREADABLE, "can't be read"),
        (("a", "b"), seen("a", "b"), ""),
        (("a", "b"), seen("b"), ""),
        (("a", "b"), seen(bad=("b",)), ""),
        (("a", "b"), seen(), "holds nothing of what is served (a, b)"),
        (("a", "b"), seen("c"), "holds nothing of what is served (a, b)"),
        (("a",), seen(), "holds nothing of what is served (a)"),
        (("a", "b", "c", "d", "e"), seen(), "(a, b, c and 2 more)"),
        (("a", "b"), seen("a", "b", "c", device=2), ""),
        (("a", "b"), seen("a", device=2), "on another device now, and lacks b"),
        ((), seen("a", device=2), ""),
    ],
)
def test_what_counts_as_gone(served: tuple[str, ...], now: Contents, says: str) -> None:
    """All models at once, or some with another device in the folder's place, are no order; one model less is."""
    guard = FolderGuard()
    assert guard.check(seen(*served), served) == ""
    reason = guard.check(now, served)
    assert (says in reason) if says else not reason, reason
    assert guard.check(seen(*served, device=3), served) == "", (
        "the volume is mounted again, and has a number of its own"
    )


def test_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """A folder that stays away is an error in the log for each reason, and its return another line."""
    guard = FolderGuard()
    for contents in (seen("a"), UNREADABLE, UNREADABLE, seen(), seen(), seen("a"), seen("a")):
        guard.check(contents, ("a",))
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR", "WARNING"]
