"""The points of the evaluation figures: ROC, precision-recall, reliability, decision curve and histogram."""

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
"""Number of bootstrap replicates for the band of a curve."""
RESOLUTION = 0.001
"""Minimum distance between kept points, along the curve and in units of its axes."""


@dataclass(frozen=True, eq=False)
class Band:
    """A curve's pointwise 95 % band over patients drawn with replacement."""

    x: FloatArray
    """Positions on the horizontal axis, `(X,)`."""
    low: FloatArray
    high: FloatArray

    @classmethod
    def from_units(cls, sample: ScoredUnits, x: FloatArray, at_x: Callable[[Curve], FloatArray]) -> Self:
        """Return the band at `x`, where `at_x` reads a curve at these positions, `(X,)`."""
        ranking = RankedUnits(sample, threshold=1.0)

        def read_curve(sums: FloatArray) -> FloatArray:
            curve = ranking.curve(sums)
            return at_x(curve) if curve.positives and curve.negatives else np.full(len(x), np.nan)

        def read_curves(sums: FloatArray) -> FloatArray:  # (F, B) to (X, B)
            return np.stack([read_curve(replicate) for replicate in sums.T], axis=1)

        replicates = resample(ranking.rows, read_curves, ranking.patients, BAND_REPLICATES, seed=0)
        return cls(x, *percentile_limits(replicates))


@dataclass(frozen=True, eq=False)
class Roc:
    """The ROC curve, thinned to `RESOLUTION`. The first threshold, at which no unit is called, is infinite."""

    threshold: FloatArray
    fpr: FloatArray
    tpr: FloatArray
    band: Band

    @classmethod
    def from_units(cls, sample: ScoredUnits) -> Self:
        """Return the ROC curve of a sample with both classes."""
        grid = np.linspace(0, 1, 201)
        curve = RankedUnits(sample, threshold=1.0).curve()
        kept = _thin(curve.fpr, curve.tpr)
        band = Band.from_units(sample, grid, lambda replicate: np.interp(grid, replicate.fpr, replicate.tpr))
        return cls(curve.thresholds[kept], curve.fpr[kept], curve.tpr[kept], band)


@dataclass(frozen=True, eq=False)
class PrecisionRecall:
    """Precision at each gain in recall, as in average precision, thinned to `RESOLUTION`.

    The curve consists of steps that end at the points.
    """

    recall: FloatArray
    precision: FloatArray
    band: Band

    @classmethod
    def from_units(cls, sample: ScoredUnits) -> Self:
        """Return the precision-recall curve of a sample with both classes."""
        grid = np.linspace(0.005, 1, 200)
        curve = RankedUnits(sample, threshold=1.0).curve()
        gains = 1 + np.flatnonzero(np.diff(curve.tp))
        recall = np.append(0, curve.tpr[gains])
        precision = curve.precision[np.append(gains[0], gains)]
        kept = _thin(recall, precision)

        def precision_on_grid(replicate: Curve) -> FloatArray:
            return replicate.precision[np.searchsorted(replicate.tpr, grid - 1e-9)]

        return cls(recall[kept], precision[kept], Band.from_units(sample, grid, precision_on_grid))


