"""Predictions of columns other than the label: calibration of several classes, and metrics with patient intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from vitmodel.metrics.bootstrap import Interval, percentile_limits, resample
from vitmodel.metrics.calibration import MIN_SLOPE
from vitmodel.metrics.metrics import RankedUnits
from vitmodel.metrics.scored_units import FloatArray, ScoredUnits

MULTICLASS_METRICS = {
    "macro_auroc": "Macro AUROC",
    "accuracy": "Accuracy",
    "quadratic_kappa": "Quadratic weighted kappa",
    "mean_absolute_error": "Mean absolute error (years)",
}
"""Titles of the metrics of an auxiliary output by name."""


@dataclass(frozen=True)
class SoftmaxCalibration:
    """Temperature scaling with class biases: softmax(slope * logits + biases).

    The slope is 1 / temperature. The biases correct for class frequencies that the sampling of the training changed.
    With two classes and logits (0, z) this is Platt scaling. Fit it to units that the model was not trained on.

    Source: Alexandari, Kundaje and Shrikumar, ICML 2020 (bias-corrected temperature scaling).
    """

    slope: float
    biases: tuple[float, ...]
    """`(K,)` for K classes; their sum is 0."""
    units: int
    """Number of units that it was fitted to."""

    @classmethod
    def fit(cls, labels: ArrayLike, logits: ArrayLike) -> Self | None:
        """Return the calibration with the smallest cross entropy, or None if fewer than two classes are known.

        The targets are Platt's, for K classes: (n + 1) / (n + K) for the true class, which n units have, and
        1 / (n + K) for each other class. With them a fit to separated or to absent classes stays finite.

        Args:
            labels: Class of each unit, 0 to K - 1, or NaN = unknown (left out), `(N,)`.
            logits: `(N, K)`.
        """
        known = ~np.isnan(np.asarray(labels, dtype=np.float64))
        classes = np.asarray(labels, dtype=np.float64)[known].astype(np.intp)
        if len(np.unique(classes)) < 2:
            return None
        known_logits = np.asarray(logits, dtype=np.float64)[known]
        count = known_logits.shape[1]
        sizes = np.bincount(classes, minlength=count)[classes][:, None]
        targets = (1 + sizes * np.eye(count)[classes]) / (sizes + count)

        def loss_and_gradient(parameters: FloatArray) -> tuple[float, FloatArray]:
            log_probabilities = log_softmax(parameters[0] * known_logits + parameters[1:], axis=1)
            excess = np.exp(log_probabilities) - targets
            gradient = np.append((excess * known_logits).sum(), excess.sum(axis=0))
            return float(-(targets * log_probabilities).sum() / len(classes)), gradient / len(classes)

        bounds = [(MIN_SLOPE, None), *[(None, None)] * count]
        start = np.append(1.0, np.zeros(count))
        options = {"ftol": 1e-14, "gtol": 1e-9, "maxiter": 1000}
        fitted = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
        return cls(float(fitted[0]), tuple((fitted[1:] - fitted[1:].mean()).tolist()), len(classes))

    def apply(self, logits: ArrayLike) -> FloatArray:
        """Return the probabilities `(N, K)` of logits `(N, K)`; NaN stays NaN."""
        return np.asarray(softmax(self.slope * np.asarray(logits, dtype=np.float64) + np.asarray(self.biases), axis=1))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; `from_dict` reads them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the calibration that `to_dict` wrote."""
        return cls(float(values["slope"]), tuple(values["biases"]), int(values["units"]))


