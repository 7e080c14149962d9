"""Hostile files end in a verdict within bounded time and memory; benchmarks/fuzz.py tries more of them."""

from __future__ import annotations

from pathlib import Path

import fuzz

SECONDS, MEGABYTES = 10, 1000
"""Of processor time and of memory beyond the process's own, for one file; the slowest and the largest bomb need less than half."""
LARGE = {"JPEG", "JPEG 2000", "HTJ2K", "JPEG-LS", "JPEG lossless"}
"""Bombs of a hundred million pixels that take long to make."""


def test_decompression_bombs_end_in_a_verdict_within_limits(tmp_path: Path) -> None:
    for name, path in fuzz.write_bombs(tmp_path, leave_out=LARGE):
        outcome = fuzz.try_file(name, path)
        path.unlink()
        assert outcome.verdict not in ("failed", "warned"), outcome
        assert outcome.verdict != "ok" or name == "a private tag of 2 GB", outcome
        assert outcome.seconds < SECONDS, outcome
        assert outcome.megabytes < MEGABYTES, outcome


def test_mutants_end_in_a_verdict(tmp_path: Path) -> None:
    """Five mutants of each small file; what kills or hangs a decoder would end or stop this test."""
    path, verdicts = tmp_path / "mutant", set()
    for name in fuzz.small_seeds():
        for number in range(5):
            path.write_bytes(fuzz.mutant(name, number))
            outcome = fuzz.try_file(f"{name} #{number}", path)
            assert outcome.verdict != "failed", outcome
            assert outcome.seconds < SECONDS, outcome
            verdicts.add(outcome.verdict)
    assert len(verdicts) > 5
