"""The curve of counts from which ROC, precision and recall are read. Knows no patient and no interval."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitmodel.measure.sample import Floats

MAX_FPR = 0.2
"""The partial AUROC covers false-positive rates from 0 to this."""


@dataclass(frozen=True, eq=False)
class Curve:
    """Positives and negatives called at every score where the curve can bend, from the highest down (T each).

    `tp` and `fp` start with a 0 where nothing is called, for which `thresholds` is infinite; tied scores are called together.
    """

    thresholds: Floats
    tp: Floats
    fp: Floats

    @property
    def positives(self) -> float:
        return float(self.tp[-1])

    @property
    def negatives(self) -> float:
        return float(self.fp[-1])

    @property
    def tpr(self) -> Floats:
        return self.tp / self.positives

    @property
    def fpr(self) -> Floats:
        return self.fp / self.negatives

    @property
    def precision(self) -> Floats:
        """1 where nothing is called, by convention."""
        called = self.tp + self.fp
        return np.divide(self.tp, called, out=np.ones_like(called), where=called > 0)

    def auroc(self) -> float:
        return float(np.trapezoid(self.tp, self.fp)) / (self.positives * self.negatives)

    def partial_auroc(self) -> float:
        """The area for false-positive rates up to `MAX_FPR`, rescaled so that chance gives 0.5 and perfection 1.

        Source: McClish, Medical Decision Making 9 (1989) 190-195.
        """
        end = int(np.searchsorted(self.fpr, MAX_FPR, side="right"))
        fpr = np.append(self.fpr[:end], MAX_FPR)
        area = np.trapezoid(np.append(self.tpr[:end], np.interp(MAX_FPR, self.fpr, self.tpr)), fpr)
        chance = MAX_FPR**2 / 2
        return float(0.5 * (1 + (area - chance) / (MAX_FPR - chance)))

    def auprc(self) -> float:
        """Average precision: the precision at each gain in recall, with no interpolation between."""
        return float(np.diff(self.tp) @ self.precision[1:]) / self.positives

    def sensitivity_at(self, specificity: float) -> float:
        """The highest sensitivity of an observed threshold with at least this specificity."""
        allowed = self.negatives * (1 - specificity) + 1e-9  # counts are whole, so this only forgives rounding
        return float(self.tp[np.searchsorted(self.fp, allowed, side="right") - 1]) / self.positives

    def specificity_at(self, sensitivity: float) -> float:
        """The highest specificity of an observed threshold with at least this sensitivity."""
        needed = self.positives * sensitivity - 1e-9
        return 1 - float(self.fp[np.searchsorted(self.tp, needed)]) / self.negatives
