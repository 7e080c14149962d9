"""Metrics agree with scikit-learn and torchmetrics on fuzzed scores with ties; intervals are over patients."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import sklearn.metrics as peer
import torch
import torchmetrics.functional.classification as torch_peer
from sklearn.linear_model import LogisticRegression

from vitmodel.errors import UsageError
from vitmodel.metrics.bootstrap import Interval, percentile_limits, resample
from vitmodel.metrics.curve import MAX_FPR
from vitmodel.metrics.metrics import ECE_BINS, KNOTS, METRICS, RankedUnits, compute_metrics, pf1
from vitmodel.metrics.scored_units import ScoredUnits, aggregate, to_logit


def fuzzed(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores of 12 to 300 rows with both classes: the even seeds give many ties, some also scores of 0 and 1."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(12, 300))
    labels = (rng.random(n) < rng.choice([0.05, 0.3, 0.7])).astype(float)
    labels[:2] = 0, 1
    scores = 1 / (1 + np.exp(-rng.normal(2 * labels - 1, 1.5)))
    return labels, np.round(scores, 1) if seed % 2 == 0 else scores


@pytest.mark.parametrize("seed", range(24))
def test_agrees_with_scikit_learn_and_torchmetrics_under_any_weights(seed: int) -> None:
    labels, scores = fuzzed(seed)
    threshold = 0.3  # a value that ties reach
    times = np.random.default_rng(seed).integers(0, 4, size=len(labels))
    times[:2] = 1  # both classes stay
    ours = RankedUnits(ScoredUnits(labels, scores, np.arange(len(labels))), threshold)
    ours_values = ours.metric_values(ours.rows @ times[np.argsort(-scores, kind="stable")].astype(float))
    y, p = np.repeat(labels, times), np.repeat(scores, times)  # a weight of k is k equal rows
    called = p >= threshold
    tensors = torch.from_numpy(p), torch.from_numpy(y).long()
    assert list(ours_values) == [name for group in METRICS.values() for name in group]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of what we make NaN
        expected = {
            "auroc": peer.roc_auc_score(y, p),
            "partial_auroc": peer.roc_auc_score(y, p, max_fpr=MAX_FPR),
            "auprc": peer.average_precision_score(y, p),
            "sensitivity_at_90_specificity": torch_peer.binary_sensitivity_at_specificity(*tensors, 0.90 - 1e-6)[0],
            "sensitivity_at_95_specificity": torch_peer.binary_sensitivity_at_specificity(*tensors, 0.95 - 1e-6)[0],
            "specificity_at_90_sensitivity": torch_peer.binary_specificity_at_sensitivity(*tensors, 0.90 - 1e-6)[0],
            "specificity_at_95_sensitivity": torch_peer.binary_specificity_at_sensitivity(*tensors, 0.95 - 1e-6)[0],
            "sensitivity": peer.recall_score(y, called),
            "specificity": peer.recall_score(1 - y, ~called),
            "precision": peer.precision_score(y, called, zero_division=np.nan),
            "npv": peer.precision_score(1 - y, ~called, zero_division=np.nan),
            "accuracy": peer.accuracy_score(y, called),
            "f1": peer.f1_score(y, called),
            "macro_f1": peer.f1_score(y, called, average="macro"),
            "recall_rate": called.mean(),
            "pf1": pf1(y, p),
            "brier": peer.brier_score_loss(y, p),
            "log_loss": peer.log_loss(y, p),
        }
    for name, value in expected.items():
        assert ours_values[name] == pytest.approx(float(value), abs=1e-6, nan_ok=True), name
    # torchmetrics bins in single precision, so that a score on a bin's edge may fall to either side
    ece = (
        float(torch_peer.binary_calibration_error(*tensors, n_bins=ECE_BINS))
        if seed % 2
        else calibration_error_of_tenths(y, p)
    )
    assert ours_values["ece"] == pytest.approx(ece, abs=1e-6)
    slope = LogisticRegression(C=np.inf, tol=1e-10).fit(to_logit(p)[:, None], y).coef_[0, 0]
    assert ours_values["calibration_slope"] == pytest.approx(slope, rel=1e-3)
    # At the maximum of the likelihood the corrected scores have the mean of the labels.
    corrected = 1 / (1 + np.exp(-to_logit(p) - ours_values["calibration_intercept"]))
    assert corrected.mean() == pytest.approx(y.mean(), abs=1e-6)


def calibration_error_of_tenths(labels: np.ndarray, scores: np.ndarray) -> float:
    """Return the expected calibration error (Naeini et al. 2015) of scores that are multiples of 0.1, binned by integer arithmetic."""
    members: dict[int, list[int]] = {}
    tenths = np.rint(10 * scores).astype(int).tolist()
    for row, score in enumerate(tenths):
        members.setdefault(min(score * ECE_BINS // 10, ECE_BINS - 1), []).append(row)
    return sum(abs(sum(labels[row] - tenths[row] / 10 for row in rows)) for rows in members.values()) / len(labels)


def test_expected_calibration_error_of_an_example_computed_by_hand() -> None:
    """Bins of 1/15: the first two scores share one, with accuracy 1/2 and confidence 0.1; the other two have one each."""
    assert ECE_BINS == 15
    values = compute_metrics(
        ScoredUnits([0, 1, 1, 0], [0.1, 0.1, 0.9, 0.95], list("abcd")), threshold=0.5, replicates=2
    ).intervals
    assert values["ece"].value == pytest.approx((2 * abs(0.5 - 0.1) + abs(1 - 0.9) + abs(0 - 0.95)) / 4)


def encloses(interval: Interval, name: str) -> bool:
    """Return whether the interval encloses its value; the calibration error's may lie above, as resampling can only add to it."""
    low = min(interval.low, interval.value) if name == "ece" else interval.low
    return interval.low <= interval.high and low <= interval.value <= interval.high


