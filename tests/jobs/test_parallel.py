"""The parallel map keeps the order, works a bounded number of items ahead, and stops with its reader."""

from __future__ import annotations

import time

from vitmodel.jobs.parallel import parallel_map


def test_workers_stay_a_bounded_number_of_items_ahead_of_a_slow_reader() -> None:
    """Else a folder's crops would all wait in memory for a network that is slower than the decoder."""
    begun: list[int] = []
    taken = 0
    for result in parallel_map(lambda item: begun.append(item) or item, range(60), "test", jobs=3):  # type: ignore[func-returns-value]
        assert result == taken
        taken += 1
        time.sleep(0.002)
        assert len(begun) - taken <= 2 * 3
    assert taken == 60


def test_a_reader_that_stops_stops_the_work() -> None:
    begun: list[int] = []
    results = parallel_map(begun.append, range(1000), "test", jobs=2)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert len(begun) <= 2 * 2 + 1
