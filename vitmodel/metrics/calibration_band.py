"""How uncertain a calibration is: a band around its curve, from bootstrap replicates over patients."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

from vitmodel.metrics import calibration
from vitmodel.metrics.bootstrap import percentile_limits
from vitmodel.metrics.scored_units import FloatArray, ScoredUnits, to_logit

REPLICATES = 500
"""Number of bootstrap replicates."""
POINTS = 65
"""Number of logits at which the band is stored."""


@dataclass(frozen=True)
class CalibrationBand:
    """The pointwise 95 % band of a calibration: how far it would change with other patients to fit it to.

    Patients are drawn with replacement, and the calibration is fitted again to each draw. The band therefore holds for
    the fitted curve: not for one woman, and not for the uncertainty of the network, which stays the same.
    """

    logits: tuple[float, ...]
    """Where the band is stored, `(K,)`, rising."""
    low: tuple[float, ...]
    """Lower limit of the probability at each logit, `(K,)`."""
    high: tuple[float, ...]
    patients: int
    """Number of patients that the calibration was fitted to."""
    positives: int
    """Number of positive units among theirs."""

    @classmethod
    def fit(cls, method: str, units: ScoredUnits, replicates: int = REPLICATES, seed: int = 0) -> Self | None:
        """Return the band of a calibration that is fitted to units.

        Args:
            method: Name of the calibration.
            units: The units with raw scores that the calibration is fitted to.
            replicates: Number of bootstrap replicates.
            seed: Seed of the draws.

        Returns:
            The band; None if too many draws lack a class, because there are too few patients with one.
        """
        units = units.labelled()
        logits = to_logit(units.scores)
        # Half the range on both sides, because other images may have larger logits than these.
        margin = max(float(np.ptp(logits)), 1.0) / 2
        grid = np.linspace(logits.min() - margin, logits.max() + margin, POINTS)
        patients, owners = np.unique(units.patients, return_inverse=True)
        order = np.argsort(owners, kind="stable")
        rows = np.split(order, np.cumsum(np.bincount(owners))[:-1])
        generator = np.random.default_rng(seed)
        curves = np.full((replicates, POINTS), np.nan)
        for replicate in range(replicates):
            drawn = np.concatenate([rows[patient] for patient in generator.integers(len(patients), size=len(patients))])
            if len(np.unique(units.labels[drawn])) == 2:
                curves[replicate] = calibration.fit(method, units.labels[drawn], logits[drawn]).apply(grid)
        low, high = percentile_limits(curves)
        if np.isnan(low).any():
            return None
        positives = int(units.labels.sum())
        return cls(tuple(grid.tolist()), tuple(low.tolist()), tuple(high.tolist()), len(patients), positives)

    def limits(self, logits: ArrayLike, probabilities: ArrayLike) -> FloatArray:
        """Return the interval of calibrated probabilities, `(N, 2)`, which always contains them.

        Between stored logits the log-odds are interpolated; beyond them the limits are those of the last one.

        Args:
            logits: Logits, `(N,)`; NaN stays NaN.
            probabilities: Their calibrated probabilities, `(N,)`.
        """
        at = np.asarray(logits, dtype=np.float64)
        low, high = (expit(np.interp(at, self.logits, to_logit(limit))) for limit in (self.low, self.high))
        return np.stack([np.minimum(low, probabilities), np.maximum(high, probabilities)], axis=-1)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; `from_dict` reads them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return the band that `to_dict` wrote."""
        logits, low, high = (tuple(values[name]) for name in ("logits", "low", "high"))
        return cls(logits, low, high, values["patients"], values["positives"])
