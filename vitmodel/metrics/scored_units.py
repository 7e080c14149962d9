"""Labels and scores of images, and their aggregation to breasts and patients. Knows no metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit

from vitmodel.errors import UsageError

FloatArray = NDArray[np.float64]


def to_logit(probability: ArrayLike) -> FloatArray:
    """log(p / (1 - p)), with p kept 1e-7 away from 0 and 1 so that the result is finite; |logit| <= 16.2."""
    return np.asarray(logit(np.clip(np.asarray(probability, dtype=np.float64), 1e-7, 1 - 1e-7)))


def _mean(values: FloatArray, starts: NDArray[np.intp]) -> FloatArray:
    return np.add.reduceat(values, starts) / np.diff(starts, append=len(values))


# Scores of a group's members in order, and where each group starts -> one score per group.
AGGREGATES: dict[str, Callable[[FloatArray, NDArray[np.intp]], FloatArray]] = {
    "mean": _mean,
    "mean_logit": lambda scores, starts: np.asarray(expit(_mean(to_logit(scores), starts))),
    "max": lambda scores, starts: np.maximum.reduceat(scores, starts),
    "noisy_or": lambda scores, starts: 1 - np.multiply.reduceat(1 - scores, starts),
}


def aggregate(scores: ArrayLike, groups: ArrayLike, how: str) -> tuple[NDArray[Any], FloatArray]:
    """The group ids, sorted (G), and one score for each (G), from scores (N) and the group of each (N).

    `how` is `mean`, `mean_logit` (the mean of log-odds, so that a linear calibration of logits may come before or after it), `max` or
    `noisy_or` (1 - the product of 1 - score: one finding is enough). Raises UsageError.
    """
    if how not in AGGREGATES:
        raise UsageError(f"aggregate: {how!r} is unknown; known are {', '.join(AGGREGATES)}")
    order, ids, starts = _grouped(groups)
    return ids, AGGREGATES[how](np.asarray(scores, dtype=np.float64)[order], starts)


def mean_logits(logits: ArrayLike, groups: ArrayLike) -> FloatArray:
    """The mean over each group, in the order of the sorted ids (G M), of what M packages say (N M): for a calibration that bends, which
    may not come before the mean."""
    order, _, starts = _grouped(groups)
    return np.stack([_mean(each, starts) for each in np.asarray(logits, dtype=np.float64)[order].T], axis=1)


def _grouped(groups: ArrayLike) -> tuple[NDArray[np.intp], NDArray[Any], NDArray[np.intp]]:
    """An order that brings groups together, the sorted ids, and where each starts in that order."""
    values = np.asarray(groups)
    order = np.argsort(values, kind="stable")
    ids, starts = np.unique(values[order], return_index=True)
    return order, ids, starts


@dataclass(frozen=True, eq=False)
class ScoredUnits:
    """Scores to be judged, one row per unit (image, breast or patient).

    `labels` (N) are 0, 1 or NaN = unknown, `scores` (N) lie in [0, 1], `patients` (N) are ids. A refused image has no
    score and does not belong here. Raises UsageError.
    """

    labels: FloatArray
    scores: FloatArray
    patients: NDArray[Any]

    def __post_init__(self) -> None:
        for name, dtype in (("labels", np.float64), ("scores", np.float64), ("patients", None)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=dtype))
        if not len(self.labels) == len(self.scores) == len(self.patients):
            raise UsageError(
                f"labels, scores and patients differ in length: {len(self.labels)}, {len(self.scores)}, {len(self.patients)}"
            )
        check_rows(np.isnan(self.scores), "score", "is NaN: leave refused images out and count them")
        check_rows((self.scores < 0) | (self.scores > 1), "score", "lies outside [0, 1]")
        check_rows(~np.isin(self.labels, (0, 1)) & ~np.isnan(self.labels), "label", "is neither 0, 1 nor unknown (NaN)")

    def labelled(self) -> ScoredUnits:
        """The rows whose label is known."""
        rows = ~np.isnan(self.labels)
        return ScoredUnits(self.labels[rows], self.scores[rows], self.patients[rows])

    def aggregate(self, groups: ArrayLike, how: str) -> ScoredUnits:
        """One row per group, in the order of the sorted ids; its label is the largest known one. Raises UsageError."""
        order, _, starts = _grouped(groups)
        patients, (_, owner) = self.patients[order], np.unique(self.patients[order], return_inverse=True)
        strangers = np.minimum.reduceat(owner, starts) != np.maximum.reduceat(owner, starts)
        if strangers.any():
            raise UsageError(
                f"groups: {np.count_nonzero(strangers)} hold rows of more than one patient, so ids are not unique"
            )
        return ScoredUnits(
            np.fmax.reduceat(self.labels[order], starts), aggregate(self.scores, groups, how)[1], patients[starts]
        )


def check_rows(bad: NDArray[np.bool_], column: str, problem: str) -> None:
    """Name the first of the rows that are `bad` (N). Raises UsageError where there is one."""
    rows = np.flatnonzero(bad)
    if rows.size:
        more = f" and {rows.size - 5} more" if rows.size > 5 else ""
        raise UsageError(f"column {column!r} {problem}: rows {', '.join(map(str, rows[:5]))}{more} (counted from 0)")
