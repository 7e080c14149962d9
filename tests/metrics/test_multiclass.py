"""Metrics of several classes agree with scikit-learn, and calibration finds the optimum on known rows only."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, cohen_kappa_score, confusion_matrix, log_loss, roc_auc_score

from vitmodel.config.auxiliary import AUXILIARY_TARGETS
from vitmodel.metrics import calibration
from vitmodel.metrics.auxiliary import AuxiliaryOutput, AuxiliaryUnits, measure
from vitmodel.metrics.multiclass import Bootstrap, SoftmaxCalibration, class_metrics, quadratic_kappa

CLASSES = ("A", "B", "C", "D")


def sample(count: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels, of which some are unknown, informative logits and patients of two units each."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(4, count, p=[0.1, 0.4, 0.4, 0.1]).astype(float)
    logits = rng.normal(size=(count, 4)) + 1.5 * np.eye(4)[labels.astype(int)]
    labels[::7] = np.nan
    return labels, logits, np.arange(count) // 2


def test_metrics_of_several_classes_equal_those_of_scikit_learn() -> None:
    labels, logits, patients = sample()
    probabilities = softmax(logits, axis=1)
    metrics = class_metrics(labels, probabilities, patients, CLASSES, CLASSES, Bootstrap(200))
    known = ~np.isnan(labels)
    truth, predicted = labels[known], probabilities[known].argmax(axis=1)
    expected = {
        "macro_auroc": roc_auc_score(truth, probabilities[known], multi_class="ovr"),
        "accuracy": accuracy_score(truth, predicted),
        "quadratic_kappa": cohen_kappa_score(truth, predicted, weights="quadratic"),
    }
    assert {name: interval.value for name, interval in metrics.intervals.items()} == pytest.approx(expected)
    np.testing.assert_array_equal(metrics.confusion, confusion_matrix(truth, predicted))
    assert (metrics.units, metrics.patients) == (known.sum(), len(np.unique(patients[known])))
    for interval in metrics.intervals.values():
        assert interval.low < interval.value < interval.high


def test_intervals_are_those_of_metrics_on_patients_drawn_with_replacement() -> None:
    """The limits are compared with those of scikit-learn's values on explicitly repeated rows."""
    labels, logits, patients = sample(160)
    probabilities = softmax(logits, axis=1)
    known = np.flatnonzero(~np.isnan(labels))
    metrics = class_metrics(labels, probabilities, patients, CLASSES, CLASSES, Bootstrap(60, seed=5))
    rows_of = [known[patients[known] == patient] for patient in np.unique(patients[known])]
    rng = np.random.default_rng(5)
    values: dict[str, list[float]] = {"macro_auroc": [], "quadratic_kappa": []}
    for _ in range(60):
        rows = np.concatenate([rows_of[number] for number in rng.integers(len(rows_of), size=len(rows_of))])
        predicted = probabilities[rows].argmax(axis=1)
        values["quadratic_kappa"].append(cohen_kappa_score(labels[rows], predicted, weights="quadratic"))
        if len(np.unique(labels[rows])) == 4:
            values["macro_auroc"].append(roc_auc_score(labels[rows], probabilities[rows], multi_class="ovr"))
    for name, replicates in values.items():
        interval = metrics.intervals[name]
        np.testing.assert_allclose((interval.low, interval.high), np.percentile(replicates, [2.5, 97.5]))


def test_kappa_leaves_out_classes_without_a_place_in_the_order() -> None:
    target = AUXILIARY_TARGETS["birads"]
    labels = np.array([0.0, 1, 2, 3, 4, 2, 1])
    probabilities = np.full((7, 7), 0.01)
    probabilities[np.arange(7), [3, 1, 2, 2, 0, 2, 1]] = 0.9  # the fifth is called 0; its next best class is 4
    probabilities[4, 4] = 0.05
    metrics = measure(target, labels, probabilities, np.arange(7), Bootstrap(10))
    assert metrics is not None
    expected = cohen_kappa_score([1, 2, 3, 4, 2, 1], [1, 2, 2, 4, 2, 1], weights="quadratic")
    assert metrics.intervals["quadratic_kappa"].value == pytest.approx(expected)
    assert metrics.confusion[4][0] == 1
    assert metrics.units == 7


