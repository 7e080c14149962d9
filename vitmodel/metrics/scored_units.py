"""Labels and scores of images, and their aggregation to breasts and patients."""

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
    """Return log(p / (1 - p)), with p clipped to [1e-7, 1 - 1e-7] to keep the result finite: |logit| <= 16.2."""
    return np.asarray(logit(np.clip(np.asarray(probability, dtype=np.float64), 1e-7, 1 - 1e-7)))


def _mean(values: FloatArray, starts: NDArray[np.intp]) -> FloatArray:
    """Return the mean of each group of sorted values."""
    return np.add.reduceat(values, starts) / np.diff(starts, append=len(values))


AGGREGATES: dict[str, Callable[[FloatArray, NDArray[np.intp]], FloatArray]] = {
    "mean": _mean,
    "mean_logit": lambda scores, starts: np.asarray(expit(_mean(to_logit(scores), starts))),
    "max": lambda scores, starts: np.maximum.reduceat(scores, starts),
    "noisy_or": lambda scores, starts: 1 - np.multiply.reduceat(1 - scores, starts),
}
"""Aggregation by name: from sorted scores, `(N,)`, and the start of each group, `(G,)`, to group scores, `(G,)`."""


def aggregate(scores: ArrayLike, groups: ArrayLike, how: str) -> tuple[NDArray[Any], FloatArray]:
    """Return one score for each group.

    Args:
        scores: Scores in [0, 1], `(N,)`.
        groups: The group id of each score, `(N,)`.
        how: `mean`; `mean_logit`, the mean of the log-odds, which a linear calibration of logits may precede or
            follow; `max`; or `noisy_or`, 1 - the product of 1 - score, for which one finding is enough.

    Returns:
        The sorted group ids and their scores, `(G,)` each.

    Raises:
        UsageError: `how` is unknown.
    """
    if how not in AGGREGATES:
        raise UsageError(f"aggregate: {how!r} is unknown; use one of {', '.join(AGGREGATES)}")
    order, ids, starts = _sort_by_group(groups)
    return ids, AGGREGATES[how](np.asarray(scores, dtype=np.float64)[order], starts)


def mean_logits(logits: ArrayLike, groups: ArrayLike) -> FloatArray:
    """Return the mean logit of each group for each of M packages.

    A non-linear calibration must be applied after this mean, not before.

    Args:
        logits: `(N, M)`.
        groups: The group id of each row, `(N,)`.

    Returns:
        The means, `(G, M)`, in the order of the sorted group ids.
    """
    order, _, starts = _sort_by_group(groups)
    sorted_logits = np.asarray(logits, dtype=np.float64)[order]
    return np.stack([_mean(package_logits, starts) for package_logits in sorted_logits.T], axis=1)


def _sort_by_group(groups: ArrayLike) -> tuple[NDArray[np.intp], NDArray[Any], NDArray[np.intp]]:
    """Return the row order that sorts by group, `(N,)`, the sorted ids, `(G,)`, and the start of each group, `(G,)`."""
    values = np.asarray(groups)
    order = np.argsort(values, kind="stable")
    ids, starts = np.unique(values[order], return_index=True)
    return order, ids, starts


@dataclass(frozen=True, eq=False)
class ScoredUnits:
    """Scores with their labels, one row per unit (image, breast or patient).

    Refused images have no score and must be left out.

    Raises:
        UsageError: The arrays differ in length, a score is NaN or outside [0, 1], or a label is not 0, 1 or NaN.
    """

    labels: FloatArray
    """0, 1 or NaN = unknown, `(N,)`."""
    scores: FloatArray
    """Scores in [0, 1], `(N,)`."""
    patients: NDArray[Any]
    """Patient ids, `(N,)`."""

    def __post_init__(self) -> None:
        for name, dtype in (("labels", np.float64), ("scores", np.float64), ("patients", None)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=dtype))
        if not len(self.labels) == len(self.scores) == len(self.patients):
            lengths = f"{len(self.labels)}, {len(self.scores)} and {len(self.patients)}"
            raise UsageError(f"labels, scores and patients differ in length: {lengths}; give one of each per unit")
        check_rows(np.isnan(self.scores), "score", "is NaN (leave refused images out and count them)")
        check_rows((self.scores < 0) | (self.scores > 1), "score", "lies outside [0, 1]")
        check_rows(~np.isin(self.labels, (0, 1)) & ~np.isnan(self.labels), "label", "is neither 0, 1 nor unknown (NaN)")

    def labelled(self) -> ScoredUnits:
        """Return the rows whose label is known."""
        rows = ~np.isnan(self.labels)
        return ScoredUnits(self.labels[rows], self.scores[rows], self.patients[rows])

    def aggregate(self, groups: ArrayLike, how: str) -> ScoredUnits:
        """Return one row per group, in the order of the sorted group ids.

        A group's label is the largest of its known labels; NaN if all are unknown.

        Args:
            groups: The group id of each row, `(N,)`.
            how: See `aggregate`.

        Raises:
            UsageError: `how` is unknown, or a group has rows of several patients.
        """
        order, _, starts = _sort_by_group(groups)
        patients = self.patients[order]
        patient_index = np.unique(patients, return_inverse=True)[1]
        is_mixed = np.minimum.reduceat(patient_index, starts) != np.maximum.reduceat(patient_index, starts)
        if is_mixed.any():
            raise UsageError(
                f"groups: {np.count_nonzero(is_mixed)} have rows of more than one patient; "
                "make the ids unique across patients"
            )
        labels = np.fmax.reduceat(self.labels[order], starts)
        _, scores = aggregate(self.scores, groups, how)
        return ScoredUnits(labels, scores, patients[starts])


def check_rows(bad: NDArray[np.bool_], column: str, problem: str) -> None:
    """Raise UsageError, naming the first five bad rows, if any row is bad.

    Args:
        bad: True for each bad row, `(N,)`.
        column: Name of the column, for the message.
        problem: What is wrong with the values, for the message.
    """
    rows = np.flatnonzero(bad)
    if rows.size:
        more = f" and {rows.size - 5} more" if rows.size > 5 else ""
        raise UsageError(f"column {column!r} {problem}: rows {', '.join(map(str, rows[:5]))}{more} (counted from 0)")
