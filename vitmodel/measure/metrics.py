"""How good scores are: per image, breast and patient, with 95 % intervals over patients. Knows labels and scores, no images and no model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitmodel.measure.bootstrap import Floats, Interval, percentile_limits, resample
from vitmodel.measure.calibration import logistic_regression, overlap, to_logit
from vitmodel.utils import UsageError

MAX_FPR = 0.2
"""The partial AUROC covers false-positive rates from 0 to this."""
ECE_BINS = 15

METRICS: dict[str, dict[str, str]] = {
    "Ranking": {
        "auroc": "AUROC",
        "partial_auroc": "Partial AUROC (specificity 80–100 %, rescaled)",
        "auprc": "AUPRC (average precision)",
        "sensitivity_at_90_specificity": "Sensitivity at 90 % specificity",
        "sensitivity_at_95_specificity": "Sensitivity at 95 % specificity",
        "specificity_at_90_sensitivity": "Specificity at 90 % sensitivity",
        "specificity_at_95_sensitivity": "Specificity at 95 % sensitivity",
    },
    "Decisions at the threshold": {
        "sensitivity": "Sensitivity (recall)",
        "specificity": "Specificity",
        "precision": "PPV (precision)",
        "npv": "NPV",
        "accuracy": "Accuracy",
        "f1": "F1",
        "macro_f1": "Macro F1",
        "recall_rate": "Recall rate (fraction called positive)",
    },
    "Scores as probabilities": {
        "pf1": "Probabilistic F1 (pF1)",
        "brier": "Brier score",
        "log_loss": "Log loss",
        "ece": f"Expected calibration error ({ECE_BINS} bins)",
        "calibration_slope": "Calibration slope",
        "calibration_intercept": "Calibration intercept",
    },
}
"""Every metric by its name, with its title, under what it judges."""

# Scores of a group's members in order, and where each group starts -> one score per group.
AGGREGATES: dict[str, Callable[[Floats, NDArray[np.intp]], Floats]] = {
    "mean": lambda scores, starts: np.add.reduceat(scores, starts) / np.diff(starts, append=len(scores)),
    "max": lambda scores, starts: np.maximum.reduceat(scores, starts),
    "noisy_or": lambda scores, starts: 1 - np.multiply.reduceat(1 - scores, starts),
}


def aggregate(scores: ArrayLike, groups: ArrayLike, how: str) -> tuple[NDArray[Any], Floats]:
    """The group ids, sorted (G), and one score for each (G), from scores (N) and the group of each (N).

    `how` is `mean`, `max` or `noisy_or` (1 - the product of 1 - score: one finding is enough). Raises UsageError.
    """
    if how not in AGGREGATES:
        raise UsageError(f"aggregate: {how!r} is unknown; known are {', '.join(AGGREGATES)}")
    order, ids, starts = _grouped(groups)
    return ids, AGGREGATES[how](np.asarray(scores, dtype=np.float64)[order], starts)


def _grouped(groups: ArrayLike) -> tuple[NDArray[np.intp], NDArray[Any], NDArray[np.intp]]:
    """An order that brings groups together, the sorted ids, and where each starts in that order."""
    values = np.asarray(groups)
    order = np.argsort(values, kind="stable")
    ids, starts = np.unique(values[order], return_index=True)
    return order, ids, starts


@dataclass(frozen=True, eq=False)
class Sample:
    """Scores to be judged, one row per unit (image, breast or patient).

    `labels` (N) are 0, 1 or NaN = unknown, `scores` (N) lie in [0, 1], `patients` (N) are ids. A refused image has no
    score and does not belong here. Raises UsageError.
    """

    labels: Floats
    scores: Floats
    patients: NDArray[Any]

    def __post_init__(self) -> None:
        for name, dtype in (("labels", np.float64), ("scores", np.float64), ("patients", None)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=dtype))
        if not len(self.labels) == len(self.scores) == len(self.patients):
            raise UsageError(f"labels, scores and patients differ in length: {len(self.labels)}, {len(self.scores)}, {len(self.patients)}")
        _refuse_rows(np.isnan(self.scores), "score", "is NaN: leave refused images out and count them")
        _refuse_rows((self.scores < 0) | (self.scores > 1), "score", "lies outside [0, 1]")
        _refuse_rows(~np.isin(self.labels, (0, 1)) & ~np.isnan(self.labels), "label", "is neither 0, 1 nor unknown (NaN)")

    def known(self) -> Sample:
        """The rows whose label is known."""
        rows = ~np.isnan(self.labels)
        return Sample(self.labels[rows], self.scores[rows], self.patients[rows])

    def aggregate(self, groups: ArrayLike, how: str) -> Sample:
        """One row per group, in the order of the sorted ids; its label is the largest known one. Raises UsageError."""
        order, ids, starts = _grouped(groups)
        patients, (_, owner) = self.patients[order], np.unique(self.patients[order], return_inverse=True)
        strangers = np.minimum.reduceat(owner, starts) != np.maximum.reduceat(owner, starts)
        if strangers.any():
            raise UsageError(f"groups: {np.count_nonzero(strangers)} hold rows of more than one patient, so ids are not unique")
        return Sample(np.fmax.reduceat(self.labels[order], starts), aggregate(self.scores, groups, how)[1], patients[starts])


def _refuse_rows(bad: NDArray[np.bool_], column: str, problem: str) -> None:
    rows = np.flatnonzero(bad)
    if rows.size:
        more = f" and {rows.size - 5} more" if rows.size > 5 else ""
        raise UsageError(f"column {column!r} {problem}: rows {', '.join(map(str, rows[:5]))}{more} (counted from 0)")


@dataclass(frozen=True)
class Confusion:
    """Counts of decisions against labels."""

    tp: int
    fp: int
    fn: int
    tn: int


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


class Ranking:
    """A sample in order of falling score, so that its metrics under thousands of weightings need no further sorting.

    `values` is every metric of `METRICS`, with each row counted as often as its weight says; NaN = not defined.
    """

    def __init__(self, sample: Sample, threshold: float) -> None:
        order = np.argsort(-sample.scores, kind="stable")
        self.labels, self.scores, self.patients = sample.labels[order], sample.scores[order], sample.patients[order]
        self.ends = self._corners(threshold)
        self.called = int(np.count_nonzero(self.scores[self.ends] >= threshold))
        clipped = np.clip(self.scores, np.finfo(float).eps, 1 - np.finfo(float).eps)
        # Metrics that are means over rows, as one matrix product: positives' score, score, squared error, log loss.
        self.terms = np.stack(
            [
                self.labels * self.scores,
                self.scores,
                (self.labels - self.scores) ** 2,
                -np.log(np.where(self.labels == 1, clipped, 1 - clipped)),
            ]
        )
        self.bins = np.minimum((self.scores * ECE_BINS).astype(np.intp), ECE_BINS - 1)
        self.design = np.stack([to_logit(self.scores), np.ones_like(self.scores)])

    def _corners(self, threshold: float) -> NDArray[np.intp]:
        """The last row of each run of equal scores, without those that lie on a straight line of every curve.

        Where a run and the next hold negatives only, no weighting bends the curve between them; with few positives
        this leaves few points. The run that ends at the threshold stays.
        """
        ends = np.flatnonzero(np.diff(self.scores, append=-1.0))
        gains = np.diff(np.cumsum(self.labels)[ends], prepend=0.0, append=np.inf) > 0
        above = self.scores[ends] >= threshold
        return ends[gains[:-1] | gains[1:] | (above & ~np.append(above[1:], False))]

    def curve(self, weights: Floats) -> Curve:
        tp = np.cumsum(weights * self.labels)[self.ends]
        fp = np.cumsum(weights)[self.ends] - tp
        zero = np.zeros(1)
        return Curve(np.append(np.inf, self.scores[self.ends]), np.concatenate([zero, tp]), np.concatenate([zero, fp]))

    def confusion(self, curve: Curve) -> Confusion:
        tp, fp = round(curve.tp[self.called]), round(curve.fp[self.called])
        return Confusion(tp=tp, fp=fp, fn=round(curve.positives) - tp, tn=round(curve.negatives) - fp)

    def values(self, weights: Floats) -> dict[str, float]:
        curve = self.curve(weights)
        return {**_ranking(curve), **_decisions(self.confusion(curve)), **self._probabilities(weights, curve.positives)}

    def _probabilities(self, weights: Floats, positives: float) -> dict[str, float]:
        total = weights.sum()
        hits, scores, squares, losses = self.terms @ weights
        gaps = np.bincount(self.bins, weights * (self.labels - self.scores))
        slope, intercept = self._calibration(weights)
        return {
            "pf1": 2 * hits / (scores + positives) if positives else np.nan,
            "brier": squares / total,
            "log_loss": losses / total,
            "ece": np.abs(gaps).sum() / total,
            "calibration_slope": slope,
            "calibration_intercept": intercept,
        }

    @cached_property
    def _start(self) -> tuple[Floats, Floats]:
        """Slope and intercept, and intercept at slope 1, of the whole sample: where the replicates' fits begin."""
        ones = np.ones_like(self.labels)
        return (
            logistic_regression(self.design, self.labels, ones),
            logistic_regression(self.design[1:], self.labels, ones, offset=self.design[0]),
        )

    def _calibration(self, weights: Floats) -> tuple[float, float]:
        """The slope of the labels' logistic regression on logit(score), and the intercept of one with the slope held at 1.

        Perfect are 1 and 0. Slope < 1: scores too extreme; intercept < 0: scores too high on the whole.

        Source: Van Calster et al., BMC Medicine 17 (2019) 230.
        """
        drawn = weights > 0
        if not overlap(self.design[0][drawn], self.labels[drawn] == 1):
            return np.nan, np.nan
        both, level = self._start
        # From so near, two steps are enough: the rest is far below the spread of the replicates.
        slope = logistic_regression(self.design, self.labels, weights, start=both, tolerance=1e-4)[0]
        intercept = logistic_regression(self.design[1:], self.labels, weights, self.design[0], start=level, tolerance=1e-4)[0]
        return float(slope), float(intercept)


