"""Calibration of logits to probabilities (temperature, Platt, isotonic) and correction for another prevalence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

from vitmodel.errors import UsageError
from vitmodel.metrics.scored_units import FloatArray

MIN_SLOPE = 1e-3
"""Smallest slope of a calibration. It replaces a slope of zero or less, so that no calibration reverses the ranking."""
NEWTON_TOLERANCE = 1e-10
"""Newton's method stops when the next step, in standard errors, is shorter than the square root of this value."""


def logistic_regression(
    design: FloatArray,
    hits: FloatArray,
    weights: FloatArray,
    offset: FloatArray | float = 0.0,
    start: FloatArray | None = None,
) -> FloatArray:
    """Return the maximum-likelihood coefficients of sigmoid(coefficients @ design + offset), by Newton's method.

    The targets, `(N,)` in [0, 1], enter only through `hits`. Where directions of the design are redundant, the
    shortest solution is returned. The maximum must exist: no cut may separate the two classes, not even with ties at
    the cut (Albert and Anderson, Biometrika 71 (1984) 1-10). B weightings of the rows are fitted at once with weights
    `(N, B)` and hits `(K, B)`.

    Args:
        design: K features of N rows, `(K, N)`.
        hits: design @ (weights * targets), `(K,)` or `(K, B)`.
        weights: Weight of each row, `(N,)` or `(N, B)`.
        offset: Constant added to the linear predictor of each row, `(N,)` or a number.
        start: Coefficients to start from, `(K,)`; None = zeros.

    Returns:
        The coefficients, `(K,)` or `(K, B)`.
    """
    single = weights.ndim == 1
    weights = weights.reshape(len(weights), -1)
    hits = hits.reshape(len(hits), -1)
    offset = np.broadcast_to(offset, design.shape[1])[:, None]
    coefficients = np.zeros_like(hits) if start is None else np.tile(start[:, None], hits.shape[1])
    step = np.zeros_like(hits)
    slope = np.full(hits.shape[1], np.inf)
    for _ in range(100):
        expected = weights * expit(design.T @ coefficients + offset)  # (N, B)
        gradient = hits - design @ expected
        # The likelihood is concave: if its slope along the last step has grown, half of that step is better.
        overshot = np.abs((gradient * step).sum(axis=0)) > slope
        variance = expected - expected**2 / np.where(weights > 0, weights, 1)
        hessian = np.einsum("in,jn,nb->bij", design, design, variance, optimize=True)
        newton = np.einsum("bij,jb->ib", np.linalg.pinv(hessian, hermitian=True), gradient)
        coefficients = coefficients + np.where(overshot, -step / 2, newton)
        step = np.where(overshot, step / 2, newton)
        slope = np.where(overshot, slope / 2, (gradient * newton).sum(axis=0))
        if (slope < NEWTON_TOLERANCE).all():
            break
    return coefficients[:, 0] if single else coefficients


@dataclass(frozen=True)
class Calibration(ABC):
    """A monotonically non-decreasing map from logits to probabilities.

    Fit it to scores of images that the model was not trained on.
    """

    method: ClassVar[str]
    prevalence: float
    """The fraction of positives in the data it was fitted to. The probabilities hold for this prevalence only."""

    @classmethod
    def fit(cls, labels: ArrayLike, logits: ArrayLike) -> Self:
        """Return the calibration fitted to labelled logits.

        Args:
            labels: 0, 1 or NaN = unknown (left out), `(N,)`.
            logits: The model's logits, `(N,)`.

        Raises:
            UsageError: A logit of a labelled row is not finite, or the known labels are not exactly 0 and 1.
        """
        known_labels = np.asarray(labels, dtype=np.float64)
        known_logits = np.asarray(logits, dtype=np.float64)
        is_known = ~np.isnan(known_labels)
        known_labels = known_labels[is_known]
        known_logits = known_logits[is_known]
        if not np.isfinite(known_logits).all():
            count = np.count_nonzero(~np.isfinite(known_logits))
            raise UsageError(f"logits: {count} are NaN or infinite; calibrate on scored images only")
        if set(np.unique(known_labels)) != {0.0, 1.0}:
            raise UsageError(
                "labels: calibration needs both classes and no other value; give rows labelled 0 and rows labelled 1"
            )
        return cls._fit(known_labels, known_logits)

    @classmethod
    @abstractmethod
    def _fit(cls, labels: FloatArray, logits: FloatArray) -> Self: ...

    @abstractmethod
    def apply(self, logits: ArrayLike) -> FloatArray:
        """Return the probabilities, in the shape of the logits; NaN stays NaN."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; `from_dict` reads them."""
        return {"method": self.method, **asdict(self)}


@dataclass(frozen=True)
class Temperature(Calibration):
    """Temperature scaling: sigmoid(logit / temperature). A temperature of 1 leaves the model unchanged.

    Source: Guo et al., On calibration of modern neural networks, ICML 2017. Fitted to Platt's targets, which keep the
    temperature above 0 where the classes are separated.
    """

    method: ClassVar[str] = "temperature"
    temperature: float

    @classmethod
    def _fit(cls, labels: FloatArray, logits: FloatArray) -> Self:
        design = logits[None]
        slope = logistic_regression(design, design @ platt_targets(labels), np.ones_like(labels))[0]
        return cls(prevalence=float(labels.mean()), temperature=float(1 / max(slope, MIN_SLOPE)))

    def apply(self, logits: ArrayLike) -> FloatArray:
        return np.asarray(expit(np.asarray(logits, dtype=np.float64) / self.temperature))


