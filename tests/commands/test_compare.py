"""DeLong's covariance equals its definition, and paired intervals use the correlation of models on the same units."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from vitmodel.errors import UsageError
from vitmodel.metrics.bootstrap import resample
from vitmodel.metrics.compare import compare, delong, delong_test
from vitmodel.metrics.metrics import RankedUnits
from vitmodel.metrics.scored_units import ScoredUnits


def readers(patients: int, units: int, seed: int, gain: float = 0.0) -> list[ScoredUnits]:
    """Return the scores of two correlated models on the same units; scores are rounded, so that some are tied.

    `gain` is added to the score of positive units by the second model only, before noise and rounding.
    """
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), units)
    labels = (rng.random(len(patient)) < 0.3).astype(float)
    shared = labels + rng.normal(size=len(patient)) + np.repeat(rng.normal(size=patients), units)
    samples = []
    for extra in (0, gain):
        scores = np.round(expit(shared + extra * labels + 0.5 * rng.normal(size=len(patient))), 2)
        samples.append(ScoredUnits(labels, scores, patient))
    return samples


def placements(sample: ScoredUnits) -> np.ndarray:
    """Return the kernel of the AUROC for each positive and each negative `(P, N)`: 1 above, 0.5 tied, 0 below."""
    positives = sample.scores[sample.labels == 1]
    negatives = sample.scores[sample.labels == 0]
    return (positives[:, None] > negatives) + 0.5 * (positives[:, None] == negatives)


def by_definition(samples: list[ScoredUnits]) -> np.ndarray:
    """Return Obuchowski's covariance, equations 2 to 5 of the paper, by loops over models and clusters."""
    labels = samples[0].labels
    patients = samples[0].patients
    ones = np.flatnonzero(labels == 1)
    zeros = np.flatnonzero(labels == 0)
    v10, v01, area = [], [], []
    for sample in samples:
        psi = placements(sample)
        v10.append(psi.mean(axis=1))
        v01.append(psi.mean(axis=0))
        area.append(psi.mean())
    clusters = np.unique(patients)
    m, n = len(ones), len(zeros)
    with_ones, with_zeros = len(np.unique(patients[ones])), len(np.unique(patients[zeros]))
    result = np.zeros((len(samples), len(samples)))
    for r in range(len(samples)):
        for s in range(len(samples)):
            s10 = s01 = s11 = s11_transposed = 0.0
            for cluster in clusters:
                a = patients[ones] == cluster
                b = patients[zeros] == cluster
                positive = [v10[k][a].sum() - a.sum() * area[k] for k in (r, s)]
                negative = [v01[k][b].sum() - b.sum() * area[k] for k in (r, s)]
                s10 += positive[0] * positive[1]
                s01 += negative[0] * negative[1]
                s11 += positive[0] * negative[1]
                s11_transposed += positive[1] * negative[0]
            s10 *= with_ones / ((with_ones - 1) * m)
            s01 *= with_zeros / ((with_zeros - 1) * n)
            scale = len(clusters) / (len(clusters) - 1)
            result[r, s] = s10 / m + s01 / n + scale * (s11 + s11_transposed) / (m * n)
    return result


@pytest.mark.parametrize(("patients", "units"), [(40, 1), (25, 3)])
def test_the_covariance_equals_its_definition(patients: int, units: int) -> None:
    for seed in range(3):
        samples = readers(patients, units, seed)
        areas, covariance = delong(samples)
        assert areas == pytest.approx([roc_auc_score(sample.labels, sample.scores) for sample in samples])
        np.testing.assert_allclose(covariance, by_definition(samples), rtol=1e-9)


def test_with_one_unit_per_patient_the_variance_equals_delongs() -> None:
    """The reference is the variance of the placements as in DeLong's paper, computed by numpy."""
    sample = readers(60, 1, seed=4)[0]
    psi = placements(sample)
    positives, negatives = psi.shape
    expected = psi.mean(axis=1).var(ddof=1) / positives + psi.mean(axis=0).var(ddof=1) / negatives
    assert delong([sample])[1][0, 0] == pytest.approx(expected)


def test_delong_and_the_bootstrap_agree_on_clustered_units() -> None:
    sample = readers(400, 4, seed=1)[0]
    ranking = RankedUnits(sample, 0.5)
    spread = resample(ranking.rows, lambda sums: [ranking.curve(sums).auroc()], ranking.patients, 1000, 0).std()
    assert delong([sample])[1][0, 0] ** 0.5 == pytest.approx(spread, rel=0.1)


def test_p_values_are_uniform_for_equal_models_and_small_for_a_better_one() -> None:
    equal = np.array([delong_test(*readers(80, 2, seed))[1] for seed in range(200)])
    assert 0.01 < (equal < 0.05).mean() < 0.1
    assert 0.4 < (equal < 0.5).mean() < 0.6
    assert np.median([delong_test(*readers(80, 2, seed, gain=2.0))[1] for seed in range(20)]) < 0.01


def test_a_paired_interval_is_narrower_than_that_of_one_model() -> None:
    first, second = readers(150, 2, seed=0)
    comparison = compare(first, second, (0.5, 0.5), replicates=500)
    difference = comparison.differences["auroc"]
    single_width = delong([first])[1][0, 0] ** 0.5 * 2 * 1.96
    assert difference.high - difference.low < 0.8 * single_width
    limits = (comparison.delong.low, comparison.delong.high)
    assert limits == pytest.approx((difference.low, difference.high), abs=0.25 * single_width)
    same = compare(first, first, (0.5, 0.5), replicates=100)
    assert (same.delong.value, same.p_value) == (0, 1)
    assert all(interval.low == interval.high == 0 for interval in same.differences.values())


def test_samples_of_different_units_are_refused() -> None:
    first, second = readers(20, 2, seed=0)
    reversed_units = ScoredUnits(second.labels[::-1], second.scores[::-1], second.patients[::-1])
    with pytest.raises(UsageError, match="same units"):
        compare(first, reversed_units, (0.5, 0.5), 100)
    with pytest.raises(UsageError, match="two of each"):
        delong_test(*[ScoredUnits([0, 0, 1], [0.1, 0.2, 0.3], list("abc"))] * 2)
