"""Tests of the parallel map: order, bounded work ahead of the reader, and its end when the reader stops."""

from __future__ import annotations

import time

from vitmodel.jobs.parallel import parallel_map


def test_workers_stay_a_bounded_number_of_items_ahead_of_a_slow_reader() -> None:
    """Otherwise all crops of a folder would wait in memory for a network that is slower than the decoder."""
    started: list[int] = []

    def start(item: int) -> int:
        started.append(item)
        return item

    read = 0
    for result in parallel_map(start, range(60), "test", jobs=3):
        assert result == read
        read += 1
        time.sleep(0.002)
        assert len(started) - read <= 2 * 3
    assert read == 60


def test_the_work_ends_when_the_reader_stops() -> None:
    started: list[int] = []
    results = parallel_map(started.append, range(1000), "test", jobs=2)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert len(started) <= 2 * 2 + 1
