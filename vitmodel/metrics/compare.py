"""Comparison of models on the same units: differences with paired intervals, and DeLong's test."""

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
    """A second model compared with a first; every difference is second - first."""

    differences: dict[str, Interval]
    """Difference per metric, with percentile limits over resampled patients, the same patients for both models."""
    delong: Interval
    """Difference of the AUROCs with DeLong's limits."""
    p_value: float
    """Two-sided p-value of DeLong's test; the null hypothesis is equal AUROCs."""


def compare(
    first: ScoredUnits,
    second: ScoredUnits,
    thresholds: tuple[ArrayLike, ArrayLike],
    replicates: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Return the differences between two models' scores of the same units.

    Args:
        first: Scores of the first model.
        second: Scores of the second model, of the same units in the same order.
        thresholds: The threshold of each model: one number, or one per unit, `(N,)`.
        replicates: Number of bootstrap replicates.
        seed: Seed of the bootstrap.

    Raises:
        UsageError: The units differ, a label is unknown, or a class has fewer than two patients.
    """
    _check_same_units([first, second])
    values: list[dict[str, FloatArray]] = []
    replicated: list[FloatArray] = []
    for sample, threshold in zip((first, second), thresholds, strict=True):
        ranking = RankedUnits(sample, threshold)

        def statistic(sums: FloatArray, ranking: RankedUnits = ranking) -> list[FloatArray]:
            return list(ranking.metric_values(sums).values())

        values.append(ranking.metric_values())
        # The same seed draws the same patients for both models.
        replicated.append(resample(ranking.rows, statistic, ranking.patients, replicates, seed))
    low, high = percentile_limits(replicated[1] - replicated[0])
    differences = {}
    for k, name in enumerate(values[0]):
        difference = float(values[1][name] - values[0][name])
        differences[name] = Interval(difference, float(low[k]), float(high[k]))
    return Comparison(differences, *delong_test(first, second))


def delong_test(first: ScoredUnits, second: ScoredUnits) -> tuple[Interval, float]:
    """Return the difference second - first of two AUROCs with its 95 % interval, and the two-sided p-value.

    The p-value is NaN where the difference has no variance but is not 0.

    Raises:
        UsageError: See `delong`.
    """
    areas, covariance = delong([first, second])
    difference = float(areas[1] - areas[0])
    standard_error = float(np.sqrt(max(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1], 0)))
    if standard_error == 0:  # both models rank the units alike
        return Interval(difference, difference, difference), 1.0 if difference == 0 else np.nan
    half_width = float(norm.ppf(0.975)) * standard_error
    p_value = float(2 * norm.sf(abs(difference) / standard_error))
    return Interval(difference, difference - half_width, difference + half_width), p_value


def delong(samples: Sequence[ScoredUnits]) -> tuple[FloatArray, FloatArray]:
    """Return the AUROCs of models on the same units and their covariance, allowing for dependent units of a patient.

    With one unit per patient the covariance is DeLong's.

    Source: DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988) 837-845; for clusters Obuchowski, Biometrics 53
    (1997) 567-578; placements by midranks Sun and Xu, IEEE Signal Processing Letters 21 (2014) 1389-1393.

    Args:
        samples: The scores of M models of the same units, in the same order.

    Returns:
        The AUROCs, `(M,)`, and their covariance matrix, `(M, M)`.

    Raises:
        UsageError: The units differ, a label is unknown, or a class has fewer than two patients.
    """
    _check_same_units(samples)
    positive = samples[0].labels == 1
    _, patient_index = np.unique(samples[0].patients, return_inverse=True)
    patient_rows = group_indicator(patient_index)  # (patients, N)
    # Positive and negative units of each patient, (patients, 2).
    counts = patient_rows @ np.stack([positive, ~positive], axis=1).astype(np.float64)
    patients_with = (counts > 0).sum(axis=0)  # patients with a positive unit, patients with a negative unit
    if patients_with.min() < 2:
        raise UsageError(
            f"labels: {patients_with[0]} patients with a positive and {patients_with[1]} with a negative; "
            "DeLong's test needs two of each"
        )
    n_positive, n_negative = counts.sum(axis=0)
    scores = np.stack([sample.scores for sample in samples])  # (M, N)
    # Placement: the fraction of the other class that a unit is ranked correctly against; a tie counts one half.
    above = rankdata(scores, axis=1)
    above[:, positive] -= rankdata(scores[:, positive], axis=1)
    above[:, ~positive] -= rankdata(scores[:, ~positive], axis=1)
    placements = np.where(positive, above / n_negative, 1 - above / n_positive)
    areas = placements[:, positive].mean(axis=1)
    # For each patient and class, the sum of the units' deviations from the AUROC, (patients, M).
    of_positives = patient_rows @ (np.where(positive, placements, 0)).T - counts[:, :1] * areas
    of_negatives = patient_rows @ (np.where(positive, 0, placements)).T - counts[:, 1:] * areas
    between = len(counts) / (len(counts) - 1) * of_positives.T @ of_negatives / (n_positive * n_negative)
    within = (
        patients_with[0] / (patients_with[0] - 1) * of_positives.T @ of_positives / n_positive**2
        + patients_with[1] / (patients_with[1] - 1) * of_negatives.T @ of_negatives / n_negative**2
    )
    return areas, within + between + between.T


def _check_same_units(samples: Sequence[ScoredUnits]) -> None:
    """Raise UsageError if samples differ in labels or patients, or if a label is unknown."""
    first = samples[0]
    for sample in samples[1:]:
        same_labels = np.array_equal(sample.labels, first.labels)
        if not (same_labels and np.array_equal(sample.patients, first.patients)):
            raise UsageError(
                "models: labels or patients differ; compare models on the same units, in the same order, "
                "with the same labels"
            )
    if np.isnan(first.labels).any():
        raise UsageError("labels: some are unknown; leave units with an unknown label out before comparing")
