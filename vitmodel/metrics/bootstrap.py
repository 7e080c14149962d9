"""Patient bootstrap: resampled statistics and percentile intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from vitmodel.metrics.scored_units import FloatArray

MAX_BLOCK_SUMS = 2**21
"""Maximum number of sums held at once, over all replicates of a block: 16 MB."""
MIN_DEFINED = 0.9
"""Minimum fraction of replicates with a value. Below it an interval would describe a selection, so none is given."""


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
    """Return a statistic on bootstrap replicates that draw patients with replacement.

    The statistic must be a function of sums over rows. The rows of each patient are summed once; a replicate then
    costs one product with the number of times each patient was drawn. All rows of a patient are drawn together,
    because they are not independent. The draws depend only on the seed and the number of patients, so two statistics
    of the same rows can be compared in pairs.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 6 and 13.

    Args:
        rows: The contribution of each of N rows to F sums, `(F, N)`, dense or sparse.
        statistic: A function from the sums of B replicates, `(F, B)`, to K values each, `(K, B)`.
        patients: The patient of each row, `(N,)`.
        replicates: Number of replicates R.
        seed: Seed of the draws.

    Returns:
        The statistic of each replicate, `(R, K)`.
    """
    ids, patient_index = np.unique(np.asarray(patients), return_inverse=True)
    patient_sums = (sparse.csr_array(rows) @ group_indicator(patient_index).T).tocsr()  # (F, patients)
    generator = np.random.default_rng(seed)
    block_size = int(np.clip(MAX_BLOCK_SUMS // patient_sums.shape[0], 8, 256))

    def draw_counts() -> NDArray[np.intp]:
        return np.bincount(generator.integers(len(ids), size=len(ids)), minlength=len(ids))

    results = []
    for start in range(0, replicates, block_size):
        draws = [draw_counts() for _ in range(min(block_size, replicates - start))]
        counts = np.stack(draws, axis=1).astype(np.float64)  # (patients, B)
        results.append(np.asarray(statistic(patient_sums @ counts), dtype=np.float64).T)
    return np.concatenate(results)


def group_indicator(groups: NDArray[np.intp]) -> sparse.csr_array:
    """Return the sparse matrix `(G, N)` with a 1 where row n belongs to group g = `groups[n]`.

    Its product with a column of values sums them over each group.
    """
    count = len(groups)
    return sparse.csr_array((np.ones(count), (groups, np.arange(count))))


def percentile_limits(replicates: FloatArray, coverage: float = 0.95) -> tuple[FloatArray, FloatArray]:
    """Return the limits that enclose the central part of the replicates that have a value.

    Args:
        replicates: Values of R replicates of K statistics, `(R, K)`; NaN = not defined.
        coverage: Fraction of the replicates between the limits.

    Returns:
        The lower and the upper limits, `(K,)` each; NaN where fewer than `MIN_DEFINED` of the replicates have a value.
    """
    tail = 50 * (1 - coverage)
    limits = np.full((2, replicates.shape[1]), np.nan)
    defined = np.isfinite(replicates)
    for k in np.flatnonzero(defined.mean(axis=0) >= MIN_DEFINED):
        limits[:, k] = np.percentile(replicates[defined[:, k], k], [tail, 100 - tail])
    return limits[0], limits[1]
