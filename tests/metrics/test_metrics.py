"""Metrics agree with scikit-learn and torchmetrics on random scores with ties; intervals are over patients."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
import torchmetrics.functional.classification as tm
from sklearn.linear_model import LogisticRegression

from vitmodel.errors import UsageError
from vitmodel.metrics.bootstrap import Interval, percentile_limits, resample
from vitmodel.metrics.curve import MAX_FPR
from vitmodel.metrics.metrics import ECE_BINS, KNOTS, METRICS, RankedUnits, compute_metrics, pf1
from vitmodel.metrics.scored_units import ScoredUnits, aggregate, to_logit


def random_scores(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return labels and scores of 12 to 300 rows with both classes.

    Even seeds give many ties and sometimes scores of 0 and 1.
    """
    rng = np.random.default_rng(seed)
    n = int(rng.integers(12, 300))
    labels = (rng.random(n) < rng.choice([0.05, 0.3, 0.7])).astype(float)
    labels[:2] = 0, 1
    scores = 1 / (1 + np.exp(-rng.normal(2 * labels - 1, 1.5)))
    return labels, np.round(scores, 1) if seed % 2 == 0 else scores


@pytest.mark.parametrize("seed", range(24))
def test_metrics_agree_with_scikit_learn_and_torchmetrics_under_any_weights(seed: int) -> None:
    labels, scores = random_scores(seed)
    threshold = 0.3  # equal to some of the tied scores
    weights = np.random.default_rng(seed).integers(0, 4, size=len(labels))
    weights[:2] = 1  # keeps both classes
    ranking = RankedUnits(ScoredUnits(labels, scores, np.arange(len(labels))), threshold)
    values = ranking.metric_values(ranking.rows @ weights[np.argsort(-scores, kind="stable")].astype(float))
    # A weight of k is equivalent to k equal rows.
    y = np.repeat(labels, weights)
    p = np.repeat(scores, weights)
    assert list(values) == [name for group in METRICS.values() for name in group]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns where our value is NaN
        expected = reference_values(y, p, threshold)
    for name, value in expected.items():
        assert values[name] == pytest.approx(float(value), abs=1e-6, nan_ok=True), name
    # torchmetrics bins in single precision, so a score on the edge of a bin may fall on either side of it.
    if seed % 2:
        ece = float(tm.binary_calibration_error(torch.from_numpy(p), torch.from_numpy(y).long(), n_bins=ECE_BINS))
    else:
        ece = calibration_error_of_tenths(y, p)
    assert values["ece"] == pytest.approx(ece, abs=1e-6)
    slope = LogisticRegression(C=np.inf, tol=1e-10).fit(to_logit(p)[:, None], y).coef_[0, 0]
    assert values["calibration_slope"] == pytest.approx(slope, rel=1e-3)
    # At the maximum of the likelihood, the corrected scores have the mean of the labels.
    corrected = 1 / (1 + np.exp(-to_logit(p) - values["calibration_intercept"]))
    assert corrected.mean() == pytest.approx(y.mean(), abs=1e-6)


def reference_values(y: np.ndarray, p: np.ndarray, threshold: float) -> dict[str, float]:
    """Return the metrics of labels y and scores p as scikit-learn and torchmetrics compute them."""
    called = p >= threshold
    tensors = torch.from_numpy(p), torch.from_numpy(y).long()
    return {
        "auroc": sk.roc_auc_score(y, p),
        "partial_auroc": sk.roc_auc_score(y, p, max_fpr=MAX_FPR),
        "auprc": sk.average_precision_score(y, p),
        "sensitivity_at_90_specificity": tm.binary_sensitivity_at_specificity(*tensors, 0.90 - 1e-6)[0],
        "sensitivity_at_95_specificity": tm.binary_sensitivity_at_specificity(*tensors, 0.95 - 1e-6)[0],
        "specificity_at_90_sensitivity": tm.binary_specificity_at_sensitivity(*tensors, 0.90 - 1e-6)[0],
        "specificity_at_95_sensitivity": tm.binary_specificity_at_sensitivity(*tensors, 0.95 - 1e-6)[0],
        "sensitivity": sk.recall_score(y, called),
        "specificity": sk.recall_score(1 - y, ~called),
        "precision": sk.precision_score(y, called, zero_division=np.nan),
        "npv": sk.precision_score(1 - y, ~called, zero_division=np.nan),
        "accuracy": sk.accuracy_score(y, called),
        "f1": sk.f1_score(y, called),
        "macro_f1": sk.f1_score(y, called, average="macro"),
        "recall_rate": called.mean(),
        "pf1": pf1(y, p),
        "brier": sk.brier_score_loss(y, p),
        "log_loss": sk.log_loss(y, p),
    }


