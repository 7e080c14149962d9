"""The validation scores that calibration and threshold are fitted to: scores that did not choose their epoch."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit

from vitmodel.config import TrainConfig
from vitmodel.errors import UsageError
from vitmodel.metrics.crossfit import CROSS_SELECTED, SELECTED_EPOCH, ScoreOrigin, cross_select, patient_folds
from vitmodel.metrics.metrics import RankedUnits
from vitmodel.metrics.scored_units import FloatArray, ScoredUnits
from vitmodel.training.fit import MONITOR_METRICS
from vitmodel.training.module import EPOCH_METRICS
from vitmodel.training.packaging import aggregate_breasts

logger = logging.getLogger(__name__)

PARTS = 2
"""Number of parts of the validation patients, of which each gets the epoch that the others choose."""


def logits_to_fit(
    rows: pd.DataFrame, selected: FloatArray, by_epoch: Mapping[int, FloatArray], config: TrainConfig
) -> tuple[FloatArray, ScoreOrigin]:
    """Return the logits of the validation rows to which calibration and threshold are fitted, and their origin.

    The scores of the patients that chose the epoch are too good at that epoch. So each part of the patients gets the
    logits of the epoch that the other parts choose. If that is not possible, the logits of the chosen epoch are
    returned.

    Args:
        rows: Validation rows of the manifest.
        selected: Logit of each row at the epoch that all patients chose, `(N,)`; NaN if unreadable.
        by_epoch: The same after each epoch.
        config: Settings of the training.
    """
    try:
        logits, parts = cross_selected_logits(rows, by_epoch, config)
    except UsageError as error:
        logger.warning("calibration and threshold are fitted to the patients that chose the epoch: %s", error)
        return selected, ScoreOrigin(SELECTED_EPOCH, note=str(error))
    return logits, ScoreOrigin(CROSS_SELECTED, parts)


def cross_selected_logits(
    rows: pd.DataFrame, by_epoch: Mapping[int, FloatArray], config: TrainConfig
) -> tuple[FloatArray, int]:
    """Return the logit of each row at the epoch that other patients choose, `(N,)`, and the number of parts.

    Raises:
        UsageError: The logits of an epoch are missing, or a part of the patients has one class only.
    """
    if not by_epoch or set(by_epoch) != set(range(max(by_epoch) + 1)):
        raise UsageError("the logits of the first epochs are missing, because an older version trained them")
    labels = rows[config.label].to_numpy(dtype=float)
    parts = patient_folds(ScoredUnits(labels, np.zeros(len(rows)), rows["patient_id"].to_numpy()), PARTS, config.seed)
    metric = EPOCH_METRICS[MONITOR_METRICS[config.monitor].removeprefix("val/")]

    def figure(logits: FloatArray, chosen: NDArray[np.bool_]) -> float:
        if config.fusion:
            units = aggregate_breasts(rows[chosen], logits[chosen], config.label).labelled()
        else:
            chosen = chosen & np.isfinite(logits) & np.isfinite(labels)
            units = ScoredUnits(labels[chosen], expit(logits[chosen]), np.arange(chosen.sum()))
        if len(set(units.labels)) < 2:
            return np.nan
        return float(RankedUnits(units, threshold=0.5).metric_values()[metric])

    by_row = np.stack([by_epoch[epoch] for epoch in sorted(by_epoch)]).astype(np.float64)
    return cross_select(by_row, parts, figure), int(parts.max()) + 1
