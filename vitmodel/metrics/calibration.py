"""From a model's logits to probabilities: temperature, Platt and isotonic calibration, and other prevalences. Knows no model."""

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
"""Stands for 'the logits say nothing' where the data ask for a falling curve: a calibration never turns the ranking round."""


def logistic_regression(
    design: FloatArray,
    hits: FloatArray,
    weights: FloatArray,
    offset: FloatArray | float = 0.0,
    start: FloatArray | None = None,
    tolerance: float = 1e-10,
) -> FloatArray:
    """The coefficients (K) that maximise the likelihood of targets (N, in [0, 1]) under sigmoid(coefficients @ design + offset).

    `design` is K N, `weights` N, `offset` N, `start` K; of the targets only `hits` = design @ (weights * targets) (K) matter. With
    `weights` N B and `hits` K B, the coefficients K B of B weightings. Newton's method; it stops when the next step is shorter than
    sqrt(tolerance) standard errors. Where directions of the design are redundant, the shortest solution. The maximum must exist: of two
    classes none that a cut separates, ties at the cut allowed (Albert and Anderson, Biometrika 71 (1984) 1-10).
    """
    single, weights, hits = weights.ndim == 1, weights.reshape(len(weights), -1), hits.reshape(len(hits), -1)
    offset = np.broadcast_to(offset, design.shape[1])[:, None]
    coefficients = np.zeros_like(hits) if start is None else np.tile(start[:, None], hits.shape[1])
    step, slope = np.zeros_like(hits), np.full(hits.shape[1], np.inf)
    for _ in range(100):
        expected = weights * expit(design.T @ coefficients + offset)  # N B
        gradient = hits - design @ expected
        overshot = (
            np.abs((gradient * step).sum(axis=0)) > slope
        )  # the likelihood is concave: half of that step does better
        variance = expected - expected**2 / np.where(weights > 0, weights, 1)
        hessian = np.einsum("in,jn,nb->bij", design, design, variance, optimize=True)
        newton = np.einsum("bij,jb->ib", np.linalg.pinv(hessian, hermitian=True), gradient)
        coefficients = coefficients + np.where(overshot, -step / 2, newton)
        step = np.where(overshot, step / 2, newton)
        slope = np.where(overshot, slope / 2, (gradient * newton).sum(axis=0))
        if (slope < tolerance).all():
            break
    return coefficients[:, 0] if single else coefficients


@dataclass(frozen=True)
class Calibration(ABC):
    """A never falling map from logits to probabilities, fitted on scores that the model was not trained on."""

    method: ClassVar[str]
    prevalence: float
    """The fraction of positives in what it was fitted on: the probabilities are right for this prevalence only."""

    @classmethod
    def fit(cls, labels: ArrayLike, logits: ArrayLike) -> Self:
        """Fit to `labels` (N; 0, 1, or NaN = unknown, left out) and `logits` (N). Raises UsageError on one class."""
        known, values = np.asarray(labels, dtype=np.float64), np.asarray(logits, dtype=np.float64)
        known, values = known[~np.isnan(known)], values[~np.isnan(known)]
        if not np.isfinite(values).all():
            raise UsageError(
                f"logits: {np.count_nonzero(~np.isfinite(values))} are NaN or infinite; calibrate on scored images only"
            )
        if set(np.unique(known)) != {0.0, 1.0}:
            raise UsageError("labels: calibration needs labels of both classes, 0 and 1, and no other")
        return cls._fit(known, values)

    @classmethod
    @abstractmethod
    def _fit(cls, labels: FloatArray, logits: FloatArray) -> Self: ...

    @abstractmethod
    def apply(self, logits: ArrayLike) -> FloatArray:
        """Probabilities of the same shape; NaN stays NaN."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, that `from_dict` reads."""
        return {"method": self.method, **asdict(self)}


@dataclass(frozen=True)
class Temperature(Calibration):
    """sigmoid(logit / temperature); temperature 1 leaves the model as it is.

    Source: Guo et al., On calibration of modern neural networks, ICML 2017; with Platt's targets, so that separated
    classes do not drive it to 0.
    """

    method: ClassVar[str] = "temperature"
    temperature: float

    @classmethod
    def _fit(cls, labels: FloatArray, logits: FloatArray) -> Self:
        slope = logistic_regression(logits[None], logits[None] @ platt_targets(labels), np.ones_like(labels))[0]
        return cls(prevalence=float(labels.mean()), temperature=float(1 / max(slope, MIN_SLOPE)))

    def apply(self, logits: ArrayLike) -> FloatArray:
        return np.asarray(expit(np.asarray(logits, dtype=np.float64) / self.temperature))