def calibration_error_of_tenths(labels: np.ndarray, scores: np.ndarray) -> float:
    """Return the expected calibration error (Naeini et al. 2015) of scores that are multiples of 0.1.

    The scores are binned by integer arithmetic.
    """
    members: dict[int, list[int]] = {}
    tenths = np.rint(10 * scores).astype(int).tolist()
    for row, score in enumerate(tenths):
        members.setdefault(min(score * ECE_BINS // 10, ECE_BINS - 1), []).append(row)
    gaps = [abs(sum(labels[row] - tenths[row] / 10 for row in rows)) for rows in members.values()]
    return sum(gaps) / len(labels)


def test_expected_calibration_error_of_an_example_computed_by_hand() -> None:
    """With bins of 1/15, the first two scores share a bin of accuracy 1/2 and confidence 0.1; the others are alone."""
    assert ECE_BINS == 15
    sample = ScoredUnits([0, 1, 1, 0], [0.1, 0.1, 0.9, 0.95], list("abcd"))
    values = compute_metrics(sample, threshold=0.5, replicates=2).intervals
    assert values["ece"].value == pytest.approx((2 * abs(0.5 - 0.1) + abs(1 - 0.9) + abs(0 - 0.95)) / 4)


def encloses(interval: Interval, name: str) -> bool:
    """Return whether the interval encloses its value.

    That of the expected calibration error may lie above its value, because resampling increases this metric.
    """
    low = min(interval.low, interval.value) if name == "ece" else interval.low
    return interval.low <= interval.high and low <= interval.value <= interval.high


def test_calibration_of_more_scores_than_knots_agrees_with_scikit_learn() -> None:
    """With more than KNOTS distinct scores, the likelihood is summed over knots; the result must be nearly the same."""
    sample = clinic(1000, seed=2)
    assert len(np.unique(sample.scores)) > KNOTS
    ranking = RankedUnits(sample, 0.5)
    weights = np.random.default_rng(0).integers(0, 4, size=4000)
    values = ranking.metric_values(ranking.rows @ weights.astype(float))
    y = np.repeat(ranking.labels, weights)
    logits = np.repeat(to_logit(ranking.scores), weights)
    reference = LogisticRegression(C=np.inf, tol=1e-10).fit(logits[:, None], y)
    assert values["calibration_slope"] == pytest.approx(reference.coef_[0, 0], rel=1e-3)
    corrected = 1 / (1 + np.exp(-logits - values["calibration_intercept"]))
    assert corrected.mean() == pytest.approx(y.mean(), abs=1e-4)


def test_another_prevalence_equals_repeated_rows_of_a_class() -> None:
    """Weighting the classes to 2 % positives gives the same values as repeating their rows."""
    sample = clinic(60, seed=1)
    positives = int(sample.labels.sum())
    negatives = int((1 - sample.labels).sum())
    times = np.where(sample.labels == 1, negatives, 49 * positives)  # 1 row in 50 is positive
    columns = (sample.labels, sample.scores, sample.patients)
    repeated = compute_metrics(ScoredUnits(*(np.repeat(column, times) for column in columns)), 0.5, replicates=2)
    weighted = compute_metrics(sample, 0.5, replicates=200, prevalence=0.02)
    for name, interval in weighted.intervals.items():
        assert interval.value == pytest.approx(repeated.intervals[name].value, rel=1e-6), name
        assert encloses(interval, name), name
    unweighted = compute_metrics(sample, 0.5, replicates=200)
    # The AUROC does not depend on the prevalence.
    assert weighted.intervals["auroc"].low == pytest.approx(unweighted.intervals["auroc"].low)
    assert weighted.intervals["precision"].high < unweighted.intervals["precision"].low


def test_confusion_matrix_agrees_with_scikit_learn() -> None:
    labels, scores = random_scores(4)
    counts = compute_metrics(ScoredUnits(labels, scores, np.arange(len(labels))), threshold=0.4, replicates=2).confusion
    expected = sk.confusion_matrix(labels, scores >= 0.4).ravel().tolist()
    assert [counts.tn, counts.fp, counts.fn, counts.tp] == expected


@pytest.mark.parametrize("seed", range(20))
def test_pf1_agrees_with_the_sum_published_by_kaggle(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.random(50) < 0.2
    predictions = rng.normal(0.4, 0.5, size=50)  # some below 0 and above 1
    labels[0] = True
    true_positives = false_positives = 0.0
    for label, prediction in zip(labels, predictions, strict=True):
        clipped = min(max(prediction, 0), 1)
        if label:
            true_positives += clipped
        else:
            false_positives += clipped
    precision = true_positives / (true_positives + false_positives)
    recall = true_positives / labels.sum()
    assert pf1(labels, predictions) == pytest.approx(2 * precision * recall / (precision + recall))


def test_pf1_of_zero_predictions_is_0_and_without_positives_is_refused() -> None:
    assert pf1([0, 1], [0, 0]) == 0
    assert pf1([0, 1], [-3, 7]) == 1
    with pytest.raises(UsageError, match="none of the 2 labels is 1"):
        pf1([0, 0], [0.1, 0.2])
    with pytest.raises(UsageError, match="NaN"):
        pf1([0, 1], [0.1, np.nan])


def test_aggregation_by_mean_max_and_noisy_or() -> None:
    groups = ["b", "a", "b", "a", "c"]
    scores = [0.5, 0.2, 0.9, 0.4, 0.7]
    expectations = {
        "mean": [0.3, 0.7, 0.7],
        "max": [0.4, 0.9, 0.7],
        "noisy_or": [1 - 0.8 * 0.6, 1 - 0.5 * 0.1, 0.7],
    }
    for how, expected in expectations.items():
        ids, values = aggregate(scores, groups, how)
        assert ids.tolist() == ["a", "b", "c"]
        assert values == pytest.approx(expected)
    with pytest.raises(UsageError, match="median"):
        aggregate(scores, groups, "median")


def test_a_group_has_its_largest_known_label_or_else_an_unknown_one() -> None:
    images = ScoredUnits([0, 1, np.nan, 0, np.nan], [0.1, 0.2, 0.3, 0.4, 0.5], ["p", "p", "p", "q", "q"])
    breasts = images.aggregate(["pL", "pL", "pR", "qL", "qL"], "max")
    np.testing.assert_array_equal(breasts.labels, [1, np.nan, 0])
    assert breasts.patients.tolist() == ["p", "p", "q"]
    assert breasts.aggregate(breasts.patients, "max").labels.tolist() == [1, 0]
    metrics = compute_metrics(breasts, threshold=0.25, replicates=2)
    assert (metrics.units, metrics.positives, metrics.unknown, metrics.patients) == (2, 1, 1, 2)
    with pytest.raises(UsageError, match="more than one patient"):
        images.aggregate(["L", "L", "R", "L", "L"], "max")


def test_invalid_scores_and_labels_are_refused_with_their_rows() -> None:
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
    sample = ScoredUnits([label] * 6, [0.1, 0.2, 0.2, 0.6, 0.7, 0.8], list("abcdef"))
    metrics = compute_metrics(sample, threshold=0.5, replicates=50)
    assert np.isnan(metrics.intervals["auroc"].low)
    assert metrics.undefined["auroc"] == f"all 6 units have the label {label}"
    nan_names = {name for name, interval in metrics.intervals.items() if np.isnan(interval.value)}
    assert nan_names == set(metrics.undefined)
    assert metrics.intervals["accuracy"].value == 0.5


def test_precision_is_undefined_where_nothing_is_called_positive() -> None:
    sample = ScoredUnits([0, 1, 0], [0.1, 0.2, 0.3], list("abc"))
    metrics = compute_metrics(sample, threshold=0.9, replicates=10)
    assert metrics.intervals["f1"].value == 0
    assert "no unit is called positive" in metrics.undefined["precision"]


def test_separated_classes_have_no_calibration_slope() -> None:
    sample = ScoredUnits([0, 0, 1, 1], [0.1, 0.2, 0.2, 0.3], list("abcd"))
    metrics = compute_metrics(sample, threshold=0.2, replicates=10)
    assert "do not overlap" in metrics.undefined["calibration_slope"]


def clinic(patients: int, seed: int) -> ScoredUnits:
    """Return four images per patient, whose scores depend on the patient as much as on the image."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(rng.random(patients) < 0.4, 4).astype(float)
    logits = 1.5 * labels - 1 + np.repeat(rng.normal(size=patients), 4) + rng.normal(size=4 * patients)
    return ScoredUnits(labels, 1 / (1 + np.exp(-logits)), np.repeat(np.arange(patients), 4))


def test_intervals_depend_on_the_seed_only_and_enclose_the_value() -> None:
    sample = clinic(60, seed=1)
    first = compute_metrics(sample, 0.5, replicates=200, seed=3).intervals
    assert first == compute_metrics(sample, 0.5, replicates=200, seed=3).intervals
    assert first != compute_metrics(sample, 0.5, replicates=200, seed=4).intervals
    for name, interval in first.items():
        assert encloses(interval, name), name


def test_more_rows_of_the_same_patients_do_not_narrow_the_interval() -> None:
    sample = clinic(60, seed=1)
    tripled = ScoredUnits(np.tile(sample.labels, 3), np.tile(sample.scores, 3), np.tile(sample.patients, 3))
    once = compute_metrics(sample, 0.5, replicates=200).intervals["auroc"]
    thrice = compute_metrics(tripled, 0.5, replicates=200).intervals["auroc"]
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high))
    # Resampling images instead of patients would give intervals that are too narrow.
    images = ScoredUnits(sample.labels, sample.scores, np.arange(240))
    by_image = compute_metrics(images, 0.5, replicates=200).intervals["auroc"]
    assert by_image.high - by_image.low < 0.8 * (once.high - once.low)


def test_the_interval_has_nearly_its_nominal_coverage() -> None:
    truth = compute_metrics(clinic(20000, seed=0), 0.5, replicates=2).intervals["auroc"].value
    covered = 0
    for seed in range(60):
        sample = clinic(60, seed)
        ranking = RankedUnits(sample, 0.5)

        def auroc(sums: np.ndarray, ranking: RankedUnits = ranking) -> list[np.ndarray]:
            return [ranking.curve(sums).auroc()]

        low, high = percentile_limits(resample(ranking.rows, auroc, ranking.patients, 200, seed))
        covered += low[0] <= truth <= high[0]
    assert covered >= 51  # of 60: about 56 are expected; the probability of fewer than 51 is below 1 %


def test_an_interval_needs_two_patients_and_most_replicates() -> None:
    one_patient = ScoredUnits([0, 1, 0], [0.1, 0.6, 0.3], ["p"] * 3)
    auroc = compute_metrics(one_patient, threshold=0.5, replicates=10).intervals["auroc"]
    assert auroc.value == 1
    assert np.isnan(auroc.low)
    assert np.isnan(auroc.high)
    one_positive = ScoredUnits([1, 0, 0, 0], [0.9, 0.1, 0.2, 0.3], list("abcd"))
    auroc = compute_metrics(one_positive, threshold=0.5, replicates=200).intervals["auroc"]
    assert auroc.value == 1
    assert np.isnan(auroc.low)  # a third of the replicates have no positive
