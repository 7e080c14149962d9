"""How good scores are, per image, breast and patient, with 95 % intervals over patients. Knows no image and no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from vitmodel.errors import UsageError
from vitmodel.metrics.bootstrap import Interval, group_indicator, percentile_limits, resample
from vitmodel.metrics.calibration import logistic_regression
from vitmodel.metrics.curve import MAX_FPR, Curve
from vitmodel.metrics.scored_units import FloatArray, ScoredUnits, check_rows, to_logit

ECE_BINS = 15
KNOTS = 512

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


class RankedUnits:
    """A sample in order of falling score, from which every metric is read as a function of sums over its rows.

    `rows` (F N, sparse) is what each row adds to F sums; `rows @ weights`, with weights N or N B, are the sums F or F B of rows that
    are counted as often as their weight says. So thousands of weightings cost one product, and no further sorting.
    """

    def __init__(self, sample: ScoredUnits, threshold: ArrayLike) -> None:
        """A row is called positive where its score reaches `threshold`, one for all or one for each of the N rows."""
        order = np.argsort(-sample.scores, kind="stable")
        self.labels, self.scores, self.patients = sample.labels[order], sample.scores[order], sample.patients[order]
        called = self.scores >= np.broadcast_to(np.asarray(threshold, dtype=np.float64), order.shape)[order]
        ends = self._corners()
        logits, clipped = to_logit(self.scores), np.clip(self.scores, np.finfo(float).eps, 1 - np.finfo(float).eps)
        terms = {
            "positives": self.labels,
            "total": np.ones_like(self.labels),
            "tp": self.labels * called,
            "called": called.astype(np.float64),
            "hits": self.labels * self.scores,
            "scores": self.scores,
            "squares": (self.labels - self.scores) ** 2,
            "losses": -np.log(np.where(self.labels == 1, clipped, 1 - clipped)),
            "logits": self.labels * logits,
        }
        bins = np.minimum((self.scores * ECE_BINS).astype(np.intp), ECE_BINS - 1)
        runs = group_indicator(np.searchsorted(ends, np.arange(len(order))))
        self.knots, near = _spread(logits)
        parts = (
            sparse.csr_array(np.stack(list(terms.values()))),
            runs * self.labels,
            runs,
            group_indicator(bins) * (self.labels - self.scores),
            near,
        )
        self.rows = sparse.vstack(parts, format="csr")
        self.names, self.thresholds = list(terms), np.append(np.inf, self.scores[ends])
        self.ends = np.cumsum([part.shape[0] for part in parts])[:-1]
        self.start: FloatArray | None = None
        named, curve, _, near = self._parts(self.rows.sum(axis=1)[:, None])
        self.start = self._calibration(named, curve, near)[:, 0]

    def _corners(self) -> NDArray[np.intp]:
        """The last row of each run of equal scores, without those that lie on a straight line of every curve.

        Where a run and the next hold negatives only, no weighting bends the curve between them; with few positives
        this leaves few points.
        """
        ends = np.flatnonzero(np.diff(self.scores, append=-1.0))
        gains = np.diff(np.cumsum(self.labels)[ends], prepend=0.0, append=np.inf) > 0
        return ends[gains[:-1] | gains[1:]]

    def _parts(self, sums: FloatArray) -> tuple[dict[str, FloatArray], Curve, FloatArray, FloatArray]:
        """What sums F B hold: those with a name, the curve, positives minus scores in each bin of the ECE, weights at the knots."""
        named, tp, total, gaps, near = np.split(sums, self.ends)
        zero = np.zeros_like(sums[:1])
        tp, total = (np.concatenate([zero, np.cumsum(part, axis=0)]) for part in (tp, total))
        return dict(zip(self.names, named, strict=True)), Curve(self.thresholds, tp, total - tp), gaps, near

    def curve(self, sums: FloatArray | None = None) -> Curve:
        """The curve of sums F or F B, of the sample as it is where none are given."""
        return self._parts(self.rows.sum(axis=1) if sums is None else sums)[1]

    def confusion(self) -> Confusion:
        named = self._parts(self.rows.sum(axis=1))[0]
        return Confusion(**{name: round(float(count)) for name, count in _counts(named).items()})

    def metric_values(self, sums: FloatArray | None = None) -> dict[str, FloatArray]:
        """Every metric of `METRICS` from sums F or F B, of the sample as it is where none are given; NaN = not defined."""
        sums = self.rows.sum(axis=1) if sums is None else sums
        named, curve, gaps, near = self._parts(sums.reshape(len(sums), -1))
        with np.errstate(divide="ignore", invalid="ignore"):
            slope, _, intercept = self._calibration(named, curve, near)
            values = _ranking(curve) | _decisions(**_counts(named))
            values |= {
                "pf1": np.where(
                    named["positives"] > 0, 2 * named["hits"] / (named["scores"] + named["positives"]), np.nan
                ),
                "brier": named["squares"] / named["total"],
                "log_loss": named["losses"] / named["total"],
                "ece": np.abs(gaps).sum(axis=0) / named["total"],
                "calibration_slope": slope,
                "calibration_intercept": intercept,
            }
        return {name: value.reshape(sums.shape[1:]) for name, value in values.items()}

    def _calibration(self, named: Mapping[str, FloatArray], curve: Curve, near: FloatArray) -> FloatArray:
        """Slope and intercept of the labels' logistic regression on logit(score), and the intercept of one with the slope 1: 3 B.

        Perfect are a slope of 1 and, at it, an intercept of 0. Slope < 1: scores too extreme; intercept < 0: too high on the whole.
        NaN where a cut separates the classes: where the first run that holds any of one class ends with all of the other.

        Source: Van Calster et al., BMC Medicine 17 (2019) 230.
        """
        separated = (_first(curve.fp, curve.tp) >= curve.positives) | (_first(curve.tp, curve.fp) >= curve.negatives)
        found = np.full((3, len(separated)), np.nan)
        if not separated.all():
            design, weights = np.stack([self.knots, np.ones_like(self.knots)]), near[:, ~separated]
            hits = np.stack([named["logits"], named["positives"]])[:, ~separated]
            start, level = (None, None) if self.start is None else np.split(self.start, [2])
            found[:2, ~separated] = logistic_regression(design, hits, weights, start=start)
            found[2, ~separated] = logistic_regression(design[1:], hits[1:], weights, self.knots, start=level)[0]
        return found


def _spread(values: FloatArray) -> tuple[FloatArray, sparse.csr_array]:
    """Knots (K) and the weights (K N) that share each value out between the two knots beside it.

    A sum over rows of a smooth function of the values is then, for all weightings alike, one over knots: without error where few
    values differ, for they are the knots, and else with one of second order in the knots' distance.
    """
    knots = np.unique(values)
    if len(knots) > KNOTS:
        knots = np.linspace(knots[0], knots[-1], KNOTS)
    right = np.clip(np.searchsorted(knots, values), 1, max(len(knots) - 1, 1))
    at = np.arange(len(values))
    if len(knots) == 1:
        return knots, group_indicator(np.zeros_like(at))
    part = (values - knots[right - 1]) / (knots[right] - knots[right - 1])
    entries = np.concatenate([1 - part, part]), (np.concatenate([right - 1, right]), np.concatenate([at, at]))
    return knots, sparse.csr_array(entries, shape=(len(knots), len(values)))


def _first(rising: FloatArray, other: FloatArray) -> FloatArray:
    """`other` (T or T B) where `rising` leaves 0 first."""
    at = np.argmax(rising > 0, axis=0)
    return np.take_along_axis(other, at[None], axis=0)[0]


def _ranking(curve: Curve) -> dict[str, FloatArray]:
    defined = (curve.positives > 0) & (curve.negatives > 0)
    values = {
        "auroc": curve.auroc(),
        "partial_auroc": curve.partial_auroc(),
        "auprc": curve.auprc(),
        "sensitivity_at_90_specificity": curve.sensitivity_at(0.90),
        "sensitivity_at_95_specificity": curve.sensitivity_at(0.95),
        "specificity_at_90_sensitivity": curve.specificity_at(0.90),
        "specificity_at_95_sensitivity": curve.specificity_at(0.95),
    }
    return {name: np.where(defined, value, np.nan) for name, value in values.items()}


def _counts(sums: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    tp, fp = sums["tp"], sums["called"] - sums["tp"]
    return {"tp": tp, "fp": fp, "fn": sums["positives"] - tp, "tn": sums["total"] - sums["positives"] - fp}


def _decisions(tp: FloatArray, fp: FloatArray, fn: FloatArray, tn: FloatArray) -> dict[str, FloatArray]:
    """Ratios of counts; 0 / 0 is NaN."""
    total = tp + fp + fn + tn
    f1, f1_negative = 2 * tp / (2 * tp + fp + fn), 2 * tn / (2 * tn + fp + fn)
    return {
        "sensitivity": tp / (tp + fn),
        "specificity": tn / (tn + fp),
        "precision": tp / (tp + fp),
        "npv": tn / (tn + fn),
        "accuracy": (tp + tn) / total,
        "f1": f1,
        "macro_f1": (f1 + f1_negative) / 2,
        "recall_rate": (tp + fp) / total,
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
    """A score at or above it is called positive; NaN where rows have thresholds of their own."""
    confusion: Confusion
    intervals: dict[str, Interval]
    """By the names of `METRICS`."""
    undefined: dict[str, str]
    """For each metric that is NaN, the reason."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compute_metrics(
    sample: ScoredUnits, threshold: ArrayLike, replicates: int = 2000, seed: int = 0, prevalence: float | None = None
) -> Metrics:
    """Every metric of a sample at one threshold, or at one for each row, with 95 % percentile intervals over patients drawn with
    replacement.

    With a `prevalence`, positives and negatives are weighted so that they stand in that proportion, in every replicate; the scores
    must suit it (`calibration.to_prevalence`). With fewer than two patients, or where all draws give one value, the limits are NaN.
    An interval that touches a value's bound (AUROC 1) is too narrow: no draw from the patients at hand can hold the error that they
    do not show. Raises UsageError where no label is known.
    """
    known = np.isfinite(sample.labels)
    if not known.any():
        raise UsageError(
            f"column 'label': unknown (NaN) in all {len(sample.labels)} rows, so there is nothing to measure against"
        )
    thresholds = np.broadcast_to(np.asarray(threshold, dtype=np.float64), known.shape)[known]
    ranking = RankedUnits(sample.labelled(), thresholds)
    rows: sparse.csr_array = ranking.rows
    statistic: Callable[[FloatArray], dict[str, FloatArray]] = ranking.metric_values
    if prevalence is not None:
        rows, statistic = _reweighted(ranking, prevalence)
    values = {name: float(value) for name, value in statistic(rows.sum(axis=1)).items()}
    patients = len(np.unique(ranking.patients))
    low = high = np.full(len(values), np.nan)
    if patients > 1:
        replicated = resample(rows, lambda sums: list(statistic(sums).values()), ranking.patients, replicates, seed)
        low, high = percentile_limits(replicated)
        low, high = (
            np.where(low < high, limit, np.nan) for limit in (low, high)
        )  # no sample of patients gives certainty
    limits = zip(values.items(), low, high, strict=True)
    labels = ranking.labels
    return Metrics(
        units=len(labels),
        positives=int(labels.sum()),
        unknown=len(sample.labels) - len(labels),
        patients=patients,
        threshold=float(thresholds[0]) if (thresholds == thresholds[0]).all() else np.nan,
        confusion=ranking.confusion(),
        intervals={name: Interval(value, float(a), float(b)) for (name, value), a, b in limits},
        undefined={name: _reason(name, labels) for name, value in values.items() if np.isnan(value)},
    )


