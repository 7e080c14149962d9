"""Thresholds and calibrations for rows from other patients' rows: no number is chosen on the rows that it is reported on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from vitmodel.errors import UsageError
from vitmodel.metrics import calibration
from vitmodel.metrics.bootstrap import group_indicator
from vitmodel.metrics.scored_units import FloatArray, ScoredUnits, to_logit
from vitmodel.metrics.threshold import choose_threshold

FOLDS = 5


def patient_folds(sample: ScoredUnits, folds: int = FOLDS, seed: int = 0) -> NDArray[np.intp]:
    """The fold (N) of each row, from 0: patients with and without a positive are dealt out evenly, and no patient is divided.

    There are fewer folds where a class has fewer patients than `folds`. Raises UsageError where one has fewer than two.
    """
    ids, patient = np.unique(sample.patients, return_inverse=True)
    sick = group_indicator(patient) @ (sample.labels == 1) > 0
    folds = int(min(folds, sick.sum(), (~sick).sum()))
    if folds < 2:
        raise UsageError(
            f"labels: {sick.sum()} patients with a positive and {(~sick).sum()} without; cross-fitting needs two of each"
        )
    dealt = np.empty(len(ids), dtype=np.intp)
    dealt[np.lexsort((np.random.default_rng(seed).permutation(len(ids)), sick))] = np.arange(len(ids)) % folds
    return dealt[patient]


def _cross_fit(
    sample: ScoredUnits, seed: int, fit: Callable[[FloatArray, FloatArray], Callable[[FloatArray], FloatArray]]
) -> FloatArray:
    """For the scores of each fold what `fit` makes of them when fitted to labels and scores of all other folds (N).

    A row with an unknown label takes part like the others of its patient, but nothing is fitted to it.
    """
    fold = patient_folds(sample, seed=seed)
    result = np.empty_like(sample.scores)
    for part in np.unique(fold):
        here = fold == part
        result[here] = fit(sample.labels[~here], sample.scores[~here])(sample.scores[here])
    return result


def cross_fitted_thresholds(sample: ScoredUnits, objective: str, sensitivity: float = 0.9, seed: int = 0) -> FloatArray:
    """A threshold for each row (N), chosen by `threshold.choose_threshold` on the other folds' patients. Raises UsageError."""

    def fit(labels: FloatArray, scores: FloatArray) -> Callable[[FloatArray], FloatArray]:
        threshold = choose_threshold(labels, scores, objective, sensitivity)
        return lambda rows: np.full_like(rows, threshold)

    return _cross_fit(sample, seed, fit)


def cross_fitted_probabilities(sample: ScoredUnits, method: str, seed: int = 0) -> FloatArray:
    """A probability for each row (N) by a calibration that was fitted on the other folds' patients. Raises UsageError."""

    def fit(labels: FloatArray, scores: FloatArray) -> Callable[[FloatArray], FloatArray]:
        fitted = calibration.fit(method, labels, to_logit(scores))
        return lambda rows: fitted.apply(to_logit(rows))

    return _cross_fit(sample, seed, fit)