@dataclass(frozen=True, kw_only=True)
class AuxiliaryMetrics:
    """The agreement of an auxiliary output with its known values."""

    units: int
    """Number of units with a known value."""
    patients: int
    """Number of their patients."""
    intervals: Mapping[str, Interval]
    """The metrics of `MULTICLASS_METRICS` that apply, by name."""
    classes: tuple[str, ...] = ()
    """Names of the K classes; empty for a number."""
    confusion: tuple[tuple[int, ...], ...] = ()
    """Number of units by true class (row) and most probable class (column), `(K, K)`."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Bootstrap:
    """Settings of the bootstrap over patients."""

    replicates: int
    seed: int = 0


def class_metrics(
    labels: FloatArray,
    probabilities: FloatArray,
    patients: ArrayLike,
    classes: Sequence[str],
    ordinal: Sequence[str],
    bootstrap: Bootstrap,
) -> AuxiliaryMetrics:
    """Return macro AUROC, accuracy and, for ordered classes, quadratic kappa of predicted classes.

    The macro AUROC is the mean over the classes of the AUROC of the class against all others, over the classes that
    occur. A replicate without one of these has no value. Kappa is computed over the units whose true class has a place
    in the order; the predicted class is then the most probable one among those with a place.

    Args:
        labels: Class of each unit, 0 to K - 1, or NaN = unknown (left out), `(N,)`.
        probabilities: `(N, K)`.
        patients: Patient of each unit, `(N,)`.
        classes: Names of the classes.
        ordinal: Names of the classes that have an order, from low to high; empty if none have.
        bootstrap: Settings of the intervals.
    """
    known = ~np.isnan(labels)
    truth = labels[known].astype(np.intp)
    probabilities = probabilities[known]
    owners = np.asarray(patients)[known]
    confusion = confusion_matrix(truth, probabilities.argmax(axis=1), len(classes))
    correct = (probabilities.argmax(axis=1) == truth).astype(np.float64)
    intervals = {
        "macro_auroc": _macro_auroc(truth, probabilities, owners, bootstrap),
        "accuracy": _mean(correct, owners, bootstrap),
    }
    if ordinal:
        places = [list(classes).index(name) for name in ordinal]
        placed = np.isin(truth, places)
        predicted = probabilities[placed][:, places].argmax(axis=1)
        ranks = np.searchsorted(places, truth[placed])
        intervals["quadratic_kappa"] = _quadratic_kappa(ranks, predicted, len(places), owners[placed], bootstrap)
    return AuxiliaryMetrics(
        units=len(truth),
        patients=len(np.unique(owners)),
        intervals=intervals,
        classes=tuple(classes),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
    )


def number_metrics(
    values: FloatArray, predictions: FloatArray, patients: ArrayLike, bootstrap: Bootstrap
) -> AuxiliaryMetrics:
    """Return the mean absolute error of predicted numbers, `(N,)` each; a value of NaN is unknown and left out."""
    known = ~np.isnan(values)
    owners = np.asarray(patients)[known]
    error = _mean(np.abs(predictions - values)[known], owners, bootstrap)
    return AuxiliaryMetrics(
        units=int(known.sum()), patients=len(np.unique(owners)), intervals={"mean_absolute_error": error}
    )


def confusion_matrix(truth: NDArray[np.intp], predicted: NDArray[np.intp], count: int) -> NDArray[np.intp]:
    """Return the number of units by true class (row) and predicted class (column), `(count, count)`."""
    return np.bincount(truth * count + predicted, minlength=count * count).reshape(count, count)


def quadratic_kappa(confusion: FloatArray) -> FloatArray:
    """Return Cohen's kappa with quadratic weights of confusion matrices `(K, K, B)`, `(B,)`; NaN = not defined.

    Source: Cohen, Psychological Bulletin 70 (1968) 213-220.
    """
    ranks = np.arange(len(confusion))
    weights = (ranks[:, None] - ranks) ** 2.0
    observed = np.tensordot(weights, confusion, axes=2)
    by_chance = confusion.sum(axis=1)[:, None] * confusion.sum(axis=0)[None]  # (K, K, B)
    expected = np.tensordot(weights, by_chance, axes=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(1 - observed * confusion.sum(axis=(0, 1)) / expected)


def _quadratic_kappa(
    truth: NDArray[np.intp], predicted: NDArray[np.intp], count: int, patients: ArrayLike, bootstrap: Bootstrap
) -> Interval:
    """Return the quadratic kappa with its interval; NaN without a unit."""
    if not len(truth):
        return Interval(np.nan, np.nan, np.nan)
    cells = np.eye(count * count)[truth * count + predicted].T  # (count ** 2, N)
    return _interval(
        quadratic_kappa(cells.sum(axis=1).reshape(count, count, 1)),
        resample(
            cells,
            lambda sums: quadratic_kappa(sums.reshape(count, count, -1))[None],
            patients,
            bootstrap.replicates,
            bootstrap.seed,
        ),
    )


def _macro_auroc(
    truth: NDArray[np.intp], probabilities: FloatArray, patients: NDArray[Any], bootstrap: Bootstrap
) -> Interval:
    """Return the macro AUROC with its interval. The draws of all classes are the same, because the seed is."""
    values = []
    replicates = []
    occurring = np.unique(truth)
    for number in occurring if len(occurring) > 1 else ():
        ranking = RankedUnits(ScoredUnits(truth == number, probabilities[:, number], patients), 0.5)

        def auroc(sums: FloatArray, ranking: RankedUnits = ranking) -> FloatArray:
            with np.errstate(divide="ignore", invalid="ignore"):
                return ranking.curve(sums).auroc()[None]

        values.append(ranking.curve().auroc())
        replicates.append(resample(ranking.rows, auroc, ranking.patients, bootstrap.replicates, bootstrap.seed))
    if not values:
        return Interval(np.nan, np.nan, np.nan)
    return _interval(np.mean(values, axis=0), np.mean(replicates, axis=0))


def _mean(values: FloatArray, patients: ArrayLike, bootstrap: Bootstrap) -> Interval:
    """Return the mean of values `(N,)` with its interval."""
    rows = np.stack([values, np.ones_like(values)])
    replicates = resample(rows, lambda sums: sums[:1] / sums[1:], patients, bootstrap.replicates, bootstrap.seed)
    return _interval(values.mean(), replicates)


def _interval(value: ArrayLike, replicates: FloatArray) -> Interval:
    """Return a value with the percentile limits of its replicates `(R, 1)`."""
    low, high = percentile_limits(replicates)
    value = float(np.squeeze(value))
    return Interval(value, float(low[0]), float(high[0])) if np.isfinite(value) else Interval(np.nan, np.nan, np.nan)
