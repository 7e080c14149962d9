"""The curve of counts from which ROC, precision and recall are read. Knows no patient and no interval."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitmodel.metrics.scored_units import FloatArray

MAX_FPR = 0.2
"""The partial AUROC covers false-positive rates from 0 to this."""


@dataclass(frozen=True, eq=False)
class Curve:
    """Positives and negatives called at every score where the curve can bend, from the highest down (T each).

    `tp` and `fp` start with a 0 where nothing is called, for which `thresholds` is infinite; tied scores are called together. Both
    may be T B, for B weightings of the rows; then every number below is B numbers. NaN or infinite where a class has no weight.
    """

    thresholds: FloatArray
    tp: FloatArray
    fp: FloatArray

    @property
    def positives(self) -> FloatArray:
        return np.asarray(self.tp[-1])

    @property
    def negatives(self) -> FloatArray:
        return np.asarray(self.fp[-1])

    @property
    def tpr(self) -> FloatArray:
        return self.tp / self.positives

    @property
    def fpr(self) -> FloatArray:
        return self.fp / self.negatives

    @property
    def precision(self) -> FloatArray:
        """1 where nothing is called, by convention."""
        called = self.tp + self.fp
        return np.divide(self.tp, called, out=np.ones_like(called), where=called > 0)

    def auroc(self) -> FloatArray:
        return np.asarray(np.trapezoid(self.tp, self.fp, axis=0)) / (self.positives * self.negatives)

    def partial_auroc(self) -> FloatArray:
        """The area for false-positive rates up to `MAX_FPR`, rescaled so that chance gives 0.5 and perfection 1.

        Source: McClish, Medical Decision Making 9 (1989) 190-195.
        """
        end = MAX_FPR * self.negatives
        width = np.diff(self.fp, axis=0)
        inside = np.clip(end - self.fp[:-1], 0, width)  # the part of each step that lies before the end
        rise = np.divide(np.diff(self.tp, axis=0) * inside, width, out=np.zeros_like(width), where=width > 0)
        area = (inside * (self.tp[:-1] + rise / 2)).sum(axis=0) / (self.positives * self.negatives)
        chance = MAX_FPR**2 / 2
        return 0.5 * (1 + (area - chance) / (MAX_FPR - chance))

    def auprc(self) -> FloatArray:
        """Average precision: the precision at each gain in recall, with no interpolation between."""
        return (np.diff(self.tp, axis=0) * self.precision[1:]).sum(axis=0) / self.positives

    def sensitivity_at(self, specificity: float) -> FloatArray:
        """The highest sensitivity of an observed threshold with at least this specificity."""
        allowed = self.negatives * (1 - specificity) + 1e-9  # counts are whole, so this only forgives rounding
        return np.max(self.tp, axis=0, initial=0, where=self.fp <= allowed) / self.positives

    def specificity_at(self, sensitivity: float) -> FloatArray:
        """The highest specificity of an observed threshold with at least this sensitivity."""
        needed = self.positives * sensitivity - 1e-9
        return 1 - np.min(self.fp, axis=0, initial=np.inf, where=self.tp >= needed) / self.negatives
