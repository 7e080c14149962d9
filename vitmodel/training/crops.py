"""The labelled crops of a training: read, divided and checked before anything is trained."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from vitmodel.config import Preprocessing, TrainConfig, TrainingConfig, listed
from vitmodel.config.auxiliary import AUXILIARY_TARGETS
from vitmodel.config.labels import CANCER, LabelRule, target_name
from vitmodel.data.dataset import crop_size
from vitmodel.data.exams import check_exams, check_sources
from vitmodel.data.labels import add_label, explain_missing
from vitmodel.data.manifest import breast_ids, exam_ids, is_repeated_file, read_manifests, usable_rows
from vitmodel.data.splits import assign_folds, assign_splits, read_splits
from vitmodel.errors import UsageError
from vitmodel.model.architecture import (
    PRESETS,
)
from vitmodel.model.packed_batch import check_token_budget
from vitmodel.model.segments import check_segments

logger = logging.getLogger(__name__)


def read_cropped_manifest(manifests: Sequence[Path]) -> pd.DataFrame:
    """Return the usable rows of one or several manifests. Raise UsageError if the images are not cropped."""
    frame = read_manifests(manifests)
    if frame["preprocessing"].isna().all():
        raise UsageError(f"{listed(manifests)}: its images are not cropped; run `vitmodel etl` on it first")
    return usable_rows(frame)


def labelled_crops(config: TrainConfig) -> pd.DataFrame:
    """Return the manifest's usable rows with a known label and a split or fold, without copies of an image.

    With exam fusion, all rows of a patient with at least one known label are returned.

    Args:
        config: Settings of the training.

    Raises:
        UsageError: There is nothing to train on, or an option needs data that the rows do not have.
    """
    manifest = listed(config.manifest)
    frame = add_label(read_cropped_manifest(config.manifest), config.label, manifest)
    is_labelled = frame[config.label].notna()
    if not is_labelled.any():
        raise UsageError(f"{manifest}: no usable row has a known label: {explain_missing(frame, config.label)}")
    frame = frame[is_labelled.groupby(exam_ids(frame)).transform("any") if config.fusion else is_labelled]
    is_copy = is_repeated_file(frame)
    if is_copy.any():
        logger.warning("%d copies of another image of the same breast are left out", is_copy.sum())
    frame = frame[~is_copy]
    rule = LabelRule.parse(config.label)
    check_sources(frame, config.sources, manifest, (*rule.columns, config.label))
    _check_targets(frame, config, rule)
    if config.fusion:
        check_exams(frame, manifest)
    frame = _assign_parts(frame, config)
    _check_classes(frame, config)
    return frame


def _check_targets(frame: pd.DataFrame, config: TrainConfig, rule: LabelRule) -> None:
    """Raise UsageError for an auxiliary target that is unknown or is the label; warn of lesions that are not used."""
    for name in config.auxiliary:
        if np.isnan(AUXILIARY_TARGETS[name].encode(frame[name].tolist())).all():
            raise UsageError(
                f"{listed(config.manifest)}: column {name} is unknown in all rows; remove it from --auxiliary"
            )
        if name in rule.flags:
            raise UsageError(f"auxiliary: {name} is the label already (--label {config.label}); remove it")
    if config.segments and CANCER not in rule.flags and frame["lesions"].notna().any():
        logger.warning(
            "the column lesions is not used: its boxes are proven cancers, but the label is %s", config.label
        )


def _assign_parts(frame: pd.DataFrame, config: TrainConfig) -> pd.DataFrame:
    """Return `frame` with its folds, or with its splits, read from `config.splits` or drawn."""
    if config.splits is not None:
        frame = read_splits(frame, config.splits, "fold" if config.folds else "split")
    elif config.folds:
        frame = assign_folds(frame, config.folds, config.seed, config.label)
    if config.folds:
        return frame
    fractions = {"train": 1 - config.val - config.test, "val": config.val, "test": config.test}
    used = {name: part for name, part in fractions.items() if part > 0}
    return assign_splits(frame, used, config.seed, config.label)


def _check_classes(frame: pd.DataFrame, config: TrainConfig) -> None:
    """Raise UsageError if a fold, or the split train or val, has breasts of one class only."""
    column = "fold" if config.folds else "split"
    for part in range(config.folds) or ("train", "val"):
        rows = frame[frame[column] == part]
        labels = rows[config.label].groupby(breast_ids(rows)).max()  # calibration and threshold are per breast
        if labels.nunique() < 2:
            raise UsageError(
                f"{config.splits or listed(config.manifest)}: {column} {part} needs breasts with and without "
                f"{target_name(config.label)}; correct the column `{column}` or leave it empty"
            )


def common_preprocessing(frame: pd.DataFrame, manifests: Sequence[Path]) -> Preprocessing:
    """Return the preprocessing of all crops. Raise UsageError if they were not all preprocessed alike."""
    settings = sorted(frame["preprocessing"].unique())
    if len(settings) > 1:
        raise UsageError(
            f"{listed(manifests)}: its crops were made with {len(settings)} different settings, {'; '.join(settings)}; "
            f"run `vitmodel etl` on all images with the same settings"
        )
    return Preprocessing.from_json(settings[0])


def check_sizes(frame: pd.DataFrame, config: TrainingConfig) -> None:
    """Raise UsageError if a crop could exceed the token budget, or the network cannot process the segments.

    A crop counts as if all of it were tissue, so that a training does not fail in a late epoch.
    """
    patch = PRESETS[config.model].patch
    prefix = PRESETS[config.model].num_prefix_tokens
    if isinstance(config, TrainConfig) and config.segmenting:
        check_segments(config.segmenting, patch, prefix)
    sizes = [crop_size(path) for path in frame["path"]]
    tokens = [prefix + math.ceil(height / patch) * math.ceil(width / patch) for height, width in sizes]
    lengths = pd.Series(tokens, index=frame.index)
    for path, length in zip(frame["path"], lengths, strict=True):
        check_token_budget(path, length, config.most_tokens)
    if isinstance(config, TrainConfig) and config.fusion:
        for exam, images in lengths.groupby(exam_ids(frame)):
            check_token_budget(
                f"the exam of patient {exam} ({len(images)} images)", int(images.sum()), config.most_tokens
            )