def _ranking(curve: Curve) -> dict[str, float]:
    if not curve.positives or not curve.negatives:
        return dict.fromkeys(METRICS["Ranking"], np.nan)
    return {
        "auroc": curve.auroc(),
        "partial_auroc": curve.partial_auroc(),
        "auprc": curve.auprc(),
        "sensitivity_at_90_specificity": curve.sensitivity_at(0.90),
        "sensitivity_at_95_specificity": curve.sensitivity_at(0.95),
        "specificity_at_90_sensitivity": curve.specificity_at(0.90),
        "specificity_at_95_sensitivity": curve.specificity_at(0.95),
    }


def _decisions(counts: Confusion) -> dict[str, float]:
    tp, fp, fn, tn = counts.tp, counts.fp, counts.fn, counts.tn

    def ratio(part: float, whole: float) -> float:
        return part / whole if whole else np.nan

    f1, f1_negative = ratio(2 * tp, 2 * tp + fp + fn), ratio(2 * tn, 2 * tn + fp + fn)
    return {
        "sensitivity": ratio(tp, tp + fn),
        "specificity": ratio(tn, tn + fp),
        "precision": ratio(tp, tp + fp),
        "npv": ratio(tn, tn + fn),
        "accuracy": ratio(tp + tn, tp + fp + fn + tn),
        "f1": f1,
        "macro_f1": (f1 + f1_negative) / 2,
        "recall_rate": ratio(tp + fp, tp + fp + fn + tn),
    }


