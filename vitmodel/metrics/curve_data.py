"""What the figures of scores draw, as numbers: from a sample to points. Knows no picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from vitmodel.metrics.bootstrap import percentile_limits, resample
from vitmodel.metrics.curve import Curve
from vitmodel.metrics.metrics import RankedUnits
from vitmodel.metrics.scored_units import FloatArray, ScoredUnits

BAND_REPLICATES = 500
RESOLUTION = 0.001
"""How far along a curve, in units of its axes, a point must lie from the one before to be kept."""


@dataclass(frozen=True, eq=False)
class Band:
    """The pointwise 95 % band of a curve over patients drawn with replacement, read off at `x`."""

    x: FloatArray
    low: FloatArray
    high: FloatArray

    @classmethod
    def from_units(cls, sample: ScoredUnits, x: FloatArray, at_x: Callable[[Curve], FloatArray]) -> Self:
        ranking = RankedUnits(sample, threshold=1.0)

        def read(sums: FloatArray) -> FloatArray:  # F B -> len(x) B
            curves = [ranking.curve(replicate) for replicate in sums.T]
            return np.stack(
                [at_x(c) if c.positives and c.negatives else np.full(len(x), np.nan) for c in curves], axis=1
            )

        return cls(x, *percentile_limits(resample(ranking.rows, read, ranking.patients, BAND_REPLICATES, seed=0)))


@dataclass(frozen=True, eq=False)
class Roc:
    """The ROC curve, thinned to `RESOLUTION`. The first threshold, at which nothing is called, is infinite."""

    threshold: FloatArray
    fpr: FloatArray
    tpr: FloatArray
    band: Band

    @classmethod
    def from_units(cls, sample: ScoredUnits) -> Self:
        grid, curve = np.linspace(0, 1, 201), RankedUnits(sample, threshold=1.0).curve()
        kept = _thin(curve.fpr, curve.tpr)
        band = Band.from_units(sample, grid, lambda each: np.interp(grid, each.fpr, each.tpr))
        return cls(curve.thresholds[kept], curve.fpr[kept], curve.tpr[kept], band)


@dataclass(frozen=True, eq=False)
class PrecisionRecall:
    """Precision at each gain in recall, as average precision counts it, thinned to `RESOLUTION`: steps that end at the points."""

    recall: FloatArray
    precision: FloatArray
    band: Band

    @classmethod
    def from_units(cls, sample: ScoredUnits) -> Self:
        grid, curve = np.linspace(0.005, 1, 200), RankedUnits(sample, threshold=1.0).curve()
        gains = 1 + np.flatnonzero(np.diff(curve.tp))
        recall, precision = np.append(0, curve.tpr[gains]), curve.precision[np.append(gains[0], gains)]
        kept = _thin(recall, precision)
        band = Band.from_units(sample, grid, lambda each: each.precision[np.searchsorted(each.tpr, grid - 1e-9)])
        return cls(recall[kept], precision[kept], band)


@dataclass(frozen=True, eq=False)
class Reliability:
    """The fraction of positives in bins of equally many scores (up to ten, of ten or more), with Wilson's 95 % intervals."""

    units: FloatArray
    score: FloatArray
    """The bin's mean."""
    observed: FloatArray
    low: FloatArray
    high: FloatArray

    @classmethod
    def from_units(cls, sample: ScoredUnits) -> Self:
        order = np.argsort(sample.scores, kind="stable")
        bins = np.array_split(order, min(10, max(1, len(order) // 10)))
        score, observed = (
            np.array([values[rows].mean() for rows in bins]) for values in (sample.scores, sample.labels)
        )
        low, high = np.array([_wilson(sample.labels[rows]) for rows in bins]).T
        return cls(np.array([len(rows) for rows in bins]), score, observed, low, high)


@dataclass(frozen=True, eq=False)
class DecisionCurve:
    """Net benefit of acting at each threshold probability, tp / n - fp / n * its odds: by the score, and on everyone.

    Up to where fewer than 1 unit in 200 is called. Source: Vickers and Elkin, Medical Decision Making 26 (2006) 565-574.
    """

    threshold: FloatArray
    model: FloatArray
    everyone: FloatArray

    @classmethod
    def from_units(cls, sample: ScoredUnits) -> Self:
        end = min(0.95, max(0.05, float(np.quantile(sample.scores, 0.995))))
        thresholds = np.linspace(0.005, end, 100)
        called = sample.scores >= thresholds[:, None]
        odds = thresholds / (1 - thresholds)
        model = (called * (sample.labels - odds[:, None] * (1 - sample.labels))).mean(axis=1)
        return cls(thresholds, model, sample.labels.mean() - odds * (1 - sample.labels.mean()))


@dataclass(frozen=True, eq=False)
class Histogram:
    """How many units of each class have a score between two `edges`, which reach to the highest score or the threshold."""

    edges: FloatArray
    negatives: NDArray[np.intp]
    positives: NDArray[np.intp]

    @classmethod
    def from_units(cls, sample: ScoredUnits, threshold: float) -> Self:
        edges = np.linspace(0, max(sample.scores.max(), threshold, 1e-3), 31)
        return cls(edges, *(np.histogram(sample.scores[sample.labels == truth], edges)[0] for truth in (0, 1)))


@dataclass(frozen=True, eq=False)
class Curves:
    """What needs both classes."""

    roc: Roc
    precision_recall: PrecisionRecall
    reliability: Reliability
    decision_curve: DecisionCurve

    @classmethod
    def from_units(cls, sample: ScoredUnits) -> Self:
        return cls(
            Roc.from_units(sample),
            PrecisionRecall.from_units(sample),
            Reliability.from_units(sample),
            DecisionCurve.from_units(sample),
        )


@dataclass(frozen=True, eq=False)
class CurveData:
    """All of it; no curves where a class is missing."""

    histogram: Histogram
    curves: Curves | None

    @classmethod
    def from_units(cls, sample: ScoredUnits, threshold: float) -> Self:
        """Of a sample's rows with a known label."""
        known = sample.labelled()
        return cls(
            Histogram.from_units(known, threshold),
            Curves.from_units(known) if len(np.unique(known.labels)) == 2 else None,
        )


def _thin(x: FloatArray, y: FloatArray) -> NDArray[np.intp]:
    """Which points of a line to keep: of those that lie within `RESOLUTION` of each other along it the last, and both ends."""
    way = np.cumsum(np.abs(np.diff(x, prepend=x[0])) + np.abs(np.diff(y, prepend=y[0])))
    return np.flatnonzero(np.diff(np.ceil(way / RESOLUTION), append=np.inf))


def _wilson(labels: FloatArray) -> tuple[float, float]:
    """Wilson's 95 % interval of a fraction. Source: Wilson, JASA 22 (1927) 209-212."""
    n, z = len(labels), 1.96
    fraction = labels.mean()
    middle = (fraction + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(fraction * (1 - fraction) / n + z**2 / (4 * n**2))
    return min(middle - half, fraction), max(middle + half, fraction)
