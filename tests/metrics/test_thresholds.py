"""Thresholds agree with an exhaustive search, and cross-fitted ones do not depend on the rows they are applied to."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as peer
from scipy.special import expit

from vitmodel.errors import UsageError
from vitmodel.metrics.crossfit import (
    cross_fitted_probabilities,
    cross_fitted_thresholds,
    cross_select,
    patient_folds,
)
from vitmodel.metrics.metrics import compute_metrics
from vitmodel.metrics.scored_units import ScoredUnits
from vitmodel.metrics.threshold import choose_threshold


def calibrated(patients: int, seed: int = 0, shift: float = -2.0) -> ScoredUnits:
    """Return four rows per patient whose scores are calibrated: the probability of a positive label."""
    rng = np.random.default_rng(seed)
    scores = expit(rng.normal(shift, 1.5, size=4 * patients))
    return ScoredUnits((rng.random(len(scores)) < scores).astype(float), scores, np.repeat(np.arange(patients), 4))


@pytest.mark.parametrize("seed", range(6))
def test_the_threshold_agrees_with_an_exhaustive_search(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = (rng.random(120) < rng.choice([0.1, 0.5])).astype(float)
    labels[:2] = 0, 1
    scores = expit(rng.normal(2 * labels - 1, 1.5))
    scores = np.round(scores, 1) if seed % 2 == 0 else scores
    objectives = {
        "f1": peer.f1_score,
        "macro_f1": lambda y, called: peer.f1_score(y, called, average="macro"),
        "youden": peer.balanced_accuracy_score,
    }
    for objective, score in objectives.items():
        best = max(score(labels, scores >= threshold) for threshold in np.unique(scores))
        threshold = choose_threshold(labels, scores, objective)
        assert score(labels, scores >= threshold) == pytest.approx(best)
        assert 0 <= threshold <= 1
    for wanted in (0.8, 1.0):
        reached = [t for t in np.unique(scores) if peer.recall_score(labels, scores >= t) >= wanted]
        called = scores >= choose_threshold(labels, scores, "sensitivity", wanted)
        np.testing.assert_array_equal(called, scores >= max(reached))


def test_on_calibrated_scores_the_threshold_for_pf1_is_half_of_the_best_f1() -> None:
    sample = calibrated(10_000)
    best = max(peer.f1_score(sample.labels, sample.scores >= t) for t in np.linspace(0.05, 0.6, 56))
    assert choose_threshold(sample.labels, sample.scores, "pf1") == pytest.approx(best / 2, abs=0.01)
    assert choose_threshold(sample.labels, sample.scores, "f1") == pytest.approx(best / 2, abs=0.03)
    expected_f1 = []
    for threshold in sample.scores[:500]:
        called = sample.scores >= threshold
        expected_f1.append(2 * sample.scores[called].sum() / (called.sum() + sample.scores.sum()))
    assert choose_threshold(sample.labels, sample.scores, "pf1") >= max(expected_f1) / 2 - 1e-12


def test_a_threshold_is_halfway_between_scores_where_rounding_allows() -> None:
    assert choose_threshold([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.8]) == pytest.approx(0.4)
    close = np.nextafter(0.5, 0)
    assert choose_threshold([0, 1], [close, 0.5]) == 0.5


def test_one_class_and_an_unknown_objective_are_refused() -> None:
    for labels in ([0, 0], [np.nan, 1]):
        with pytest.raises(UsageError, match="both classes"):
            choose_threshold(labels, [0.1, 0.2])
    with pytest.raises(UsageError, match="g1"):
        choose_threshold([0, 1], [0.1, 0.2], "g1")


def test_folds_split_no_patient_and_distribute_the_classes_evenly() -> None:
    sample = calibrated(203)
    fold = patient_folds(sample)
    assert all(len(np.unique(fold[sample.patients == patient])) == 1 for patient in range(203))
    positive_patients = []
    for number in range(5):
        rows = (fold == number) & (sample.labels == 1)
        positive_patients.append(len(np.unique(sample.patients[rows])))
    assert max(positive_patients) - min(positive_patients) <= 1
    assert set(patient_folds(ScoredUnits([0, 1, 0, 1, 0], [0.1] * 5, list("abcde")))) == {0, 1}
    with pytest.raises(UsageError, match="1 patients with a positive and 2 without"):
        patient_folds(ScoredUnits([0, 1, 0], [0.1, 0.2, 0.3], list("abc")))


@pytest.mark.parametrize("objective", ["f1", "pf1", "sensitivity"])
def test_a_cross_fitted_threshold_does_not_depend_on_its_own_rows(objective: str) -> None:
    """A change of the scores in one fold leaves the threshold of this fold unchanged."""
    sample = calibrated(100)
    thresholds = cross_fitted_thresholds(sample, objective)
    changed = patient_folds(sample) == 2
    scores = np.where(changed, 1 - sample.scores, sample.scores)
    changed_sample = ScoredUnits(sample.labels, scores, sample.patients)
    changed_thresholds = cross_fitted_thresholds(changed_sample, objective)
    assert (changed_thresholds[changed] == thresholds[changed]).all()
    assert len(np.unique(thresholds)) > 1


def test_noise_scores_have_no_youden_index_at_cross_fitted_thresholds() -> None:
    """A threshold chosen on its own rows makes noise look informative; a cross-fitted one does not."""
    own = []
    crossed = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        sample = ScoredUnits((rng.random(60) < 0.5).astype(float), rng.random(60), np.arange(60))
        own.append(youden_index(sample, choose_threshold(sample.labels, sample.scores, "youden")))
        crossed.append(youden_index(sample, cross_fitted_thresholds(sample, "youden")))
    assert np.mean(own) > 0.15
    assert abs(np.mean(crossed)) < 0.08


def youden_index(sample: ScoredUnits, threshold: float | np.ndarray) -> float:
    """Return sensitivity + specificity - 1."""
    intervals = compute_metrics(sample, threshold, replicates=2).intervals
    return intervals["sensitivity"].value + intervals["specificity"].value - 1


@pytest.mark.parametrize("method", ["temperature", "platt", "isotonic"])
def test_cross_fitted_calibration_corrects_the_slope(method: str) -> None:
    sample = calibrated(1500, shift=0.0)
    extreme = ScoredUnits(sample.labels, expit(3 * np.log(sample.scores / (1 - sample.scores))), sample.patients)
    recalibrated = ScoredUnits(sample.labels, cross_fitted_probabilities(extreme, method), sample.patients)
    before = compute_metrics(extreme, 0.5, replicates=2).intervals
    after = compute_metrics(recalibrated, 0.5, replicates=2).intervals
    assert before["calibration_slope"].value < 0.5
    assert after["calibration_slope"].value == pytest.approx(1, abs=0.1)
    assert after["log_loss"].value < before["log_loss"].value


def test_each_half_gets_the_candidate_that_the_other_half_chooses() -> None:
    candidates = np.array([[1.0, 2.0, 3.0, 4.0], [9.0, 9.0, 0.0, 0.0]])
    folds = np.array([0, 0, 1, 1])

    figures = np.stack([candidates[:, folds != fold].sum(axis=1) for fold in (0, 1)], axis=1)
    np.testing.assert_array_equal(figures, [[7, 3], [0, 18]])
    np.testing.assert_array_equal(cross_select(candidates, folds, figures), [1.0, 2.0, 0.0, 0.0])
    with pytest.raises(UsageError, match="one class only"):
        cross_select(candidates, folds, np.array([[1.0, np.nan], [2.0, np.nan]]))