def test_calibration_of_more_scores_than_knots_is_scikit_learns() -> None:
    """Beyond KNOTS scores the likelihood is summed over knots; that must not be seen."""
    sample = clinic(1000, seed=2)
    assert len(np.unique(sample.scores)) > KNOTS
    ranking = RankedUnits(sample, 0.5)
    times = np.random.default_rng(0).integers(0, 4, size=4000)
    found = ranking.metric_values(ranking.rows @ times.astype(float))
    y, z = np.repeat(ranking.labels, times), np.repeat(to_logit(ranking.scores), times)
    peers = LogisticRegression(C=np.inf, tol=1e-10).fit(z[:, None], y)
    assert found["calibration_slope"] == pytest.approx(peers.coef_[0, 0], rel=1e-3)
    assert (1 / (1 + np.exp(-z - found["calibration_intercept"]))).mean() == pytest.approx(y.mean(), abs=1e-4)


def test_another_prevalence_is_more_rows_of_a_class() -> None:
    """Weighting the classes to 2 % positive gives what copies of the negatives give."""
    sample = clinic(60, seed=1)
    positives, negatives = int(sample.labels.sum()), int((1 - sample.labels).sum())
    times = np.where(sample.labels == 1, negatives, 49 * positives)  # so that 1 row of 50 is positive
    copied = compute_metrics(
        ScoredUnits(*(np.repeat(each, times) for each in (sample.labels, sample.scores, sample.patients))), 0.5, 2
    )
    weighted = compute_metrics(sample, 0.5, replicates=200, prevalence=0.02)
    for name, interval in weighted.intervals.items():
        assert interval.value == pytest.approx(copied.intervals[name].value, rel=1e-6), name
        assert encloses(interval, name), name
    as_is = compute_metrics(sample, 0.5, replicates=200)
    assert weighted.intervals["auroc"].low == pytest.approx(as_is.intervals["auroc"].low)  # the order is what it was
    assert weighted.intervals["precision"].high < as_is.intervals["precision"].low


