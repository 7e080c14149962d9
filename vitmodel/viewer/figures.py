"""Figures of the evaluation page other than the ROC curve: their points in the coordinates of SVG drawings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitmodel.metrics.curve import Curve
from vitmodel.metrics.curve_data import PrecisionRecall, Reliability
from vitmodel.metrics.scored_units import FloatArray, ScoredUnits
from vitmodel.viewer.exams import Exam

SIDE = 300.0
"""Width and height of a square figure."""
STRIP_WIDTH = 640.0
LANE = 70.0
"""Height of a lane of the strip, which holds the breasts of one label."""
CELL = 6.0
"""Width within which the points of a lane are stacked, and the largest distance between stacked points."""
MOST_POINTS = 500
"""Most breasts of a lane; of more, as many are drawn at random."""


@dataclass(frozen=True)
class StripPoint:
    """A breast of the strip."""

    x: float
    y: float
    key: str
    """Key of its exam."""
    name: str
    """What is read out for it."""
    is_positive: bool


@dataclass(frozen=True)
class CalibrationBin:
    """Breasts of similar probability: how many were predicted and how many were positive."""

    score: float
    """Mean probability."""
    observed: float
    """Fraction of positives."""
    low: float
    high: float
    units: int


@dataclass(frozen=True)
class Figures:
    """What the figures of the evaluation page show at any threshold."""

    strip: tuple[StripPoint, ...]
    """The breasts by probability; positives in the upper lane, negatives in the lower one."""
    shown: tuple[int, int]
    """Number of positives and of negatives that the strip shows."""
    bins: tuple[CalibrationBin, ...]
    precision_recall: str = ""
    """Points of the precision-recall curve; empty if a class is missing."""
    precision_recall_band: str = ""
    """Corners of its 95 % band over patients."""
    average_precision: float = float("nan")
    points: tuple[tuple[float, float, float], ...] = ()
    """Threshold, recall and precision, by falling threshold."""

    @classmethod
    def of(cls, units: ScoredUnits, breasts: Sequence[tuple[Exam, str]], curve: Curve | None) -> Figures:
        """Return the figures of scored breasts.

        Args:
            units: The breasts with known labels.
            breasts: Exam and side of each.
            curve: Their curve; None if a class is missing.
        """
        lanes = [_sample(np.flatnonzero(units.labels == label)) for label in (1, 0)]
        strip = [
            point
            for number, rows in enumerate(lanes)
            for point in _lane(units, breasts, rows, LANE * (number + 0.5), number == 0)
        ]
        found = Reliability.from_units(units)
        columns = (found.score, found.observed, found.low, found.high, found.units.astype(int))
        bins = tuple(map(CalibrationBin, *(column.tolist() for column in columns)))
        shown = len(lanes[0]), len(lanes[1])
        if curve is None:
            return cls(tuple(strip), shown, bins)
        drawn = PrecisionRecall.from_units(units)
        triples = zip(curve.thresholds[1:], curve.tpr[1:], curve.precision[1:], strict=True)  # the first is infinite
        return cls(
            tuple(strip),
            shown,
            bins,
            _steps(drawn.recall, drawn.precision),
            _corners(
                np.concatenate([drawn.band.x, drawn.band.x[::-1]]),
                np.concatenate([drawn.band.low, drawn.band.high[::-1]]),
            ),
            float(curve.auprc()),
            tuple((float(threshold), float(recall), float(precision)) for threshold, recall, precision in triples),
        )


def _sample(rows: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return the rows, or as many of them as a lane holds, always the same ones."""
    if len(rows) <= MOST_POINTS:
        return rows
    return np.sort(np.random.default_rng(0).choice(rows, MOST_POINTS, replace=False))


def _lane(
    units: ScoredUnits, breasts: Sequence[tuple[Exam, str]], rows: NDArray[np.intp], middle: float, is_positive: bool
) -> list[StripPoint]:
    """Return the points of a lane by rising probability; those of similar probability are stacked around its middle."""
    cells = (units.scores[rows] * STRIP_WIDTH / CELL).astype(int)
    step = min(CELL, LANE * 0.85 / max(1, np.bincount(cells).max(initial=0)))
    heights: dict[int, int] = {}
    points = []
    for row in rows[np.argsort(units.scores[rows], kind="stable")]:
        exam, side = breasts[row]
        score = float(units.scores[row])
        cell = int(score * STRIP_WIDTH / CELL)
        place = heights[cell] = heights.get(cell, -1) + 1
        y = middle + (1 if place % 2 else -1) * ((place + 1) // 2) * step
        breast = {"R": "right breast", "L": "left breast"}.get(side, "breast of unknown side")
        names = (exam.patient_id or "unknown patient", exam.exam_id, breast, f"{100 * score:.1f} %")
        name = ", ".join(part for part in (*names, "positive" if is_positive else "negative") if part)
        points.append(StripPoint(round(STRIP_WIDTH * score, 1), round(y, 1), exam.key, name, is_positive))
    return points


def _steps(recall: FloatArray, precision: FloatArray) -> str:
    """Return the corners of a curve of steps that end at the points."""
    return _corners(np.repeat(recall, 2)[:-1], np.repeat(precision, 2)[1:])


def _corners(x: FloatArray, y: FloatArray) -> str:
    """Return points of the unit square as corners of a square figure; points that are not defined are left out."""
    known = np.isfinite(x) & np.isfinite(y)
    return " ".join(f"{SIDE * a:.1f},{SIDE * (1 - b):.1f}" for a, b in zip(x[known], y[known], strict=True))
