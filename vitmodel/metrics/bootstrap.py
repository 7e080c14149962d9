"""The patient bootstrap: how far a number would move, had other patients come. Knows no metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from vitmodel.metrics.scored_units import FloatArray

MAX_BLOCK_SUMS = 2**21
"""Sums held at once, over all replicates of a block: 16 MB."""
MIN_DEFINED = 0.9
"""Below this fraction of replicates with a value, an interval would describe a selection, and is not given."""


@dataclass(frozen=True)
class Interval:
    """A value with the limits of its 95 % percentile interval over patients; NaN = not defined on these data.

    Attributes:
        value: The metric on all units.
        low: Lower limit.
        high: Upper limit.

    Examples:
        >>> print(vitmodel.Interval(0.8, 0.75, 0.85))
        0.800 (0.750 to 0.850)
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "not defined"
        limits = "no interval" if np.isnan(self.low) else f"{self.low:z.3f} to {self.high:z.3f}"
        return f"{self.value:z.3f} ({limits})"


def resample(
    rows: ArrayLike | sparse.sparray,
    statistic: Callable[[FloatArray], ArrayLike],
    patients: ArrayLike,
    replicates: int,
    seed: int,
) -> FloatArray:
    """`statistic` of patients drawn with replacement, R K for R replicates and K numbers.

    The statistic must be a function of sums over rows: `rows` (F N) holds what each of the N rows adds to F sums, `patients` (N)
    the patient of each row, and `statistic` makes K B numbers of the sums F B of B replicates at a time. So the rows are summed
    over each patient once, and a replicate costs a product with how often its patients were drawn. All rows of a patient come and
    go together, because they are not independent. The draws depend on the seed and the number of patients alone, so that two
    statistics of the same rows can be compared in pairs.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 6 and 13.
    """
    ids, patient = np.unique(np.asarray(patients), return_inverse=True)
    per_patient = (sparse.csr_array(rows) @ group_indicator(patient).T).tocsr()  # F P
    generator = np.random.default_rng(seed)
    block = int(np.clip(MAX_BLOCK_SUMS // per_patient.shape[0], 8, 256))

    def draw() -> NDArray[np.intp]:
        return np.bincount(generator.integers(len(ids), size=len(ids)), minlength=len(ids))

    results = []
    for done in range(0, replicates, block):
        times = np.stack([draw() for _ in range(min(block, replicates - done))], axis=1).astype(np.float64)  # P B
        results.append(np.asarray(statistic(per_patient @ times), dtype=np.float64).T)
    return np.concatenate(results)


def group_indicator(groups: NDArray[np.intp]) -> sparse.csr_array:
    """G N, 1 where row n is of group g = `groups[n]`: its product with a column of values sums them over each group."""
    count = len(groups)
    return sparse.csr_array((np.ones(count), (groups, np.arange(count))))


def percentile_limits(replicates: FloatArray, coverage: float = 0.95) -> tuple[FloatArray, FloatArray]:
    """The lower and upper limits (K each) that enclose `coverage` of the replicates (R K) that have a value.

    NaN where fewer than `MIN_DEFINED` of the replicates have one.
    """
    tail = 50 * (1 - coverage)
    limits = np.full((2, replicates.shape[1]), np.nan)
    defined = np.isfinite(replicates)
    for k in np.flatnonzero(defined.mean(axis=0) >= MIN_DEFINED):
        limits[:, k] = np.percentile(replicates[defined[:, k], k], [tail, 100 - tail])
    return limits[0], limits[1]