def test_confusion_matrix_is_scikit_learns() -> None:
    labels, scores = fuzzed(4)
    counts = compute_metrics(ScoredUnits(labels, scores, np.arange(len(labels))), threshold=0.4, replicates=2).confusion
    assert [counts.tn, counts.fp, counts.fn, counts.tp] == peer.confusion_matrix(labels, scores >= 0.4).ravel().tolist()


@pytest.mark.parametrize("seed", range(20))
def test_pf1_is_the_sum_that_kaggle_published(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, predictions = rng.random(50) < 0.2, rng.normal(0.4, 0.5, size=50)  # some below 0 and above 1
    labels[0] = True
    true = false = 0.0
    for label, prediction in zip(labels, predictions, strict=True):
        prediction = min(max(prediction, 0), 1)
        true, false = (true + prediction, false) if label else (true, false + prediction)
    precision, recall = true / (true + false), true / labels.sum()
    assert pf1(labels, predictions) == pytest.approx(2 * precision * recall / (precision + recall))


def test_pf1_without_predictions_is_0_and_without_positives_an_error() -> None:
    assert pf1([0, 1], [0, 0]) == 0
    assert pf1([0, 1], [-3, 7]) == 1
    with pytest.raises(UsageError, match="none of the 2 labels is 1"):
        pf1([0, 0], [0.1, 0.2])
    with pytest.raises(UsageError, match="NaN"):
        pf1([0, 1], [0.1, np.nan])


def test_aggregation_by_mean_max_and_noisy_or() -> None:
    groups, scores = ["b", "a", "b", "a", "c"], [0.5, 0.2, 0.9, 0.4, 0.7]
    for how, expected in {
        "mean": [0.3, 0.7, 0.7],
        "max": [0.4, 0.9, 0.7],
        "noisy_or": [1 - 0.8 * 0.6, 1 - 0.5 * 0.1, 0.7],
    }.items():
        ids, values = aggregate(scores, groups, how)
        assert ids.tolist() == ["a", "b", "c"]
        assert values == pytest.approx(expected)
    with pytest.raises(UsageError, match="median"):
        aggregate(scores, groups, "median")


def test_a_group_is_positive_when_a_known_label_is_and_unknown_when_none_is() -> None:
    images = ScoredUnits([0, 1, np.nan, 0, np.nan], [0.1, 0.2, 0.3, 0.4, 0.5], ["p", "p", "p", "q", "q"])
    breasts = images.aggregate(["pL", "pL", "pR", "qL", "qL"], "max")
    np.testing.assert_array_equal(breasts.labels, [1, np.nan, 0])
    assert breasts.patients.tolist() == ["p", "p", "q"]
    assert breasts.aggregate(breasts.patients, "max").labels.tolist() == [1, 0]
    found = compute_metrics(breasts, threshold=0.25, replicates=2)
    assert (found.units, found.positives, found.unknown, found.patients) == (2, 1, 1, 2)
    with pytest.raises(UsageError, match="more than one patient"):
        images.aggregate(["L", "L", "R", "L", "L"], "max")


def test_scores_and_labels_that_cannot_be_are_refused_by_row() -> None:
    for labels, scores, message in [
        ([0, 1, 0], [0.1, np.nan, 0.2], "'score' is NaN.*rows 1 "),
        ([0, 1, 0], [0.1, 1.2, -0.1], r"'score' lies outside \[0, 1\]: rows 1, 2 "),
        ([0, 2, 0], [0.1, 0.2, 0.3], "'label' is neither.*rows 1 "),
        ([0, 1], [0.1, 0.2, 0.3], "differ in length"),
    ]:
        with pytest.raises(UsageError, match=message):
            ScoredUnits(labels, scores, ["p"] * 3)
    with pytest.raises(UsageError, match=r"unknown .* in all 2 rows"):
        compute_metrics(ScoredUnits([np.nan, np.nan], [0.1, 0.2], ["p", "q"]), threshold=0.5)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_gives_nan_with_the_reason(label: int) -> None:
    found = compute_metrics(
        ScoredUnits([label] * 6, [0.1, 0.2, 0.2, 0.6, 0.7, 0.8], list("abcdef")), threshold=0.5, replicates=50
    )
    assert np.isnan(found.intervals["auroc"].low)
    assert found.undefined["auroc"] == f"all 6 units have the label {label}"
    assert {name for name, interval in found.intervals.items() if np.isnan(interval.value)} == set(found.undefined)
    assert found.intervals["accuracy"].value == 0.5


def test_nothing_called_positive_is_not_a_precision_of_0() -> None:
    found = compute_metrics(ScoredUnits([0, 1, 0], [0.1, 0.2, 0.3], list("abc")), threshold=0.9, replicates=10)
    assert found.intervals["f1"].value == 0
    assert "no unit is called positive" in found.undefined["precision"]


def test_separated_classes_have_no_calibration_slope() -> None:
    found = compute_metrics(ScoredUnits([0, 0, 1, 1], [0.1, 0.2, 0.2, 0.3], list("abcd")), threshold=0.2, replicates=10)
    assert "do not overlap" in found.undefined["calibration_slope"]


def clinic(patients: int, seed: int) -> ScoredUnits:
    """Four images for each patient, whose scores depend on the patient as much as on the image."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(rng.random(patients) < 0.4, 4).astype(float)
    logits = 1.5 * labels - 1 + np.repeat(rng.normal(size=patients), 4) + rng.normal(size=4 * patients)
    return ScoredUnits(labels, 1 / (1 + np.exp(-logits)), np.repeat(np.arange(patients), 4))


def test_intervals_are_seeded_and_enclose_the_value() -> None:
    sample = clinic(60, seed=1)
    first, again, other = (compute_metrics(sample, 0.5, replicates=200, seed=seed).intervals for seed in (3, 3, 4))
    assert first == again
    assert first != other
    for name, interval in first.items():
        assert encloses(interval, name), name


def test_more_rows_of_the_same_patients_do_not_narrow_the_interval() -> None:
    sample = clinic(60, seed=1)
    tripled = ScoredUnits(np.tile(sample.labels, 3), np.tile(sample.scores, 3), np.tile(sample.patients, 3))
    once, thrice = (compute_metrics(s, 0.5, replicates=200).intervals["auroc"] for s in (sample, tripled))
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high))
    by_image = compute_metrics(
        ScoredUnits(sample.labels, sample.scores, np.arange(240)), 0.5, replicates=200
    ).intervals["auroc"]
    assert by_image.high - by_image.low < 0.8 * (once.high - once.low)  # what resampling images would have claimed


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    truth = compute_metrics(clinic(20000, seed=0), 0.5, replicates=2).intervals["auroc"].value
    covered = 0
    for seed in range(60):
        sample = clinic(60, seed)
        ranking = RankedUnits(sample, 0.5)
        low, high = percentile_limits(
            resample(ranking.rows, lambda sums, r=ranking: [r.curve(sums).auroc()], ranking.patients, 200, seed)
        )
        covered += low[0] <= truth <= high[0]
    assert covered >= 51  # of 60: about 56 are expected, fewer than 51 in less than 1 run of 100


def test_an_interval_needs_two_patients_and_most_replicates() -> None:
    lone = compute_metrics(ScoredUnits([0, 1, 0], [0.1, 0.6, 0.3], ["p"] * 3), threshold=0.5, replicates=10).intervals[
        "auroc"
    ]
    assert lone.value == 1
    assert np.isnan(lone.low)
    assert np.isnan(lone.high)
    rare = compute_metrics(
        ScoredUnits([1, 0, 0, 0], [0.9, 0.1, 0.2, 0.3], list("abcd")), threshold=0.5, replicates=200
    ).intervals["auroc"]
    assert rare.value == 1  # a third of the replicates hold no positive
    assert np.isnan(rare.low)
