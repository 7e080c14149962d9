"""The validation scores that calibration and threshold are fitted to: scores that did not choose their epoch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit

from vitmodel.config import TrainConfig
from vitmodel.errors import UsageError
from vitmodel.metrics.crossfit import (
    CROSS_SELECTED,
    ONLY_EPOCH,
    SELECTED_EPOCH,
    ScoreOrigin,
    cross_select,
    patient_folds,
)
from vitmodel.metrics.metrics import RankedUnits
from vitmodel.metrics.scored_units import FloatArray, ScoredUnits
from vitmodel.training.fit import MONITOR_METRICS
from vitmodel.training.module import EPOCH_METRICS
from vitmodel.training.packaging import aggregate_breasts

logger = logging.getLogger(__name__)

DIVISIONS = 10
"""Number of random divisions of the validation patients into halves. A single one depends much on chance."""


def scores_to_fit(
    rows: pd.DataFrame, selected: FloatArray, by_epoch: Mapping[int, FloatArray], config: TrainConfig
) -> tuple[ScoredUnits, ScoreOrigin]:
    """Return the validation breasts with the scores that calibration and threshold are fitted to, and their origin.

    The scores of the patients that chose the epoch are too good at that epoch. So the patients are divided into halves,
    and each half gets the scores of the epoch that the other half chooses. This is repeated, and each breast occurs
    once per division. If it is not possible, the scores of the chosen epoch are returned.

    Args:
        rows: Validation rows of the manifest.
        selected: Logit of each row at the epoch that all patients chose, `(N,)`; NaN if unreadable.
        by_epoch: The same after each epoch; with `flip_average` the means with those of the flipped images.
        config: Settings of the training.
    """
    if set(by_epoch) == {0}:
        return aggregate_breasts(rows, selected, config.label), ScoreOrigin(ONLY_EPOCH)
    try:
        divisions = cross_selected_logits(rows, selected, by_epoch, config)
    except UsageError as error:
        logger.warning("calibration and threshold are fitted to the patients that chose the epoch: %s", error)
        return aggregate_breasts(rows, selected, config.label), ScoreOrigin(SELECTED_EPOCH, note=str(error))
    units = [aggregate_breasts(rows, logits, config.label) for logits in divisions]
    names = ("labels", "scores", "patients")
    joined = ScoredUnits(*(np.concatenate([getattr(part, name) for part in units]) for name in names))
    return joined, ScoreOrigin(CROSS_SELECTED, len(divisions))


def cross_selected_logits(
    rows: pd.DataFrame, selected: FloatArray, by_epoch: Mapping[int, FloatArray], config: TrainConfig
) -> FloatArray:
    """Return the logit of each row at the epoch that other patients choose, for each division, `(R, N)`.

    Logits grow during a training. Those of each epoch are therefore brought to the mean and the standard deviation that
    the selected epoch has on all rows.

    Raises:
        UsageError: The logits of an epoch are missing, or a half of the patients has one class only.
    """
    if not by_epoch or set(by_epoch) != set(range(max(by_epoch) + 1)):
        raise UsageError("the logits of the first epochs are missing, because an older version trained them")
    patients = rows["patient_id"].to_numpy()
    sample = ScoredUnits(rows[config.label].to_numpy(), np.zeros(len(rows)), patients)
    halves = np.stack([patient_folds(sample, 2, config.seed + number) for number in range(DIVISIONS)])  # (R, N)
    ids, first_rows = np.unique(patients, return_index=True)
    is_second = halves[:, first_rows].T == 1  # (P, R)
    chooses = np.stack([is_second, ~is_second]).astype(float)  # whether a patient chooses for the first, second half
    logits = np.stack([by_epoch[epoch] for epoch in sorted(by_epoch)]).astype(np.float64)  # (E, N)
    figures = np.stack([_figures(rows, values, config, ids, chooses) for values in logits])  # (E, 2, R)
    scaled = match_scale(logits, selected)
    return np.stack([cross_select(scaled, half, figures[..., number]) for number, half in enumerate(halves)])


def _figures(
    rows: pd.DataFrame, logits: FloatArray, config: TrainConfig, ids: NDArray[Any], weights: FloatArray
) -> FloatArray:
    """Return the metric that chooses the epoch, for each weighting of the patients, in the shape of `weights[:, 0]`.

    Args:
        rows: Validation rows of the manifest.
        logits: Logit of each row, `(N,)`.
        config: Settings of the training.
        ids: Sorted patient ids, `(P,)`.
        weights: How often a patient counts, `(2, P, R)`.
    """
    if config.fusion:
        units = aggregate_breasts(rows, logits, config.label)
    else:
        known = np.isfinite(logits)
        units = ScoredUnits(rows[config.label][known], expit(logits[known]), rows["patient_id"][known])
    ranking = RankedUnits(units.labelled(), threshold=0.5)
    metric = EPOCH_METRICS[MONITOR_METRICS[config.monitor].removeprefix("val/")]
    of_units = weights[:, np.searchsorted(ids, ranking.patients)]  # (2, U, R)
    return np.stack([ranking.metric_values(ranking.rows @ half)[metric] for half in of_units])


def match_scale(logits: FloatArray, target: FloatArray) -> FloatArray:
    """Return each row of logits, `(E, N)`, brought to the mean and standard deviation of `target`, `(N,)`.

    NaN stays NaN and does not count. A row of equal logits gets the mean.
    """
    mean, deviation = np.nanmean(logits, axis=1, keepdims=True), np.nanstd(logits, axis=1, keepdims=True)
    stretch = np.nanstd(target) / np.where(deviation > 0, deviation, np.inf)
    return (logits - mean) * stretch + np.nanmean(target)