@dataclass(frozen=True)
class Metrics:
    """What `measure` found: counts, every metric with its 95 % interval, and why some are NaN."""

    units: int
    """Rows with a known label: what the metrics are computed on."""
    positives: int
    unknown: int
    """Rows left out because their label is unknown."""
    patients: int
    threshold: float
    """A score at or above it is called positive."""
    confusion: Confusion
    intervals: dict[str, Interval]
    """By the names of `METRICS`."""
    undefined: dict[str, str]
    """For each metric that is NaN, the reason."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(sample: Sample, threshold: float, replicates: int = 2000, seed: int = 0) -> Metrics:
    """Every metric of a sample at one threshold, with 95 % percentile intervals over patients drawn with replacement.

    With fewer than two patients the intervals are NaN. An interval that touches a value's bound (AUROC 1) is too narrow:
    no draw from the patients at hand can hold the error that they do not show. Raises UsageError where no label is known.
    """
    known = sample.known()
    if not len(known.labels):
        raise UsageError(f"column 'label': unknown (NaN) in all {len(sample.labels)} rows, so there is nothing to measure against")
    ranking = Ranking(known, threshold)
    ones = np.ones_like(known.scores)
    curve, values = ranking.curve(ones), ranking.values(ones)
    patients = len(np.unique(known.patients))
    low = high = np.full(len(values), np.nan)
    if patients > 1:
        low, high = percentile_limits(resample(lambda w: list(ranking.values(w).values()), ranking.patients, replicates, seed))
    limits = zip(values.items(), low, high, strict=True)
    return Metrics(
        units=len(known.labels),
        positives=round(curve.positives),
        unknown=len(sample.labels) - len(known.labels),
        patients=patients,
        threshold=float(threshold),
        confusion=ranking.confusion(curve),
        intervals={name: Interval(float(value), float(a), float(b)) for (name, value), a, b in limits},
        undefined={name: _reason(name, curve) for name, value in values.items() if np.isnan(value)},
    )


def _reason(name: str, curve: Curve) -> str:
    if not curve.positives or not curve.negatives:
        return f"all {round(curve.positives + curve.negatives)} units have the label {int(curve.positives > 0)}"
    if name.startswith("calibration"):
        return "the scores of the two classes do not overlap"
    return f"no unit is called {'negative' if name == 'npv' else 'positive'} at the threshold"


def pf1(labels: ArrayLike, predictions: ArrayLike) -> float:
    """The probabilistic F1 of Kaggle's RSNA Screening Mammography Breast Cancer Detection (2022), as scored there.

    Predictions are clipped to [0, 1]; predictions that sum to 0 give 0. Raises UsageError where there is no positive,
    a label is not 0 or 1, or a prediction is NaN.
    """
    truth, clipped = np.asarray(labels, dtype=np.float64), np.clip(np.asarray(predictions, dtype=np.float64), 0, 1)
    _refuse_rows(np.isnan(clipped), "prediction", "is NaN")
    _refuse_rows(~np.isin(truth, (0, 1)), "label", "is neither 0 nor 1")
    if not truth.any():
        raise UsageError(f"pF1 is not defined: none of the {len(truth)} labels is 1")
    return float(2 * (truth @ clipped) / (clipped.sum() + truth.sum()))


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
