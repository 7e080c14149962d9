"""Where to cut the scores into called positive and called negative. Knows no interval and no model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from vitmodel.errors import UsageError
from vitmodel.metrics.curve import Curve
from vitmodel.metrics.metrics import RankedUnits
from vitmodel.metrics.scored_units import FloatArray, ScoredUnits

# The curve, and the wanted sensitivity -> what to make large at each of its thresholds.
OBJECTIVES: dict[str, Callable[[Curve, float], FloatArray]] = {
    "f1": lambda c, _: 2 * c.tp / (c.tp + c.fp + c.positives),
    "macro_f1": lambda c, _: (
        c.tp / (c.tp + c.fp + c.positives)
        + (c.negatives - c.fp) / (c.negatives - c.fp + c.negatives + c.positives - c.tp)
    ),
    "youden": lambda c, _: c.tp / c.positives - c.fp / c.negatives,
    "sensitivity": lambda c, wanted: np.where(c.tp >= c.positives * wanted - 1e-9, -c.fp, -np.inf),
}


def describe_objective(objective: str, sensitivity: float) -> str:
    """What `choose_threshold` looks for, in words."""
    names = {
        "f1": "largest F1",
        "pf1": "largest expected F1 (pF1 of decisions)",
        "sensitivity": f"sensitivity {100 * sensitivity:.0f} %",
    }
    return names.get(objective, f"largest {objective}")


def choose_threshold(labels: ArrayLike, scores: ArrayLike, objective: str = "f1", sensitivity: float = 0.9) -> float:
    """The threshold in [0, 1] that is best on these rows by an `objective`.

    - `f1`, `macro_f1`, `youden` (sensitivity + specificity - 1): the one with the largest value;
    - `sensitivity`: the one with the highest specificity that reaches the wanted `sensitivity`;
    - `pf1`: for decisions 0 and 1 pF1 is F1; where the scores are calibrated, its expectation is largest at half of its own maximum
      (Lipton, Elkan and Naryanaswamy, ECML PKDD 2014). It is read from the scores alone, so that chance in few labels does not move it.

    Except for `pf1` it lies halfway between two scores, so that rounding elsewhere does not flip a decision; the highest one where
    several are equally good. Report no decision metric on the rows it was chosen on. Unknown (NaN) labels are left out. Raises UsageError.
    """
    if objective not in (*OBJECTIVES, "pf1"):
        raise UsageError(f"objective: {objective!r} is unknown; known are {', '.join(OBJECTIVES)}, pf1")
    known = ScoredUnits(np.asarray(labels), np.asarray(scores), np.arange(len(np.asarray(scores)))).labelled()
    if set(known.labels) != {0.0, 1.0}:
        raise UsageError("labels: a threshold can only be chosen on rows of both classes, 0 and 1")
    if objective == "pf1":
        falling = -np.sort(-known.scores)
        expected = 2 * np.cumsum(falling) / (np.arange(1, len(falling) + 1) + max(falling.sum(), 1e-12))
        return float(expected.max() / 2)
    curve = RankedUnits(known, threshold=0.5).curve()
    best = 1 + int(np.argmax(OBJECTIVES[objective](curve, sensitivity)[1:]))
    lowest = curve.thresholds[best]
    next_below = np.max(known.scores, initial=0.0, where=known.scores < lowest)
    halfway = (lowest + next_below) / 2
    return float(halfway if halfway > next_below else lowest)
