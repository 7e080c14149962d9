"""The patient bootstrap: how far a number would move, had other patients come. Knows no metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from vitmodel.measure.sample import Floats

MIN_DEFINED = 0.9
"""Below this fraction of replicates with a value, an interval would describe a selection, and is not given."""


@dataclass(frozen=True)
class Interval:
    """A value with the limits of its percentile interval; NaN = not defined on these data."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def resample(statistic: Callable[[Floats], ArrayLike], patients: ArrayLike, replicates: int, seed: int) -> Floats:
    """`statistic` of patients drawn with replacement, R K for R replicates and K numbers.

    `patients` (N) holds the patient of each row; `statistic` is called with the weight (N) of each row: how often its
    patient was drawn. All rows of a patient come and go together, because they are not independent. The draws depend on
    the seed and the number of patients alone, so that two statistics of the same rows can be compared in pairs.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 6 and 13.
    """
    ids, patient = np.unique(np.asarray(patients), return_inverse=True)
    generator = np.random.default_rng(seed)

    def draw() -> Floats:
        times = np.bincount(generator.integers(len(ids), size=len(ids)), minlength=len(ids))
        return times.astype(np.float64)[patient]

    return np.array([np.asarray(statistic(draw()), dtype=np.float64) for _ in range(replicates)])


def percentile_limits(replicates: Floats, coverage: float = 0.95) -> tuple[Floats, Floats]:
    """The lower and upper limits (K each) that enclose `coverage` of the replicates (R K) that have a value.

    NaN where fewer than `MIN_DEFINED` of the replicates have one.
    """
    tail = 50 * (1 - coverage)
    limits = np.full((2, replicates.shape[1]), np.nan)
    defined = np.isfinite(replicates)
    for k in np.flatnonzero(defined.mean(axis=0) >= MIN_DEFINED):
        limits[:, k] = np.percentile(replicates[defined[:, k], k], [tail, 100 - tail])
    return limits[0], limits[1]
