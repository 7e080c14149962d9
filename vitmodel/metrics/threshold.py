"""Choice of the decision threshold by an objective."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from vitmodel.errors import UsageError
from vitmodel.metrics.curve import Curve
from vitmodel.metrics.metrics import RankedUnits
from vitmodel.metrics.scored_units import FloatArray, ScoredUnits


def _f1(curve: Curve, _: float) -> FloatArray:
    return 2 * curve.tp / (curve.tp + curve.fp + curve.positives)


def _macro_f1(curve: Curve, _: float) -> FloatArray:
    """Return the macro F1: half the F1 of the positives plus half the F1 of the negatives."""
    tn = curve.negatives - curve.fp
    fn = curve.positives - curve.tp
    return curve.tp / (curve.tp + curve.fp + curve.positives) + tn / (tn + curve.negatives + fn)


def _youden(curve: Curve, _: float) -> FloatArray:
    return curve.tp / curve.positives - curve.fp / curve.negatives


def _specificity_at_sensitivity(curve: Curve, sensitivity: float) -> FloatArray:
    """Return the negative count of false positives, which ranks as the specificity; -inf below the sensitivity."""
    reaches = curve.tp >= curve.positives * sensitivity - 1e-9
    return np.where(reaches, -curve.fp, -np.inf)


OBJECTIVES: dict[str, Callable[[Curve, float], FloatArray]] = {
    "f1": _f1,
    "macro_f1": _macro_f1,
    "youden": _youden,
    "sensitivity": _specificity_at_sensitivity,
}
"""Objective by name: from a curve and the required sensitivity to the value to maximise at each threshold, `(T,)`."""


def describe_objective(objective: str, sensitivity: float) -> str:
    """Return what `choose_threshold` maximises, in words."""
    names = {
        "f1": "largest F1",
        "pf1": "largest expected F1 (pF1 of decisions)",
        "sensitivity": f"highest specificity at {100 * sensitivity:.0f} % sensitivity",
    }
    return names.get(objective, f"largest {objective}")


def choose_threshold(labels: ArrayLike, scores: ArrayLike, objective: str = "f1", sensitivity: float = 0.9) -> float:
    """Return the threshold in [0, 1] that is best on these rows by an objective.

    Objectives:

    - `f1`, `macro_f1`, `youden` (sensitivity + specificity - 1): the threshold with the largest value;
    - `sensitivity`: the threshold with the highest specificity that reaches the required sensitivity;
    - `pf1`: half the largest expected F1. For decisions of 0 and 1 pF1 equals F1, and for calibrated scores the best
      threshold is half of its maximum (Lipton, Elkan and Naryanaswamy, ECML PKDD 2014). It is computed from the
      scores alone, so that chance in few labels does not change it.

    Except for `pf1`, the threshold is halfway between two scores, so that rounding elsewhere does not change a
    decision. If several thresholds are equally good, the highest is returned. Do not report decision metrics on the
    rows on which the threshold was chosen.

    Args:
        labels: 0, 1 or NaN = unknown (left out), `(N,)`.
        scores: Scores in [0, 1], `(N,)`.
        objective: `f1`, `macro_f1`, `youden`, `sensitivity` or `pf1`.
        sensitivity: The required sensitivity of the objective `sensitivity`.

    Raises:
        UsageError: The objective is unknown, a class is missing, or `ScoredUnits` refuses the values.
    """
    if objective not in (*OBJECTIVES, "pf1"):
        raise UsageError(f"objective: {objective!r} is unknown; use one of {', '.join(OBJECTIVES)}, pf1")
    rows = np.arange(len(np.asarray(scores)))
    labelled = ScoredUnits(np.asarray(labels), np.asarray(scores), rows).labelled()
    if set(labelled.labels) != {0.0, 1.0}:
        raise UsageError("labels: a class is missing; choose a threshold on rows of both classes, 0 and 1")
    if objective == "pf1":
        falling = -np.sort(-labelled.scores)
        expected_f1 = 2 * np.cumsum(falling) / (np.arange(1, len(falling) + 1) + max(falling.sum(), 1e-12))
        return float(expected_f1.max() / 2)
    curve = RankedUnits(labelled, threshold=0.5).curve()
    best = 1 + int(np.argmax(OBJECTIVES[objective](curve, sensitivity)[1:]))
    lowest_called = curve.thresholds[best]
    next_below = np.max(labelled.scores, initial=0.0, where=labelled.scores < lowest_called)
    halfway = (lowest_called + next_below) / 2
    return float(halfway if halfway > next_below else lowest_called)
