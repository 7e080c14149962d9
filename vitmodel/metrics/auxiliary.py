"""Outputs of auxiliary heads as probabilities or numbers: their calibration and their agreement with known values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitmodel.config.auxiliary import AuxiliaryTarget
from vitmodel.metrics.multiclass import AuxiliaryMetrics, Bootstrap, SoftmaxCalibration, class_metrics, number_metrics
from vitmodel.metrics.scored_units import FloatArray, mean_logits

FLAG_CLASSES = ("0", "1")
"""Names of the classes of a flag."""


@dataclass(frozen=True, eq=False)
class AuxiliaryUnits:
    """Outputs of one head with the known values, one row per unit (image or breast)."""

    labels: FloatArray
    """Encoded values, NaN = unknown, `(N,)`."""
    outputs: FloatArray
    """Outputs of the head, `(N, K)`."""
    patients: NDArray[Any]
    """Patient ids, `(N,)`."""

    def breasts(self, groups: ArrayLike) -> Self:
        """Return one row per breast: the mean of the outputs of its images and the largest of its known values.

        Args:
            groups: The breast of each row, `(N,)`.
        """
        _, first, inverse = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
        labels = np.full(len(first), np.nan)
        np.fmax.at(labels, inverse, self.labels)
        return replace(self, labels=labels, outputs=mean_logits(self.outputs, groups), patients=self.patients[first])


@dataclass(frozen=True)
class AuxiliaryOutput:
    """One auxiliary head and its calibration."""

    target: AuxiliaryTarget
    calibration: SoftmaxCalibration | None = None
    """None for a number, and where the validation patients had fewer than two classes with a known value."""

    @classmethod
    def fit(cls, target: AuxiliaryTarget, units: AuxiliaryUnits) -> Self:
        """Return the output, calibrated on units that the network was not trained on."""
        if target.scale:
            return cls(target)
        return cls(target, SoftmaxCalibration.fit(units.labels, _logits(target, units.outputs)))

    def predict(self, outputs: FloatArray) -> FloatArray:
        """Return the probability of each class `(N, C)`, of each of two for a flag, or the number `(N, 1)`.

        Args:
            outputs: Outputs of the head, `(N, K)`; NaN stays NaN.
        """
        if self.target.scale:
            return self.target.centre + self.target.scale * outputs
        calibration = self.calibration or SoftmaxCalibration(slope=1.0, biases=(0.0,), units=0)
        return calibration.apply(_logits(self.target, outputs))


def _logits(target: AuxiliaryTarget, outputs: FloatArray) -> FloatArray:
    """Return one logit per class; that of a flag's 0 is 0."""
    return outputs if target.classes else np.concatenate([np.zeros_like(outputs), outputs], axis=1)


def measure(
    target: AuxiliaryTarget, labels: FloatArray, predicted: FloatArray, patients: ArrayLike, bootstrap: Bootstrap
) -> AuxiliaryMetrics | None:
    """Return the agreement of predictions with known values; None if no value is known.

    Args:
        target: What is predicted.
        labels: Encoded values, NaN = unknown, `(N,)`.
        predicted: Result of `AuxiliaryOutput.predict`, `(N, C)` or `(N, 1)`.
        patients: Patient of each unit, `(N,)`.
        bootstrap: Settings of the intervals.
    """
    if np.isnan(labels).all():
        return None
    if target.scale:
        return number_metrics(target.centre + target.scale * labels, predicted[:, 0], patients, bootstrap)
    return class_metrics(labels, predicted, patients, target.classes or FLAG_CLASSES, target.ordinal, bootstrap)
