"""Cumulative counts by falling threshold, from which the ROC and precision-recall figures are computed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitmodel.metrics.scored_units import FloatArray

MAX_FPR = 0.2
"""Upper end of the false-positive rates that the partial AUROC covers, from 0."""


@dataclass(frozen=True, eq=False)
class Curve:
    """True and false positives at each of T falling thresholds.

    The first threshold is infinite and has counts of 0. Tied scores share one threshold; scores between which the
    curve is straight may be left out. For B weightings of the rows, the counts are `(T, B)`, and every metric below
    has the shape `(B,)`. A metric is NaN or infinite where a class has no weight.
    """

    thresholds: FloatArray
    """Falling thresholds, `(T,)`; the first is infinite."""
    tp: FloatArray
    """True positives at each threshold, `(T,)` or `(T, B)`."""
    fp: FloatArray
    """False positives at each threshold, `(T,)` or `(T, B)`."""

    @property
    def positives(self) -> FloatArray:
        """Number of positives."""
        return np.asarray(self.tp[-1])

    @property
    def negatives(self) -> FloatArray:
        """Number of negatives."""
        return np.asarray(self.fp[-1])

    @property
    def tpr(self) -> FloatArray:
        """True-positive rate (sensitivity) at each threshold."""
        return self.tp / self.positives

    @property
    def fpr(self) -> FloatArray:
        """False-positive rate (1 - specificity) at each threshold."""
        return self.fp / self.negatives

    @property
    def precision(self) -> FloatArray:
        """Precision at each threshold; by convention 1 where no unit is called positive."""
        called = self.tp + self.fp
        return np.divide(self.tp, called, out=np.ones_like(called), where=called > 0)

    def auroc(self) -> FloatArray:
        """Return the area under the ROC curve; ties count one half."""
        return np.asarray(np.trapezoid(self.tp, self.fp, axis=0)) / (self.positives * self.negatives)

    def partial_auroc(self) -> FloatArray:
        """Return the area for false-positive rates up to `MAX_FPR`, rescaled to 0.5 at chance and 1 at best.

        Source: McClish, Medical Decision Making 9 (1989) 190-195.
        """
        end = MAX_FPR * self.negatives
        width = np.diff(self.fp, axis=0)
        inside = np.clip(end - self.fp[:-1], 0, width)  # the part of each step below MAX_FPR
        rise = np.divide(np.diff(self.tp, axis=0) * inside, width, out=np.zeros_like(width), where=width > 0)
        area = (inside * (self.tp[:-1] + rise / 2)).sum(axis=0) / (self.positives * self.negatives)
        chance = MAX_FPR**2 / 2
        return 0.5 * (1 + (area - chance) / (MAX_FPR - chance))

    def auprc(self) -> FloatArray:
        """Return the average precision: precision weighted by the gain in recall, without interpolation."""
        return (np.diff(self.tp, axis=0) * self.precision[1:]).sum(axis=0) / self.positives

    def sensitivity_at(self, specificity: float) -> FloatArray:
        """Return the highest sensitivity among the thresholds with at least this specificity."""
        allowed = self.negatives * (1 - specificity) + 1e-9  # counts are integers: the margin only absorbs rounding
        return np.max(self.tp, axis=0, initial=0, where=self.fp <= allowed) / self.positives

    def specificity_at(self, sensitivity: float) -> FloatArray:
        """Return the highest specificity among the thresholds with at least this sensitivity."""
        needed = self.positives * sensitivity - 1e-9
        return 1 - np.min(self.fp, axis=0, initial=np.inf, where=self.tp >= needed) / self.negatives
