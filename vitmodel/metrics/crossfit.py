"""Cross-fitting by patient: thresholds and calibrations are chosen on other patients than those they are applied to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitmodel.errors import UsageError
from vitmodel.metrics import calibration
from vitmodel.metrics.bootstrap import group_indicator
from vitmodel.metrics.scored_units import FloatArray, ScoredUnits, to_logit
from vitmodel.metrics.threshold import choose_threshold

FOLDS = 5
"""Maximum number of folds."""

OUT_OF_FOLD = "out_of_fold"
CROSS_SELECTED = "cross_selected"
ONLY_EPOCH = "only_epoch"
SELECTED_EPOCH = "selected_epoch"

Transform = Callable[[FloatArray], FloatArray]
"""A function of scores, `(N,)` to `(N,)`."""


def patient_folds(sample: ScoredUnits, folds: int = FOLDS, seed: int = 0) -> NDArray[np.intp]:
    """Return the fold of each row, `(N,)`, counted from 0.

    Patients with and without a positive are distributed evenly over the folds, and no patient is split. There are
    fewer folds if a class has fewer patients than `folds`.

    Raises:
        UsageError: A class has fewer than two patients.
    """
    ids, patient_index = np.unique(sample.patients, return_inverse=True)
    has_positive = group_indicator(patient_index) @ (sample.labels == 1) > 0
    folds = int(min(folds, has_positive.sum(), (~has_positive).sum()))
    if folds < 2:
        raise UsageError(
            f"labels: {has_positive.sum()} patients with a positive and {(~has_positive).sum()} without; "
            "cross-fitting needs two of each"
        )
    shuffled = np.random.default_rng(seed).permutation(len(ids))
    fold_of_patient = np.empty(len(ids), dtype=np.intp)
    fold_of_patient[np.lexsort((shuffled, has_positive))] = np.arange(len(ids)) % folds
    return fold_of_patient[patient_index]


def _cross_fit(sample: ScoredUnits, seed: int, fit: Callable[[FloatArray, FloatArray], Transform]) -> FloatArray:
    """Return the scores of each fold transformed by `fit(labels, scores)` of all other folds, `(N,)`.

    Rows with an unknown label are assigned to folds and transformed like the other rows of their patient, but nothing
    is fitted to them.
    """
    fold = patient_folds(sample, seed=seed)
    result = np.empty_like(sample.scores)
    for number in np.unique(fold):
        held_out = fold == number
        transform = fit(sample.labels[~held_out], sample.scores[~held_out])
        result[held_out] = transform(sample.scores[held_out])
    return result


def cross_fitted_thresholds(sample: ScoredUnits, objective: str, sensitivity: float = 0.9, seed: int = 0) -> FloatArray:
    """Return a threshold for each row, `(N,)`, chosen by `threshold.choose_threshold` on the patients of other folds.

    Raises:
        UsageError: A class has too few patients, or the objective is unknown.
    """

    def fit(labels: FloatArray, scores: FloatArray) -> Transform:
        threshold = choose_threshold(labels, scores, objective, sensitivity)
        return lambda held_out: np.full_like(held_out, threshold)

    return _cross_fit(sample, seed, fit)


def cross_fitted_probabilities(sample: ScoredUnits, method: str, seed: int = 0) -> FloatArray:
    """Return a probability for each row, `(N,)`, by a calibration fitted to the patients of other folds.

    Raises:
        UsageError: A class has too few patients, or the calibration method is unknown.
    """

    def fit(labels: FloatArray, scores: FloatArray) -> Transform:
        fitted = calibration.fit(method, labels, to_logit(scores))
        return lambda held_out: fitted.apply(to_logit(held_out))

    return _cross_fit(sample, seed, fit)


@dataclass(frozen=True)
class ScoreOrigin:
    """Where the scores come from to which calibration and threshold were fitted, as the model package records it."""

    kind: str
    """`out_of_fold`: from networks that were not trained on the patients. `cross_selected`: from validation patients,
    each half at the epoch that the other half chose. `only_epoch`: from validation patients, of which none chose an
    epoch. `selected_epoch`: from the validation patients who chose the epoch, for which the scores are too good."""
    divisions: int = 0
    """Number of random divisions of the validation patients into halves."""
    note: str = ""
    """Why the scores are of the selected epoch."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for config.json."""
        return asdict(self)


def describe_origin(values: Mapping[str, Any]) -> str:
    """Return a sentence on a `ScoreOrigin`, for the model card and reports; `values` is the entry of a package."""
    kind = values["kind"]
    if kind == OUT_OF_FOLD:
        return "None of these scores is of a network that was trained on the patient."
    if kind == ONLY_EPOCH:
        return "There was one epoch only, so no score chose it."
    if kind == CROSS_SELECTED:
        return (
            f"In {values['divisions']} random divisions of these patients, each half was scored at the epoch that the "
            "other half chose, so that no score chose its own epoch."
        )
    note = f" ({values['note']})" if values["note"] else ""
    return (
        f"The same patients chose the epoch{note}, so that probabilities may be too extreme on other patients; "
        "--folds avoids this."
    )


def cross_select(candidates: FloatArray, folds: NDArray[np.intp], figures: FloatArray) -> FloatArray:
    """Return the values of each fold from the candidate that is best on all other folds, `(N,)`.

    The first of equal candidates is used.

    Args:
        candidates: Values of E candidates, such as epochs, for N rows, `(E, N)`.
        folds: Fold of each row, counted from 0, `(N,)`, such as `patient_folds`.
        figures: How good each candidate is on the rows outside each of K folds, `(E, K)`; NaN = not defined.

    Raises:
        UsageError: The figure of a fold is not defined for any candidate.
    """
    if np.isnan(figures).all(axis=0).any():
        raise UsageError("labels: a part of the patients has one class only")
    return np.take_along_axis(candidates, np.nanargmax(figures, axis=0)[folds][None], axis=0)[0]
