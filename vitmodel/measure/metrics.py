"""How good scores are, per image, breast and patient, with 95 % intervals over patients. Knows no image and no model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitmodel.measure.bootstrap import Interval, percentile_limits, resample
from vitmodel.measure.calibration import logistic_regression, overlap, to_logit
from vitmodel.measure.curve import MAX_FPR, Curve
from vitmodel.measure.sample import Floats, Sample, refuse_rows
from vitmodel.utils import UsageError

ECE_BINS = 15

METRICS: dict[str, dict[str, str]] = {
    "Ranking": {
        "auroc": "AUROC",
        "partial_auroc": f"Partial AUROC (specificity {100 * (1 - MAX_FPR):.0f} to 100 %, rescaled)",
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


@dataclass(frozen=True)
class Confusion:
    """Counts of decisions against labels."""

    tp: int
    fp: int
    fn: int
    tn: int


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
    refuse_rows(np.isnan(clipped), "prediction", "is NaN")
    refuse_rows(~np.isin(truth, (0, 1)), "label", "is neither 0 nor 1")
    if not truth.any():
        raise UsageError(f"pF1 is not defined: none of the {len(truth)} labels is 1")
    return float(2 * (truth @ clipped) / (clipped.sum() + truth.sum()))
