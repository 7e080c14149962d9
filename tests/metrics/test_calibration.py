"""Calibrations agree with scikit-learn and a direct search, also on degenerate data, and round-trip through JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit
from sklearn.calibration import _sigmoid_calibration
from sklearn.isotonic import IsotonicRegression

from vitmodel.errors import UsageError
from vitmodel.metrics.calibration import (
    CALIBRATIONS,
    Temperature,
    fit,
    from_dict,
    logistic_regression,
    platt_targets,
    to_prevalence,
)
from vitmodel.metrics.metrics import compute_metrics
from vitmodel.metrics.scored_units import ScoredUnits, to_logit


def overconfident(n: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return labels, and logits that are three times too large and one too high."""
    rng = np.random.default_rng(seed)
    true_logits = rng.normal(-1, 1.5, size=n)
    return (rng.random(n) < expit(true_logits)).astype(float), 3 * true_logits + 1


def loss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the mean log loss."""
    return float(-np.mean(labels * np.log(probabilities) + (1 - labels) * np.log1p(-probabilities)))


def test_platt_equals_scikit_learn() -> None:
    labels, logits = overconfident()
    slope, intercept = _sigmoid_calibration(logits, labels)  # as 1 / (1 + exp(slope * logit + intercept))
    ours = fit("platt", labels, logits)
    assert (ours.slope, ours.intercept) == pytest.approx((-slope, -intercept), rel=1e-3)


def test_temperature_equals_a_direct_search_for_the_lowest_loss() -> None:
    labels, logits = overconfident()
    best = minimize_scalar(lambda t: loss(platt_targets(labels), expit(logits / t)), bounds=(0.1, 20), method="bounded")
    assert fit("temperature", labels, logits).temperature == pytest.approx(best.x, rel=1e-4)


def test_isotonic_equals_scikit_learn_clipped_to_open_bounds() -> None:
    labels, logits = overconfident(300)
    reference = IsotonicRegression(out_of_bounds="clip").fit(logits, labels)
    grid = np.linspace(-20, 20, 500)
    lowest = 1 / 302
    expected = np.clip(reference.predict(grid), lowest, 1 - lowest)
    probabilities = fit("isotonic", labels, logits).apply(grid)
    np.testing.assert_allclose(probabilities, expected, atol=2 * lowest)
    assert probabilities.min() > 0


@pytest.mark.parametrize("method", CALIBRATIONS)
def test_a_calibration_lowers_the_loss_on_new_data_and_keeps_the_order(method: str) -> None:
    calibration = fit(method, *overconfident(seed=1))
    labels, logits = overconfident(seed=2)
    assert loss(labels, calibration.apply(logits)) < loss(labels, np.clip(expit(logits), 1e-7, 1 - 1e-7)) - 0.05
    assert (np.diff(calibration.apply(np.sort(logits))) >= 0).all()
    assert np.isnan(calibration.apply([np.nan, 0.0])).tolist() == [True, False]


@pytest.mark.parametrize("method", CALIBRATIONS)
def test_a_calibration_round_trips_through_json(method: str) -> None:
    calibration = fit(method, *overconfident(200))
    assert from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration


@pytest.mark.parametrize("method", CALIBRATIONS)
@pytest.mark.parametrize(
    ("labels", "logits"),
    [
        pytest.param([0, 1], [-1, 1], id="two rows"),
        pytest.param([0, 0, 0, 1, 1], [-9, -8, -7, 7, 9], id="separated"),
        pytest.param([0, 1, 0, 1], [2, 2, 2, 2], id="one logit"),
        pytest.param([1, 1, 0, 0], [-3, -2, 2, 3], id="inverted"),
        pytest.param([0, 1, 0, 1, 1], [-900, 800, 5, 700, -700], id="huge"),
        pytest.param([0, 1, np.nan], [-1, 1, 5], id="an unknown label"),
    ],
)
def test_degenerate_data_give_monotonic_probabilities_inside_0_and_1(
    method: str, labels: list[float], logits: list[float]
) -> None:
    calibration = fit(method, labels, logits)
    probabilities = calibration.apply(np.linspace(-10, 10, 50))
    assert ((probabilities > 0) & (probabilities < 1)).all()
    assert (np.diff(probabilities) >= 0).all()


def test_one_class_missing_logits_and_unknown_methods_are_refused() -> None:
    for labels, logits, message in [
        ([0, 0, np.nan], [1, 2, 3], "both classes"),
        ([0, 1, 2], [1, 2, 3], "both classes"),
        ([0, 1, 1], [1, np.nan, np.inf], "2 are NaN"),
    ]:
        with pytest.raises(UsageError, match=message):
            fit("platt", labels, logits)
    with pytest.raises(UsageError, match="'beta' is unknown"):
        fit("beta", [0, 1], [0, 1])
    with pytest.raises(UsageError, match="temprature"):
        from_dict({"method": "temperature", "prevalence": 0.5, "temprature": 1})


def test_temperature_1_changes_nothing() -> None:
    np.testing.assert_allclose(Temperature(prevalence=0.5, temperature=1).apply(to_logit([0.1, 0.9])), [0.1, 0.9])


def test_a_calibrated_sample_has_slope_1_and_intercept_0() -> None:
    labels, logits = overconfident()
    probabilities = fit("platt", labels, logits).apply(logits)
    sample = ScoredUnits(labels, probabilities, np.arange(len(labels)))
    intervals = compute_metrics(sample, threshold=0.5, replicates=50).intervals
    assert intervals["calibration_slope"].value == pytest.approx(1, abs=0.01)
    assert intervals["calibration_intercept"].value == pytest.approx(0, abs=0.01)
    assert intervals["calibration_slope"].low < 1 < intervals["calibration_slope"].high


def test_newton_reaches_the_maximum_from_a_bad_start() -> None:
    labels, logits = overconfident(500)
    ones = np.ones(500)
    design = np.stack([logits, ones])
    from_zero = logistic_regression(design, design @ labels, ones)
    from_bad_start = logistic_regression(design, design @ labels, ones, start=np.array([2.0, 9.0]))
    np.testing.assert_allclose(from_bad_start, from_zero, rtol=1e-6)
    np.testing.assert_allclose(design @ (labels - expit(from_zero @ design)), 0, atol=1e-6)


def test_another_prevalence_shifts_the_logit_and_calibrates_for_the_new_mix() -> None:
    probabilities = np.array([0.0, 0.02, 0.5, 0.98, 1.0, np.nan])
    shifted = to_prevalence(probabilities, fitted=0.5, wanted=0.02)
    np.testing.assert_allclose(shifted[1:4], expit(to_logit(probabilities[1:4]) + to_logit(0.02) - to_logit(0.5)))
    assert shifted[0] == 0
    assert shifted[4] == 1
    assert np.isnan(shifted[5])
    # Normally distributed scores x around -1 and 1 have the log-likelihood ratio 2 x at any prevalence (Bayes' rule).
    rng = np.random.default_rng(0)
    labels = (rng.random(200_000) < 0.02).astype(float)
    balanced = expit(2 * rng.normal(2 * labels - 1))
    assert balanced.mean() > 0.1
    assert to_prevalence(balanced, fitted=0.5, wanted=0.02).mean() == pytest.approx(0.02, abs=0.001)
    with pytest.raises(UsageError, match="wanted prevalence"):
        to_prevalence(probabilities, 0.5, 0)
