"""The population stability index: its value, and what chance gives."""

from __future__ import annotations

import numpy as np
import pytest

from vitmodel.metrics.stability import population_stability


def test_the_index_is_the_sum_of_both_divergences() -> None:
    reference, observed = np.array([4000, 3000, 3000]), np.array([1000, 2000, 7000])
    p, q = reference / reference.sum(), observed / observed.sum()
    expected = np.sum(p * np.log(p / q)) + np.sum(q * np.log(q / p))
    found = population_stability(reference, observed, (10000, 10000))
    assert found.index == pytest.approx(expected, rel=1e-3)
    assert found.verdict == "large"


def test_without_drift_mean_and_limit_are_those_of_repeated_samples() -> None:
    rng = np.random.default_rng(0)
    shares = np.full(10, 0.1)
    pairs = [(rng.multinomial(1500, shares), rng.multinomial(400, shares)) for _ in range(3000)]
    results = [population_stability(reference, observed, (1500, 400)) for reference, observed in pairs]
    indices = np.array([result.index for result in results])
    assert indices.mean() == pytest.approx(results[0].chance, rel=0.05)
    assert (indices > results[0].limit).mean() == pytest.approx(0.01, abs=0.008)


def test_few_patients_are_not_enough_to_call_a_drift_large() -> None:
    reference = np.array([100, 100, 100, 100])
    observed = np.array([4, 0, 1, 0])
    assert population_stability(reference, observed, (400, 5)).index > 0.25
    assert population_stability(reference, observed, (400, 5)).verdict == "undecided"
    assert population_stability(reference, 100 * observed, (400, 500)).verdict == "large"


def test_equal_histograms_have_the_index_0() -> None:
    counts = np.array([5, 0, 20])
    assert population_stability(counts, counts, (25, 25)).index == 0