def test_kappa_is_not_defined_for_a_single_class() -> None:
    table = np.zeros((3, 3, 1))
    table[1, 1] = 5
    assert np.isnan(quadratic_kappa(table)).all()
    only_zero = measure(AUXILIARY_TARGETS["birads"], np.zeros(3), np.eye(7)[:3], np.arange(3), Bootstrap(10))
    assert only_zero is not None
    assert np.isnan(only_zero.intervals["quadratic_kappa"].value)
    assert np.isnan(only_zero.intervals["macro_auroc"].value)
    assert only_zero.intervals["accuracy"].value == pytest.approx(1 / 3)


def test_a_number_is_measured_by_its_mean_absolute_error() -> None:
    target = AUXILIARY_TARGETS["age"]
    labels = np.array(target.encode([58.0, 70.0, np.nan]))
    outputs = np.array([[0.0], [0.5], [9.0]])
    output = AuxiliaryOutput.fit(target, AuxiliaryUnits(labels, outputs, np.arange(3)))
    assert output.calibration is None
    metrics = measure(target, labels, output.predict(outputs), np.arange(3), Bootstrap(10))
    assert metrics is not None
    assert metrics.intervals["mean_absolute_error"].value == pytest.approx(3.0)
    assert (metrics.units, metrics.confusion) == (2, ())


def test_calibration_of_a_flag_is_platt_scaling() -> None:
    rng = np.random.default_rng(1)
    labels = (rng.random(300) < 0.2).astype(float)
    labels[:20] = np.nan
    logits = rng.normal(size=300) + 2 * np.nan_to_num(labels)
    units = AuxiliaryUnits(labels, logits[:, None], np.arange(300))
    probability = AuxiliaryOutput.fit(AUXILIARY_TARGETS["invasive"], units).predict(units.outputs)[:, 1]
    np.testing.assert_allclose(probability, calibration.fit("platt", labels, logits).apply(logits), atol=1e-5)


def test_calibration_lowers_the_log_loss_and_restores_class_frequencies() -> None:
    labels, logits, _ = sample(2000)
    distorted = 4 * logits + np.array([3.0, 0, 0, 3.0])
    fitted = SoftmaxCalibration.fit(labels, distorted)
    assert fitted is not None
    known = ~np.isnan(labels)
    probabilities = fitted.apply(distorted[known])
    frequencies = np.bincount(labels[known].astype(int)) / known.sum()
    np.testing.assert_allclose(probabilities.mean(axis=0), frequencies, atol=0.01)
    # multinomial regression on the logits has more freedom and is the lower bound of the log loss
    regression = LogisticRegression(C=1e6, max_iter=2000).fit(distorted[known], labels[known])
    bound = regression.predict_proba(distorted[known])
    reached = log_loss(labels[known], probabilities)
    assert log_loss(labels[known], bound) <= reached < log_loss(labels[known], bound) + 0.01
    assert reached < log_loss(labels[known], softmax(distorted[known], axis=1)) - 0.1


def test_unknown_values_change_no_calibration_and_separated_classes_stay_finite() -> None:
    labels, logits, _ = sample(200)
    known = ~np.isnan(labels)
    moved = np.where(known[:, None], logits, 100.0)
    assert SoftmaxCalibration.fit(labels, moved) == SoftmaxCalibration.fit(labels[known], logits[known])
    separated = SoftmaxCalibration.fit([0.0, 0, 1, 1], 50 * np.eye(4)[[0, 0, 1, 1]])  # two classes never occur
    assert separated is not None
    assert 0.5 < separated.apply(50 * np.eye(4)[:1])[0, 0] < 0.99
    assert SoftmaxCalibration.fit([1.0, 1, np.nan], np.eye(3)) is None


def test_a_breast_has_the_mean_outputs_and_the_largest_known_value_of_its_images() -> None:
    units = AuxiliaryUnits(
        np.array([1.0, np.nan, 2, np.nan]), np.array([[1.0], [5], [3], [4]]), np.array(["p", "q", "p", "q"])
    ).breasts(np.array(["p_L", "q_R", "p_L", "q_R"]))
    np.testing.assert_array_equal(units.labels, [2, np.nan])
    np.testing.assert_array_equal(units.outputs, [[2], [4.5]])
    assert units.patients.tolist() == ["p", "q"]