@dataclass(frozen=True)
class Platt(Calibration):
    """sigmoid(slope * logit + intercept).

    Source: Platt, Probabilistic outputs for support vector machines (1999).
    """

    method: ClassVar[str] = "platt"
    slope: float
    intercept: float

    @classmethod
    def _fit(cls, labels: FloatArray, logits: FloatArray) -> Self:
        ones, targets = np.ones_like(logits), platt_targets(labels)
        design = np.stack([logits, ones])
        slope, intercept = logistic_regression(design, design @ targets, ones)
        if slope < MIN_SLOPE:
            slope, intercept = (
                MIN_SLOPE,
                logistic_regression(ones[None], ones[None] @ targets, ones, offset=MIN_SLOPE * logits)[0],
            )
        return cls(prevalence=float(labels.mean()), slope=float(slope), intercept=float(intercept))

    def apply(self, logits: ArrayLike) -> FloatArray:
        return np.asarray(expit(self.slope * np.asarray(logits, dtype=np.float64) + self.intercept))


@dataclass(frozen=True)
class Isotonic(Calibration):
    """A rising curve through `probabilities` (K) at `logits` (K), straight between them and level beyond.

    Needs hundreds of positives to beat Platt's two numbers. Fitted on n scores it never claims more certainty than
    1 / (n + 2) and its complement, so that one later error does not cost an infinite log loss.

    Source: Zadrozny and Elkan, KDD 2002.
    """

    method: ClassVar[str] = "isotonic"
    logits: tuple[float, ...]
    probabilities: tuple[float, ...]

    @classmethod
    def _fit(cls, labels: FloatArray, logits: FloatArray) -> Self:
        from sklearn.isotonic import IsotonicRegression

        least = 1 / (len(labels) + 2)
        curve = IsotonicRegression(y_min=least, y_max=1 - least).fit(logits, labels)
        return cls(float(labels.mean()), tuple(curve.X_thresholds_.tolist()), tuple(curve.y_thresholds_.tolist()))

    def apply(self, logits: ArrayLike) -> FloatArray:
        return np.asarray(np.interp(np.asarray(logits, dtype=np.float64), self.logits, self.probabilities))


CALIBRATIONS: dict[str, type[Calibration]] = {cls.method: cls for cls in (Temperature, Platt, Isotonic)}


def fit(method: str, labels: ArrayLike, logits: ArrayLike) -> Calibration:
    """A calibration by its name, fitted. Raises UsageError."""
    return _named(method).fit(labels, logits)


def from_dict(values: dict[str, Any]) -> Calibration:
    """What `Calibration.to_dict` gave, also after a way through JSON. Raises UsageError."""
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items() if key != "method"
    }
    try:
        return _named(str(values.get("method")))(**fields)
    except TypeError as error:
        raise UsageError(f"calibration: {error}") from error


def _named(method: str) -> type[Calibration]:
    if method not in CALIBRATIONS:
        raise UsageError(f"calibration: {method!r} is unknown; known are {', '.join(CALIBRATIONS)}")
    return CALIBRATIONS[method]


def platt_targets(labels: FloatArray) -> FloatArray:
    """(n1 + 1) / (n1 + 2) for the n1 positives and 1 / (n0 + 2) for the n0 negatives: a fit to separated classes stays finite."""
    positives = labels.sum()
    return np.where(labels == 1, (positives + 1) / (positives + 2), 1 / (len(labels) - positives + 2))


def to_prevalence(probability: ArrayLike, fitted: float, wanted: float) -> FloatArray:
    """Probabilities that are right at the prevalence `fitted`, as they are right at the prevalence `wanted`.

    Holds where the images of each class are alike at both places and only their mix differs. NaN stays NaN.

    Source: Saerens, Latinne and Decaestecker, Neural Computation 14 (2002) 21-41, equation 2.4: a shift of the logit.
    """
    for name, value in (("fitted prevalence", fitted), ("wanted prevalence", wanted)):
        if not 0 < value < 1:
            raise UsageError(f"{name}: must lie between 0 and 1, exclusive, not {value}")
    # In odds and not in logits, so that 0 and 1 stay 0 and 1.
    present = np.asarray(probability, dtype=np.float64) * (wanted / fitted)
    absent = (1 - np.asarray(probability, dtype=np.float64)) * ((1 - wanted) / (1 - fitted))
    return np.asarray(present / (present + absent))