def _reweighted(
    ranking: RankedUnits, prevalence: float
) -> tuple[sparse.csr_array, Callable[[FloatArray], dict[str, FloatArray]]]:
    """The sums over positives and, below them, over negatives (2F N), and the metrics of both mixed to a prevalence."""
    rows = sparse.vstack([ranking.rows * ranking.labels, ranking.rows * (1 - ranking.labels)], format="csr")
    total = ranking.names.index("total")

    def values(sums: FloatArray) -> dict[str, FloatArray]:
        positives, negatives = np.split(sums, 2)
        with np.errstate(divide="ignore", invalid="ignore"):
            return ranking.metric_values(
                positives / positives[total] * prevalence + negatives / negatives[total] * (1 - prevalence)
            )

    return rows, values


def _reason(name: str, labels: FloatArray) -> str:
    if (labels == labels[0]).all():
        return f"all {len(labels)} units have the label {int(labels[0])}"
    if name.startswith("calibration"):
        return "the scores of the two classes do not overlap"
    return f"no unit is called {'negative' if name == 'npv' else 'positive'} at the threshold"


def pf1(labels: ArrayLike, predictions: ArrayLike) -> float:
    """The probabilistic F1 of Kaggle's RSNA Screening Mammography Breast Cancer Detection (2022), as scored there.

    Predictions are clipped to [0, 1]; predictions that sum to 0 give 0. Raises UsageError where there is no positive,
    a label is not 0 or 1, or a prediction is NaN.
    """
    truth, clipped = np.asarray(labels, dtype=np.float64), np.clip(np.asarray(predictions, dtype=np.float64), 0, 1)
    check_rows(np.isnan(clipped), "prediction", "is NaN")
    check_rows(~np.isin(truth, (0, 1)), "label", "is neither 0 nor 1")
    if not truth.any():
        raise UsageError(f"pF1 is not defined: none of the {len(truth)} labels is 1")
    return float(2 * (truth @ clipped) / (clipped.sum() + truth.sum()))
