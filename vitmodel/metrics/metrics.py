"""Metrics of scored units (images, breasts or patients), with 95 % bootstrap intervals over patients."""

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
"""Number of equally wide bins of the expected calibration error."""
KNOTS = 512
"""Maximum number of knots on which the calibration's logistic regression is summed."""

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
"""Titles of all metrics by name, grouped by what they measure."""


@dataclass(frozen=True)
class Confusion:
    """Confusion matrix: counts of decisions by label."""

    tp: int
    fp: int
    fn: int
    tn: int


class RankedUnits:
    """A sample sorted by falling score, with all metrics available as functions of sums over its rows.

    The sparse matrix `rows`, `(F, N)`, holds the contribution of each of N rows to F sums. `rows @ weights`, with
    weights `(N,)` or `(N, B)`, gives the sums `(F,)` or `(F, B)` of rows counted as often as their weight says.
    Thousands of bootstrap weightings therefore cost one product and no further sorting.
    """

    def __init__(self, sample: ScoredUnits, threshold: ArrayLike) -> None:
        """Sort the sample.

        Args:
            sample: Units whose labels are all known.
            threshold: A score at or above it is called positive: one number, or one per row, `(N,)`.
        """
        order = np.argsort(-sample.scores, kind="stable")
        self.labels = sample.labels[order]
        self.scores = sample.scores[order]
        self.patients = sample.patients[order]
        called = self.scores >= np.broadcast_to(np.asarray(threshold, dtype=np.float64), order.shape)[order]
        logits = to_logit(self.scores)
        terms = self._terms(called, logits)
        run_ends = self._run_ends()
        run_rows = group_indicator(np.searchsorted(run_ends, np.arange(len(order))))
        bins = np.minimum((self.scores * ECE_BINS).astype(np.intp), ECE_BINS - 1)
        self.knots, knot_weights = _knots(logits)
        parts = (
            sparse.csr_array(np.stack(list(terms.values()))),
            run_rows * self.labels,
            run_rows,
            group_indicator(bins) * (self.labels - self.scores),
            knot_weights,
        )
        self.rows = sparse.vstack(parts, format="csr")
        self.names = list(terms)
        self.thresholds = np.append(np.inf, self.scores[run_ends])
        self.ends = np.cumsum([part.shape[0] for part in parts])[:-1]
        # The solution for the whole sample is the starting point for all weightings.
        self.start: FloatArray | None = None
        named, curve, _, knot_sums = self._split_sums(self.rows.sum(axis=1)[:, None])
        self.start = self._calibration(named, curve, knot_sums)[:, 0]

    def _terms(self, called: NDArray[np.bool_], logits: FloatArray) -> dict[str, FloatArray]:
        """Return the contribution of each row, `(N,)`, to each named sum."""
        clipped = np.clip(self.scores, np.finfo(float).eps, 1 - np.finfo(float).eps)
        return {
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

    def _run_ends(self) -> NDArray[np.intp]:
        """Return the last row of each run of equal scores, except where the curve cannot bend.

        If a run and the next one hold negatives only, the curve is straight between them under any weighting. With
        few positives, few points remain.
        """
        ends = np.flatnonzero(np.diff(self.scores, append=-1.0))
        has_positive = np.diff(np.cumsum(self.labels)[ends], prepend=0.0, append=np.inf) > 0
        return ends[has_positive[:-1] | has_positive[1:]]

    def _split_sums(self, sums: FloatArray) -> tuple[dict[str, FloatArray], Curve, FloatArray, FloatArray]:
        """Return the parts of sums `(F,)` or `(F, B)`.

        These are the named sums, the curve, the sum of label - score in each bin of the ECE, and the weight at each
        knot.
        """
        named, tp, total, bin_gaps, knot_sums = np.split(sums, self.ends)
        zero = np.zeros_like(sums[:1])
        tp = np.concatenate([zero, np.cumsum(tp, axis=0)])
        total = np.concatenate([zero, np.cumsum(total, axis=0)])
        curve = Curve(self.thresholds, tp, total - tp)
        return dict(zip(self.names, named, strict=True)), curve, bin_gaps, knot_sums

    def curve(self, sums: FloatArray | None = None) -> Curve:
        """Return the curve of sums `(F,)` or `(F, B)`; None = the unweighted sample."""
        return self._split_sums(self.rows.sum(axis=1) if sums is None else sums)[1]

    def confusion(self) -> Confusion:
        """Return the confusion matrix of the unweighted sample."""
        named = self._split_sums(self.rows.sum(axis=1))[0]
        return _confusion(named)

    def metric_values(self, sums: FloatArray | None = None) -> dict[str, FloatArray]:
        """Return every metric of `METRICS` by name.

        Args:
            sums: Sums over rows, `(F,)` or `(F, B)`; None = the unweighted sample.

        Returns:
            Values of shape `()` or `(B,)`; NaN = not defined.
        """
        sums = self.rows.sum(axis=1) if sums is None else sums
        named, curve, bin_gaps, knot_sums = self._split_sums(sums.reshape(len(sums), -1))
        with np.errstate(divide="ignore", invalid="ignore"):
            slope, _, intercept = self._calibration(named, curve, knot_sums)
            expected_f1 = 2 * named["hits"] / (named["scores"] + named["positives"])
            values = _ranking(curve) | _decisions(**_counts(named))
            values |= {
                "pf1": np.where(named["positives"] > 0, expected_f1, np.nan),
                "brier": named["squares"] / named["total"],
                "log_loss": named["losses"] / named["total"],
                "ece": np.abs(bin_gaps).sum(axis=0) / named["total"],
                "calibration_slope": slope,
                "calibration_intercept": intercept,
            }
        return {name: value.reshape(sums.shape[1:]) for name, value in values.items()}

    def _calibration(self, named: Mapping[str, FloatArray], curve: Curve, knot_sums: FloatArray) -> FloatArray:
        """Return the calibration coefficients of B weightings, `(3, B)`.

        These are slope and intercept of the logistic regression of the labels on logit(score), and the intercept of
        one with the slope fixed at 1 (the metric). A perfect calibration has a slope of 1 and this intercept at 0. A
        slope below 1 means that scores are too extreme, an intercept below 0 that they are too high overall. The
        coefficients are NaN where a cut separates the classes: by the end of the first run that contains one class,
        all units of the other class have occurred.

        Source: Van Calster et al., BMC Medicine 17 (2019) 230.
        """
        all_positives_first = _at_first_rise(curve.fp, curve.tp) >= curve.positives
        all_negatives_first = _at_first_rise(curve.tp, curve.fp) >= curve.negatives
        fitted = ~(all_positives_first | all_negatives_first)
        coefficients = np.full((3, len(fitted)), np.nan)
        if fitted.any():
            design = np.stack([self.knots, np.ones_like(self.knots)])
            weights = knot_sums[:, fitted]
            hits = np.stack([named["logits"], named["positives"]])[:, fitted]
            start, intercept_start = (None, None) if self.start is None else np.split(self.start, [2])
            coefficients[:2, fitted] = logistic_regression(design, hits, weights, start=start)
            coefficients[2, fitted] = logistic_regression(
                design[1:], hits[1:], weights, self.knots, start=intercept_start
            )[0]
        return coefficients


def _knots(values: FloatArray) -> tuple[FloatArray, sparse.csr_array]:
    """Return knots, `(K,)`, and the weights, `(K, N)`, that distribute each value over its two neighbouring knots.

    A sum over rows of a smooth function of the values then becomes a sum over knots, for all weightings alike. With
    at most `KNOTS` distinct values, they are the knots and the sum is exact; otherwise its error is of second order
    in the distance of the knots.
    """
    knots = np.unique(values)
    if len(knots) > KNOTS:
        knots = np.linspace(knots[0], knots[-1], KNOTS)
    right = np.clip(np.searchsorted(knots, values), 1, max(len(knots) - 1, 1))
    rows = np.arange(len(values))
    if len(knots) == 1:
        return knots, group_indicator(np.zeros_like(rows))
    fraction = (values - knots[right - 1]) / (knots[right] - knots[right - 1])
    weights = np.concatenate([1 - fraction, fraction])
    positions = (np.concatenate([right - 1, right]), np.concatenate([rows, rows]))
    return knots, sparse.csr_array((weights, positions), shape=(len(knots), len(values)))


def _at_first_rise(rising: FloatArray, other: FloatArray) -> FloatArray:
    """Return the value of `other`, `(T,)` or `(T, B)`, at the first point where `rising` is above 0."""
    index = np.argmax(rising > 0, axis=0)
    return np.take_along_axis(other, index[None], axis=0)[0]


def _ranking(curve: Curve) -> dict[str, FloatArray]:
    """Return the metrics that need no decision threshold; NaN where a class has no weight."""
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
    """Return the four cells of the confusion matrix."""
    tp = sums["tp"]
    fp = sums["called"] - tp
    return {"tp": tp, "fp": fp, "fn": sums["positives"] - tp, "tn": sums["total"] - sums["positives"] - fp}


def _confusion(sums: Mapping[str, FloatArray]) -> Confusion:
    """Return the confusion matrix of an unweighted sample."""
    return Confusion(**{name: round(float(count)) for name, count in _counts(sums).items()})


def _decisions(tp: FloatArray, fp: FloatArray, fn: FloatArray, tn: FloatArray) -> dict[str, FloatArray]:
    """Return the metrics that are ratios of counts; 0 / 0 is NaN."""
    total = tp + fp + fn + tn
    f1 = 2 * tp / (2 * tp + fp + fn)
    f1_negative = 2 * tn / (2 * tn + fp + fn)
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
    """The result of `compute_metrics`: counts, every metric with its 95 % interval, and reasons for undefined ones."""

    units: int
    """Number of rows with a known label, on which the metrics are computed."""
    positives: int
    unknown: int
    """Number of rows left out because their label is unknown."""
    patients: int
    threshold: float
    """A score at or above it is called positive; NaN if the rows have individual thresholds."""
    confusion: Confusion
    intervals: dict[str, Interval]
    """Value and interval of each metric, by the names in `METRICS`."""
    undefined: dict[str, str]
    """The reason for each metric that is NaN."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def compute_metrics(
    sample: ScoredUnits, threshold: ArrayLike, replicates: int = 2000, seed: int = 0, prevalence: float | None = None
) -> Metrics:
    """Return every metric of a sample with its 95 % percentile interval over patients drawn with replacement.

    Limits are NaN with fewer than two patients, or if all draws give one value. An interval at the bound of a metric
    (AUROC 1) is too narrow: no draw from the patients at hand can contain an error that they do not show.

    Args:
        sample: Labels, scores and patients of the units; units with an unknown label are left out.
        threshold: A score at or above it is called positive: one number, or one per unit, `(N,)`.
        replicates: Number of bootstrap replicates.
        seed: Seed of the bootstrap.
        prevalence: If given, positives and negatives are weighted to this fraction of positives, in every replicate.
            The scores must be calibrated for it (`calibration.to_prevalence`).

    Raises:
        UsageError: No label is known.
    """
    is_known = np.isfinite(sample.labels)
    if not is_known.any():
        raise UsageError(
            f"column 'label': unknown (NaN) in all {len(sample.labels)} rows; give labels to compute metrics against"
        )
    thresholds = np.broadcast_to(np.asarray(threshold, dtype=np.float64), is_known.shape)[is_known]
    ranking = RankedUnits(sample.labelled(), thresholds)
    rows: sparse.csr_array = ranking.rows
    statistic: Callable[[FloatArray], dict[str, FloatArray]] = ranking.metric_values
    if prevalence is not None:
        rows, statistic = _reweighted(ranking, prevalence)
    intervals = _intervals(rows, statistic, ranking.patients, replicates, seed)
    labels = ranking.labels
    return Metrics(
        units=len(labels),
        positives=int(labels.sum()),
        unknown=len(sample.labels) - len(labels),
        patients=len(np.unique(ranking.patients)),
        threshold=float(thresholds[0]) if (thresholds == thresholds[0]).all() else np.nan,
        confusion=ranking.confusion(),
        intervals=intervals,
        undefined={name: _reason_undefined(name, labels) for name, found in intervals.items() if np.isnan(found.value)},
    )


def compute_decisions(
    sample: ScoredUnits, threshold: float, replicates: int = 2000, seed: int = 0
) -> tuple[Confusion, dict[str, Interval]]:
    """Return the confusion matrix and the metrics of decisions at a threshold, as `compute_metrics` does.

    It leaves out all metrics of ranking and calibration and is therefore fast enough for a threshold that is moved.

    Args:
        sample: Labels, scores and patients of the units; units with an unknown label are left out.
        threshold: A score at or above it is called positive.
        replicates: Number of bootstrap replicates over patients.
        seed: Seed of the bootstrap.
    """
    known = sample.labelled()
    called = (known.scores >= threshold).astype(np.float64)
    terms = {
        "positives": known.labels,
        "total": np.ones_like(known.labels),
        "tp": known.labels * called,
        "called": called,
    }
    rows = sparse.csr_array(np.stack(list(terms.values())))

    def statistic(sums: FloatArray) -> dict[str, FloatArray]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return _decisions(**_counts(dict(zip(terms, sums, strict=True))))

    confusion = _confusion({name: values.sum() for name, values in terms.items()})
    return confusion, _intervals(rows, statistic, known.patients, replicates, seed)


def _intervals(
    rows: sparse.csr_array,
    statistic: Callable[[FloatArray], dict[str, FloatArray]],
    patients: NDArray[Any],
    replicates: int,
    seed: int,
) -> dict[str, Interval]:
    """Return the values of a statistic of sums with their 95 % percentile intervals over patients."""
    values = {name: float(value) for name, value in statistic(rows.sum(axis=1)).items()}
    low = high = np.full(len(values), np.nan)
    if len(np.unique(patients)) > 1:
        replicated = resample(rows, lambda sums: list(statistic(sums).values()), patients, replicates, seed)
        low, high = percentile_limits(replicated)
        has_width = low < high  # an interval of width 0 would claim certainty
        low = np.where(has_width, low, np.nan)
        high = np.where(has_width, high, np.nan)
    return {name: Interval(value, float(low[k]), float(high[k])) for k, (name, value) in enumerate(values.items())}


def _reweighted(
    ranking: RankedUnits, prevalence: float
) -> tuple[sparse.csr_array, Callable[[FloatArray], dict[str, FloatArray]]]:
    """Return row contributions with separate sums per class, and the metrics of both classes mixed to a prevalence.

    The contributions, `(2F, N)`, hold the sums over positives first and those over negatives second.
    """
    rows = sparse.vstack([ranking.rows * ranking.labels, ranking.rows * (1 - ranking.labels)], format="csr")
    total = ranking.names.index("total")

    def values(sums: FloatArray) -> dict[str, FloatArray]:
        positives, negatives = np.split(sums, 2)
        with np.errstate(divide="ignore", invalid="ignore"):
            mixed = positives / positives[total] * prevalence + negatives / negatives[total] * (1 - prevalence)
            return ranking.metric_values(mixed)

    return rows, values


def _reason_undefined(name: str, labels: FloatArray) -> str:
    """Return why a metric is NaN."""
    if (labels == labels[0]).all():
        return f"all {len(labels)} units have the label {int(labels[0])}"
    if name.startswith("calibration"):
        return "the scores of the two classes do not overlap"
    decision = "negative" if name == "npv" else "positive"
    return f"no unit is called {decision} at the threshold"


def pf1(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Return the probabilistic F1 (pF1) as computed by Kaggle.

    Source: RSNA Screening Mammography Breast Cancer Detection, Kaggle (2022).

    Args:
        labels: 0 or 1, `(N,)`.
        predictions: Probabilities, `(N,)`, clipped to [0, 1]. If they sum to 0, pF1 is 0.

    Raises:
        UsageError: There is no positive, a label is not 0 or 1, or a prediction is NaN.
    """
    truth = np.asarray(labels, dtype=np.float64)
    clipped = np.clip(np.asarray(predictions, dtype=np.float64), 0, 1)
    check_rows(np.isnan(clipped), "prediction", "is NaN")
    check_rows(~np.isin(truth, (0, 1)), "label", "is neither 0 nor 1")
    if not truth.any():
        raise UsageError(
            f"labels: none of the {len(truth)} labels is 1, so pF1 is not defined; give at least one positive"
        )
    return float(2 * (truth @ clipped) / (clipped.sum() + truth.sum()))
