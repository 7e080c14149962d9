"""Keys of jobs, and when a failed attempt is repeated (pure functions)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable


def job_key(images: Iterable[str], fingerprint: str) -> str:
    """Return the unique key of a job.

    Args:
        images: SOP Instance UIDs, in any order; repeats do not matter.
        fingerprint: Fingerprint of the package and of the options that influence a score.
    """
    return hashlib.sha256("\n".join([*sorted(set(images)), fingerprint]).encode()).hexdigest()


def back_off(attempt: int, first: float, longest: float, rng: random.Random) -> float:
    """Return the seconds to wait after an attempt has failed.

    The wait doubles with every attempt. It is drawn from the upper half of the interval, so that jobs that failed
    together do not return together ("equal jitter" of the AWS architecture blog, 2015).

    Args:
        attempt: Number of failed attempts, 1 or more.
        first: Longest wait after the first attempt in seconds.
        longest: Longest wait at all in seconds.
        rng: Source of the jitter.
    """
    full = min(longest, first * 2 ** min(attempt - 1, 62))
    return full / 2 + rng.uniform(0, full / 2)
