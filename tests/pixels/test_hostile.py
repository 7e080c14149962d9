"""Tests that hostile files get a verdict within bounded time and memory; benchmarks/fuzz.py tries more of them."""

from __future__ import annotations

from pathlib import Path

import fuzz
import pytest

MAX_SECONDS = 10
"""Limit of processor time for one file; the slowest file needs less than half."""
MAX_MEGABYTES = 1000
"""Limit of additional memory for one file; the largest file needs less than half."""
LARGE = {"JPEG", "JPEG 2000", "HTJ2K", "JPEG-LS", "JPEG lossless"}
"""Decompression bombs of a hundred million pixels, which take long to create."""


@pytest.mark.nightly
def test_decompression_bombs_get_a_verdict_within_the_limits(tmp_path: Path) -> None:
    for name, path in fuzz.write_bombs(tmp_path, leave_out=LARGE):
        outcome = fuzz.try_file(name, path)
        path.unlink()
        assert outcome.verdict not in ("failed", "warned"), outcome
        assert outcome.verdict != "ok" or name == "a private tag of 2 GB", outcome
        assert outcome.seconds < MAX_SECONDS, outcome
        assert outcome.megabytes < MAX_MEGABYTES, outcome


def test_randomly_damaged_files_get_a_verdict(tmp_path: Path) -> None:
    """A file that crashes or hangs a decoder would end or stop this test."""
    path = tmp_path / "mutant"
    verdicts = set()
    for name in fuzz.small_seeds():
        for number in range(5):
            path.write_bytes(fuzz.mutant(name, number))
            outcome = fuzz.try_file(f"{name} #{number}", path)
            assert outcome.verdict != "failed", outcome
            assert outcome.seconds < MAX_SECONDS, outcome
            verdicts.add(outcome.verdict)
    assert len(verdicts) > 5
