"""What is let in: how long a wait is thought to be."""

from __future__ import annotations

from serving.engine.latency_model import LatencyModel


def test_a_new_price_for_rows_is_not_asked_of_batches_of_an_old_size() -> None:
    """A steep line through a few small batches refuses nobody: the wait is that of batches as they would be now."""
    pace = LatencyModel()
    for _ in range(50):
        pace.learn(3, 0.006)
        assert pace.waits(1.0, 512)[1] < 0.1
    for _ in range(50):
        for rows in (4, 3, 2):
            pace.learn(rows, 0.002 * rows)
            assert pace.waits(1.0, 512)[1] < 0.6


def test_a_long_queue_is_waited_for_in_full() -> None:
    """Rows that wait count by what they cost in batches that a deadline lets be so large, and a margin more."""
    pace = LatencyModel()
    for rows in (10, 20, 40) * 30:
        pace.learn(rows, 0.002 + 0.001 * rows)
    each, rest = pace.waits(1.0, 512)
    assert 0.001 < each < 0.0015
    assert 0.4 <= rest < 0.6


def test_batches_of_one_size_do_not_make_rows_free() -> None:
    """What a row costs is remembered while all batches are alike, so that the next one is not as large as can be."""
    pace = LatencyModel()
    for rows in (10, 20, 40) * 30:
        pace.learn(rows, 0.002 + 0.001 * rows)
    for _ in range(200):
        pace.learn(40, 0.042)
    assert 120 < pace.rows(1.0, 512) < 260


def test_long_batches_leave_room_for_a_queue() -> None:
    """Where batches take a fifth of the allowance whatever their size, they still fill, and more than one is let in."""
    pace = LatencyModel()
    for rows in (10, 20, 40) * 30:
        pace.learn(rows, 0.2 + 0.001 * rows)
    each, rest = pace.waits(1.0, 512)
    assert pace.rows(1.0, 512) > 50
    assert rest + 20 * each < 1.0
