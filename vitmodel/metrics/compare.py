"""Two or more models on the same units: differences with paired intervals, and DeLong's test. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm, rankdata

from vitmodel.errors import UsageError
from vitmodel.metrics.bootstrap import Interval, group_indicator, percentile_limits, resample
from vitmodel.metrics.metrics import RankedUnits
from vitmodel.metrics.scored_units import FloatArray, ScoredUnits


@dataclass(frozen=True)
class Comparison:
    """A second model against a first; every difference is second - first."""

    differences: dict[str, Interval]
    """By metric, with percentile limits over patients drawn with replacement, the same patients for both."""
    delong: Interval
    """The difference of the AUROCs with DeLong's limits."""
    p_value: float
    """DeLong's two-sided test of no difference of the AUROCs."""


def compare(
    first: ScoredUnits,
    second: ScoredUnits,
    thresholds: tuple[ArrayLike, ArrayLike],
    replicates: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Two models' scores of the same units in the same order, each judged at its own threshold (one, or N). Raises UsageError."""
    _refuse_other_units([first, second])
    values, replicated = [], []
    for sample, threshold in zip((first, second), thresholds, strict=True):
        ranking = RankedUnits(sample, threshold)

        def statistic(sums: FloatArray, ranking: RankedUnits = ranking) -> list[FloatArray]:
            return list(ranking.metric_values(sums).values())

        values.append(ranking.metric_values())
        replicated.append(
            resample(ranking.rows, statistic, ranking.patients, replicates, seed)
        )  # the seed draws the same patients
    low, high = percentile_limits(replicated[1] - replicated[0])
    names = list(values[0])
    differences = {
        name: Interval(float(values[1][name] - values[0][name]), float(low[k]), float(high[k]))
        for k, name in enumerate(names)
    }
    return Comparison(differences, *delong_test(first, second))


def delong_test(first: ScoredUnits, second: ScoredUnits) -> tuple[Interval, float]:
    """The difference second - first of two AUROCs on the same units with its 95 % interval, and the two-sided p value."""
    areas, covariance = delong([first, second])
    difference = float(areas[1] - areas[0])
    error = float(np.sqrt(max(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1], 0)))
    if error == 0:  # one ranking is the other's
        return Interval(difference, difference, difference), 1.0 if difference == 0 else np.nan
    reach = float(norm.ppf(0.975)) * error
    return Interval(difference, difference - reach, difference + reach), float(2 * norm.sf(abs(difference) / error))


def delong(samples: Sequence[ScoredUnits]) -> tuple[FloatArray, FloatArray]:
    """The AUROCs (M) of M models on the same units, and their covariance (M M) where a patient's units depend on each other.

    With one unit per patient it is DeLong's; it needs two patients with each label. Raises UsageError.

    Source: DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988) 837-845; for clusters Obuchowski, Biometrics 53 (1997) 567-578;
    placements by midranks Sun and Xu, IEEE Signal Processing Letters 21 (2014) 1389-1393.
    """
    _refuse_other_units(samples)
    positive = samples[0].labels == 1
    _, patient = np.unique(samples[0].patients, return_inverse=True)
    owners = group_indicator(patient)  # P N
    counts = owners @ np.stack([positive, ~positive], axis=1).astype(np.float64)  # P 2
    holders = (counts > 0).sum(axis=0)  # patients with a positive, with a negative
    if holders.min() < 2:
        raise UsageError(
            f"labels: {holders[0]} patients with a positive and {holders[1]} with a negative; DeLong's test needs two of each"
        )
    ones, zeros = counts.sum(axis=0)
    scores = np.stack([sample.scores for sample in samples])  # M N
    # The fraction of the other class that each unit is ranked rightly against; ties count half.
    above = rankdata(scores, axis=1)
    above[:, positive] -= rankdata(scores[:, positive], axis=1)
    above[:, ~positive] -= rankdata(scores[:, ~positive], axis=1)
    placed = np.where(positive, above / zeros, 1 - above / ones)
    areas = placed[:, positive].mean(axis=1)
    # Per patient, the sum of its units' deviations from the area: P M.
    sick = owners @ (np.where(positive, placed, 0)).T - counts[:, :1] * areas
    well = owners @ (np.where(positive, 0, placed)).T - counts[:, 1:] * areas
    both = len(counts) / (len(counts) - 1) * sick.T @ well / (ones * zeros)
    within = (
        holders[0] / (holders[0] - 1) * sick.T @ sick / ones**2
        + holders[1] / (holders[1] - 1) * well.T @ well / zeros**2
    )
    return areas, within + both + both.T


def _refuse_other_units(samples: Sequence[ScoredUnits]) -> None:
    for sample in samples[1:]:
        same = all(np.array_equal(getattr(sample, name), getattr(samples[0], name)) for name in ("labels", "patients"))
        if not same:
            raise UsageError("models can only be compared on the same units, in the same order, with the same labels")
    if np.isnan(samples[0].labels).any():
        raise UsageError("labels: leave units with an unknown label out before comparing")
