"""Thresholds are those of a full search, and cross-fitted ones never know the rows that they are used on."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as peer
from scipy.special import expit

from vitmodel.errors import UsageError
from vitmodel.metrics.crossfit import cross_fitted_probabilities, cross_fitted_thresholds, patient_folds
from vitmodel.metrics.metrics import compute_metrics
from vitmodel.metrics.scored_units import ScoredUnits
from vitmodel.metrics.threshold import choose_threshold


def calibrated(patients: int, seed: int = 0, shift: float = -2.0) -> ScoredUnits:
    """Four rows for each patient, whose scores are their probabilities."""
    rng = np.random.default_rng(seed)
    scores = expit(rng.normal(shift, 1.5, size=4 * patients))
    return ScoredUnits((rng.random(len(scores)) < scores).astype(float), scores, np.repeat(np.arange(patients), 4))


@pytest.mark.parametrize("seed", range(6))
def test_the_best_threshold_is_that_of_a_full_search(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = (rng.random(120) < rng.choice([0.1, 0.5])).astype(float)
    labels[:2] = 0, 1
    scores = expit(rng.normal(2 * labels - 1, 1.5))
    scores = np.round(scores, 1) if seed % 2 == 0 else scores
    for objective, score in {
        "f1": peer.f1_score,
        "macro_f1": lambda y, called: peer.f1_score(y, called, average="macro"),
        "youden": peer.balanced_accuracy_score,
    }.items():
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
    by_search = [
        2 * sample.scores[sample.scores >= t].sum() / ((sample.scores >= t).sum() + sample.scores.sum())
        for t in sample.scores[:500]
    ]
    assert choose_threshold(sample.labels, sample.scores, "pf1") >= max(by_search) / 2 - 1e-12


def test_a_threshold_stands_clear_of_the_scores_beside_it() -> None:
    assert choose_threshold([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.8]) == pytest.approx(0.4)
    close = np.nextafter(0.5, 0)
    assert choose_threshold([0, 1], [close, 0.5]) == 0.5
    for labels, message in [([0, 0], "both classes"), ([np.nan, 1], "both classes")]:
        with pytest.raises(UsageError, match=message):
            choose_threshold(labels, [0.1, 0.2])
    with pytest.raises(UsageError, match="g1"):
        choose_threshold([0, 1], [0.1, 0.2], "g1")


def test_folds_divide_no_patient_and_share_out_the_classes() -> None:
    sample = calibrated(203)
    fold = patient_folds(sample)
    assert all(len(np.unique(fold[sample.patients == patient])) == 1 for patient in range(203))
    sick = [len(np.unique(sample.patients[(fold == f) & (sample.labels == 1)])) for f in range(5)]
    assert max(sick) - min(sick) <= 1
    assert set(patient_folds(ScoredUnits([0, 1, 0, 1, 0], [0.1] * 5, list("abcde")))) == {0, 1}
    with pytest.raises(UsageError, match="1 patients with a positive and 2 without"):
        patient_folds(ScoredUnits([0, 1, 0], [0.1, 0.2, 0.3], list("abc")))


@pytest.mark.parametrize("objective", ["f1", "pf1", "sensitivity"])
def test_a_cross_fitted_threshold_does_not_know_its_own_rows(objective: str) -> None:
    """Whatever becomes of a fold's labels and scores, the threshold that the fold is judged by stays."""
    sample, fold = calibrated(100), patient_folds(calibrated(100))
    thresholds = cross_fitted_thresholds(sample, objective)
    here = fold == 2
    scores = np.where(here, 1 - sample.scores, sample.scores)
    assert (
        cross_fitted_thresholds(ScoredUnits(sample.labels, scores, sample.patients), objective)[here]
        == thresholds[here]
    ).all()
    assert len(np.unique(thresholds)) > 1


def test_scores_of_noise_gain_nothing_by_cross_fitting() -> None:
    """The threshold that is best on its own rows flatters noise; a cross-fitted one does not."""
    own, crossed = [], []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        sample = ScoredUnits((rng.random(60) < 0.5).astype(float), rng.random(60), np.arange(60))
        own.append(compute_metrics(sample, choose_threshold(sample.labels, sample.scores, "youden"), 2).intervals)
        crossed.append(compute_metrics(sample, cross_fitted_thresholds(sample, "youden"), 2).intervals)
    gain = [np.mean([i["sensitivity"].value + i["specificity"].value - 1 for i in each]) for each in (own, crossed)]
    assert gain[0] > 0.15
    assert abs(gain[1]) < 0.08


@pytest.mark.parametrize("method", ["temperature", "platt", "isotonic"])
def test_cross_fitted_calibration_mends_the_slope(method: str) -> None:
    sample = calibrated(1500, shift=0.0)
    extreme = ScoredUnits(sample.labels, expit(3 * np.log(sample.scores / (1 - sample.scores))), sample.patients)
    before, after = (
        compute_metrics(ScoredUnits(sample.labels, scores, sample.patients), 0.5, 2).intervals
        for scores in (extreme.scores, cross_fitted_probabilities(extreme, method))
    )
    assert before["calibration_slope"].value < 0.5
    assert after["calibration_slope"].value == pytest.approx(1, abs=0.1)
    assert after["log_loss"].value < before["log_loss"].value
