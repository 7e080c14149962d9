"""Where to cut the scores into called positive and called negative. Knows no interval and no model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from vitmodel.measure.metrics import Ranking
from vitmodel.measure.sample import Floats, Sample
from vitmodel.utils import UsageError

# Positives and negatives called at each threshold, and how many there are -> what to make large.
OBJECTIVES: dict[str, Callable[[Floats, Floats, float, float], Floats]] = {
    "f1": lambda tp, fp, p, n: 2 * tp / (tp + fp + p),
    "macro_f1": lambda tp, fp, p, n: tp / (tp + fp + p) + (n - fp) / (n - fp + n + p - tp),
    "youden": lambda tp, fp, p, n: tp / p - fp / n,
}


def choose_threshold(labels: ArrayLike, scores: ArrayLike, objective: str = "f1") -> float:
    """The threshold in [0, 1] with the best `f1`, `macro_f1` or `youden` (sensitivity + specificity - 1) on these rows.

    It lies halfway between two scores, so that rounding elsewhere does not flip a decision; the highest one where several
    are equally good. Report no decision metric on the rows it was chosen on. Unknown (NaN) labels are left out. Raises UsageError.
    """
    if objective not in OBJECTIVES:
        raise UsageError(f"objective: {objective!r} is unknown; known are {', '.join(OBJECTIVES)}")
    known = Sample(np.asarray(labels), np.asarray(scores), np.arange(len(np.asarray(scores)))).known()
    if set(known.labels) != {0.0, 1.0}:
        raise UsageError("labels: a threshold can only be chosen on rows of both classes, 0 and 1")
    curve = Ranking(known, threshold=0.5).curve(np.ones_like(known.scores))
    best = 1 + int(np.argmax(OBJECTIVES[objective](curve.tp[1:], curve.fp[1:], curve.positives, curve.negatives)))
    lowest = curve.thresholds[best]
    next_below = np.max(known.scores, initial=0.0, where=known.scores < lowest)
    halfway = (lowest + next_below) / 2
    return float(halfway if halfway > next_below else lowest)