@dataclass(frozen=True)
class Platt(Calibration):
    """Platt scaling: sigmoid(slope * logit + intercept).

    Source: Platt, Probabilistic outputs for support vector machines (1999).
    """

    method: ClassVar[str] = "platt"
    slope: float
    intercept: float

    @classmethod
    def _fit(cls, labels: FloatArray, logits: FloatArray) -> Self:
        ones = np.ones_like(logits)
        targets = platt_targets(labels)
        design = np.stack([logits, ones])
        slope, intercept = logistic_regression(design, design @ targets, ones)
        if slope < MIN_SLOPE:
            slope = MIN_SLOPE
            intercept = logistic_regression(ones[None], ones[None] @ targets, ones, offset=MIN_SLOPE * logits)[0]
        return cls(prevalence=float(labels.mean()), slope=float(slope), intercept=float(intercept))

    def apply(self, logits: ArrayLike) -> FloatArray:
        return np.asarray(expit(self.slope * np.asarray(logits, dtype=np.float64) + self.intercept))


@dataclass(frozen=True)
class Isotonic(Calibration):
    """Isotonic regression: linear interpolation between `probabilities` (K) at `logits` (K), constant outside them.

    It needs hundreds of positives to outperform the two parameters of Platt scaling. Fitted to n scores, its
    probabilities stay between 1 / (n + 2) and 1 - 1 / (n + 2), so that a single later error does not cost an infinite
    log loss.

    Source: Zadrozny and Elkan, KDD 2002.
    """

    method: ClassVar[str] = "isotonic"
    logits: tuple[float, ...]
    probabilities: tuple[float, ...]

    @classmethod
    def _fit(cls, labels: FloatArray, logits: FloatArray) -> Self:
        from sklearn.isotonic import IsotonicRegression

        lowest = 1 / (len(labels) + 2)
        curve = IsotonicRegression(y_min=lowest, y_max=1 - lowest).fit(logits, labels)
        return cls(float(labels.mean()), tuple(curve.X_thresholds_.tolist()), tuple(curve.y_thresholds_.tolist()))

    def apply(self, logits: ArrayLike) -> FloatArray:
        return np.asarray(np.interp(np.asarray(logits, dtype=np.float64), self.logits, self.probabilities))


CALIBRATIONS: dict[str, type[Calibration]] = {cls.method: cls for cls in (Temperature, Platt, Isotonic)}


def fit(method: str, labels: ArrayLike, logits: ArrayLike) -> Calibration:
    """Return the calibration with this name, fitted to labels and logits, `(N,)` each.

    Raises:
        UsageError: The method is unknown, or `Calibration.fit` refuses the data.
    """
    return _calibration_class(method).fit(labels, logits)


def from_dict(values: dict[str, Any]) -> Calibration:
    """Return the calibration that `Calibration.to_dict` wrote; lists from JSON become tuples.

    Raises:
        UsageError: The method is unknown, or its parameters are not those of the method.
    """
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if name != "method":
            fields[name] = tuple(value) if isinstance(value, list) else value
    try:
        return _calibration_class(str(values.get("method")))(**fields)
    except TypeError as error:
        raise UsageError(f"calibration: {error}") from error


def _calibration_class(method: str) -> type[Calibration]:
    if method not in CALIBRATIONS:
        raise UsageError(f"calibration: {method!r} is unknown; use one of {', '.join(CALIBRATIONS)}")
    return CALIBRATIONS[method]


def platt_targets(labels: FloatArray) -> FloatArray:
    """Return Platt's regression targets: (n1 + 1) / (n1 + 2) for n1 positives, 1 / (n0 + 2) for n0 negatives.

    With them a fit to separated classes stays finite.

    Source: Platt, Probabilistic outputs for support vector machines (1999).
    """
    positives = labels.sum()
    return np.where(labels == 1, (positives + 1) / (positives + 2), 1 / (len(labels) - positives + 2))


def to_prevalence(probability: ArrayLike, fitted: float, wanted: float) -> FloatArray:
    """Return probabilities corrected from one prevalence to another by Bayes' rule, a constant shift of the logit.

    The correction holds if the images of each class are alike in both populations and only the mix differs.

    Source: Saerens, Latinne and Decaestecker, Neural Computation 14 (2002) 21-41, equation 2.4.

    Args:
        probability: Probabilities that are calibrated at the prevalence `fitted`, of any shape; NaN stays NaN.
        fitted: Prevalence in the data of the calibration.
        wanted: Prevalence to correct to.

    Raises:
        UsageError: A prevalence lies outside (0, 1).
    """
    for name, value in (("fitted prevalence", fitted), ("wanted prevalence", wanted)):
        if not 0 < value < 1:
            raise UsageError(f"{name}: {value} is not between 0 and 1; give a fraction inside these limits")
    # Computed with odds, not logits, so that probabilities of 0 and 1 are kept.
    present = np.asarray(probability, dtype=np.float64) * (wanted / fitted)
    absent = (1 - np.asarray(probability, dtype=np.float64)) * ((1 - wanted) / (1 - fitted))
    return np.asarray(present / (present + absent))
