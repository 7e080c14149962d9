"""Population stability index: how much the distribution of one quantity differs between two samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import chdtri

LARGE = 0.25
"""Index from which a difference is large, by the usual rule of thumb (Siddiqi 2006, Credit Risk Scorecards)."""
MODERATE = 0.1
"""Index from which it is moderate, by the same rule."""
CONFIDENCE = 0.99
"""Chance alone stays below the limit with this probability."""
PSEUDO_COUNT = 0.5
"""Added to each bin, because the index of an empty bin would be infinite."""


@dataclass(frozen=True)
class Stability:
    """The index of two samples, and what it would be without a difference."""

    index: float
    """Sum over bins of (q - p) * ln(q / p)."""
    chance: float
    """Its mean if both samples come from one distribution: (bins - 1) * (1 / n + 1 / m)."""
    limit: float
    """What chance alone exceeds once in a hundred comparisons."""

    @property
    def verdict(self) -> str:
        """Return "large", "moderate", "small", or "undecided": large by the rule, but within what chance gives."""
        if self.index > self.limit:
            return "large" if self.index > LARGE else "moderate" if self.index > MODERATE else "small"
        return "undecided" if self.index > LARGE else "small"


def population_stability(reference: np.ndarray, observed: np.ndarray, patients: tuple[int, int]) -> Stability:
    """Return the population stability index of two histograms.

    Twice the Kullback-Leibler divergence of nearby distributions is chi-squared over the number of units, and the index
    is the sum of both divergences. It therefore has about the distribution of chi-squared with bins - 1 degrees of
    freedom, times 1 / n + 1 / m (Yurdakul and Naranjo 2020, Journal of Risk Model Validation 14(4)). The units are
    patients, because images of one patient are alike.

    Args:
        reference: Counts of images per bin, `(B,)`.
        observed: Counts of images in the same bins.
        patients: Number of patients of the reference and of the observed images.
    """
    p = _smoothed_shares(reference)
    q = _smoothed_shares(observed)
    freedom = max(1, int(np.count_nonzero(np.asarray(reference) + np.asarray(observed))) - 1)
    scale = 1 / max(1, patients[0]) + 1 / max(1, patients[1])
    limit = float(chdtri(freedom, 1 - CONFIDENCE)) * scale
    return Stability(float(np.sum((q - p) * np.log(q / p))), freedom * scale, limit)


def _smoothed_shares(counts: np.ndarray) -> np.ndarray:
    """Return the share of each bin, with `PSEUDO_COUNT` added to its count."""
    raised = np.asarray(counts, float) + PSEUDO_COUNT
    shares: np.ndarray = raised / raised.sum()
    return shares