@dataclass(frozen=True, eq=False)
class Reliability:
    """The fraction of positives in bins of equally many scores, with Wilson's 95 % intervals.

    There are at most ten bins, of ten or more units each.
    """

    units: FloatArray
    """Number of units in each bin."""
    score: FloatArray
    """Mean score of each bin."""
    observed: FloatArray
    """Fraction of positives in each bin."""
    low: FloatArray
    high: FloatArray

    @classmethod
    def from_units(cls, sample: ScoredUnits) -> Self:
        """Return the reliability diagram of a sample without unknown labels."""
        order = np.argsort(sample.scores, kind="stable")
        bins = np.array_split(order, min(10, max(1, len(order) // 10)))
        score = np.array([sample.scores[rows].mean() for rows in bins])
        observed = np.array([sample.labels[rows].mean() for rows in bins])
        low, high = np.array([_wilson(sample.labels[rows]) for rows in bins]).T
        return cls(np.array([len(rows) for rows in bins]), score, observed, low, high)


@dataclass(frozen=True, eq=False)
class DecisionCurve:
    """Net benefit at each threshold probability: true positives / n - false positives / n * odds of the threshold.

    The curve ends where fewer than 1 unit in 200 is called positive.

    Source: Vickers and Elkin, Medical Decision Making 26 (2006) 565-574.
    """

    threshold: FloatArray
    model: FloatArray
    """Net benefit of acting on the units whose score reaches the threshold."""
    everyone: FloatArray
    """Net benefit of acting on every unit."""

    @classmethod
    def from_units(cls, sample: ScoredUnits) -> Self:
        """Return the decision curve of a sample without unknown labels."""
        end = min(0.95, max(0.05, float(np.quantile(sample.scores, 0.995))))
        thresholds = np.linspace(0.005, end, 100)
        called = sample.scores >= thresholds[:, None]
        odds = thresholds / (1 - thresholds)
        model = (called * (sample.labels - odds[:, None] * (1 - sample.labels))).mean(axis=1)
        return cls(thresholds, model, sample.labels.mean() - odds * (1 - sample.labels.mean()))


@dataclass(frozen=True, eq=False)
class Histogram:
    """Number of units of each class per score bin; the bins reach to the highest score or the threshold."""

    edges: FloatArray
    negatives: NDArray[np.intp]
    positives: NDArray[np.intp]

    @classmethod
    def from_units(cls, sample: ScoredUnits, threshold: float) -> Self:
        """Return the histogram of a sample without unknown labels."""
        edges = np.linspace(0, max(sample.scores.max(), threshold, 1e-3), 31)
        negatives = np.histogram(sample.scores[sample.labels == 0], edges)[0]
        positives = np.histogram(sample.scores[sample.labels == 1], edges)[0]
        return cls(edges, negatives, positives)


@dataclass(frozen=True, eq=False)
class Curves:
    """The figures that need both classes."""

    roc: Roc
    precision_recall: PrecisionRecall
    reliability: Reliability
    decision_curve: DecisionCurve

    @classmethod
    def from_units(cls, sample: ScoredUnits) -> Self:
        """Return the points of every figure of a sample with both classes."""
        return cls(
            Roc.from_units(sample),
            PrecisionRecall.from_units(sample),
            Reliability.from_units(sample),
            DecisionCurve.from_units(sample),
        )


@dataclass(frozen=True, eq=False)
class CurveData:
    """The points of all evaluation figures."""

    histogram: Histogram
    curves: Curves | None
    """None where a class is missing."""

    @classmethod
    def from_units(cls, sample: ScoredUnits, threshold: float) -> Self:
        """Return the points for the rows of a sample whose label is known."""
        labelled = sample.labelled()
        curves = Curves.from_units(labelled) if len(np.unique(labelled.labels)) == 2 else None
        return cls(Histogram.from_units(labelled, threshold), curves)


def _thin(x: FloatArray, y: FloatArray) -> NDArray[np.intp]:
    """Return the indices of the points of a line to keep.

    These are both ends and, of the points within one step of `RESOLUTION` along the line, the last.
    """
    distance = np.cumsum(np.abs(np.diff(x, prepend=x[0])) + np.abs(np.diff(y, prepend=y[0])))
    return np.flatnonzero(np.diff(np.ceil(distance / RESOLUTION), append=np.inf))


def _wilson(labels: FloatArray) -> tuple[float, float]:
    """Return Wilson's 95 % interval of the fraction of positives. Source: Wilson, JASA 22 (1927) 209-212."""
    n = len(labels)
    z = 1.96
    fraction = labels.mean()
    center = (fraction + z**2 / (2 * n)) / (1 + z**2 / n)
    half_width = z / (1 + z**2 / n) * np.sqrt(fraction * (1 - fraction) / n + z**2 / (4 * n**2))
    return min(center - half_width, fraction), max(center + half_width, fraction)
