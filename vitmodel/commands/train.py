"""The command `train`: train a network on a manifest and write a run folder with checkpoints, curves and a package."""

from __future__ import annotations

import contextlib
import gc
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from vitmodel.config import FreezeEpochs, Preprocessing, TrainConfig
from vitmodel.config.auxiliary import AUXILIARY_TARGETS, count_outputs
from vitmodel.data.fingerprint import Fingerprint, fingerprint
from vitmodel.data.labels import without_label
from vitmodel.data.manifest import write_manifest
from vitmodel.data.samplers import SampleRequest
from vitmodel.data.splits import write_splits
from vitmodel.jobs.journal import lock_folder
from vitmodel.metrics.crossfit import OUT_OF_FOLD, ScoreOrigin
from vitmodel.metrics.metrics import compute_metrics
from vitmodel.model.weight_source import WeightsSource
from vitmodel.reports.panel import contact_grid
from vitmodel.training.crops import check_sizes, common_preprocessing, labelled_crops
from vitmodel.training.find_lr import sweep_learning_rate, write_sweep
from vitmodel.training.fit import TrainedModel, make_crop_dataset, train_and_validate
from vitmodel.training.initial_network import make_network_config, settle_network
from vitmodel.training.module import History
from vitmodel.training.packaging import (
    Look,
    OutOfSample,
    aggregate_breasts,
    auxiliary_units,
    record_weights,
    write_package,
    write_table,
)
from vitmodel.training.selection import scores_to_fit
from vitmodel.training.trainer import STARTED, is_rank_zero, start_or_resume
from vitmodel.utils import write_atomic

MAX_CROPS_SHOWN = 32
"""Number of augmented crops in RUN/augmented.png."""


def train(config: TrainConfig) -> None:
    """Train a network and write RUN/package.

    Without folds, the network is trained on the split `train`. Epoch, calibration and threshold are chosen on `val`,
    the latter two by scores that did not choose their epoch (`training.selection`). The split `test` is not used.
    With folds, one network per fold is trained on all other folds. Calibration and threshold are fitted to the scores
    that each network gives to its left-out fold.

    Raises:
        UsageError: The manifest or the recipe cannot be used, or RUN holds another run.
        DivergedError: The training diverged.
    """
    frame = labelled_crops(config)
    preprocessing = common_preprocessing(frame, config.manifest)
    config, source = settle_network(config, preprocessing)
    check_sizes(frame, config)
    parts = np.where(frame["fold"].notna(), "train", "test") if config.folds else frame["split"]
    data = fingerprint(frame.assign(split=parts), config.label)
    if config.find_lr:
        find_learning_rate(config, frame, preprocessing)
        return
    with lock_folder(config.run, STARTED) if is_rank_zero() else contextlib.nullcontext():
        checkpoint = start_or_resume("train", config, config.run, data["sha256"])
        if is_rank_zero():
            write_manifest(without_label(frame, config.label), config.run / "manifest.csv")
            write_splits(frame, config.run / "splits.csv", "fold" if config.folds else "split")
            write_picture(frame, config)
        if config.folds:
            cross_validate(config, frame, preprocessing, data, source)
        else:
            train_once(config, frame, preprocessing, data, source, checkpoint)


def find_learning_rate(config: TrainConfig, frame: pd.DataFrame, preprocessing: Preprocessing) -> None:
    """Sweep the learning rate on the training patients (with folds, those of the first fold), and print a suggestion.

    Writes RUN/find_lr.csv and RUN/find_lr.png; RUN stays free for a training.
    """
    rows = frame[frame["fold"].notna() & (frame["fold"] != 0)] if config.folds else frame[frame["split"] == "train"]
    # A sweep within the frozen epochs would be of the heads alone.
    thawed = config if config.freeze.is_backbone else replace(config, freeze=FreezeEpochs(0))
    with lock_folder(config.run, "find_lr.png"):
        sweep = sweep_learning_rate(thawed, rows, make_network_config(config, preprocessing, [rows]))
        write_sweep(sweep, config.run)
    if sweep.suggestion is None:
        low, high = sweep.rates[[0, -1]]
        print(f"no suggestion: the loss hardly fell at any rate from {low:.2g} to {high:.2g}; keep the default")
    else:
        print(f"suggestion: --lr {sweep.suggestion:.2g}, a tenth of the rate with the smallest loss")
    print(f"see {config.run / 'find_lr.png'}")


def train_once(
    config: TrainConfig,
    frame: pd.DataFrame,
    preprocessing: Preprocessing,
    data: Fingerprint,
    source: WeightsSource | None,
    checkpoint: Path | None,
) -> None:
    """Train one network on the splits, and write the package and the validation scores."""
    rows = {name: frame[frame["split"] == name] for name in ("train", "val")}
    network = make_network_config(config, preprocessing, [rows["train"]])
    fitted = train_and_validate(config, config.run, rows["train"], rows["val"], network, checkpoint)
    if fitted is not None:
        write_table(rows["val"], fitted.logits, config.label, config.run / "validation.csv")
        breasts, origin = scores_to_fit(rows["val"], fitted.logits, fitted.validation_logits, config)
        out_of_sample = OutOfSample(breasts, origin, auxiliary_units(rows["val"], fitted.auxiliary, config.auxiliary))
        result = f"best {fitted.selection_summary}"
        look = Look.fit([fitted.typicality], fitted.appearance)
        weights = record_weights(source, fitted.weights)
        write_package(config, [fitted.model], out_of_sample, data, preprocessing, fitted.history, result, look, weights)


def cross_validate(
    config: TrainConfig,
    frame: pd.DataFrame,
    preprocessing: Preprocessing,
    data: Fingerprint,
    source: WeightsSource | None,
) -> None:
    """Train one network per fold on the other folds, and write the ensemble of all networks.

    The left-out fold does not choose the epoch either: the last epoch is used.
    """
    members: list[TrainedModel] = []
    held_out_images: list[pd.DataFrame] = []
    history: History = {}
    folded = frame[frame["fold"].notna()].reset_index(drop=True)
    logits = np.full(len(folded), np.nan)
    auxiliary = np.full((len(folded), count_outputs([AUXILIARY_TARGETS[name] for name in config.auxiliary])), np.nan)
    training_rows = [folded[folded["fold"] != fold] for fold in range(config.folds)]
    network = make_network_config(config, preprocessing, training_rows)
    for fold in range(config.folds):
        held_out = folded["fold"] == fold
        run = config.run / f"fold_{fold}"
        checkpoint = start_or_resume("fold", replace(config, resume=True), run, data["sha256"])
        fitted = train_and_validate(config, run, folded[~held_out], folded[held_out], network, checkpoint)
        if fitted is None:
            return
        # a trainer is in a reference cycle; without this, its loader processes stay alive while the next fold trains
        gc.collect()
        members.append(fitted)
        held_out_images.append(fitted.appearance.loc[folded.index[held_out]])
        logits[held_out] = fitted.logits
        auxiliary[held_out] = fitted.auxiliary
        history |= {f"{name}/fold_{fold}": points for name, points in fitted.history.items()}
    write_table(folded, logits, config.label, config.run / "out_of_fold.csv")
    breasts = aggregate_breasts(folded, logits, config.label)
    result = f"out-of-fold AUROC per breast {compute_metrics(breasts, 0.5).intervals['auroc']}"
    auxiliary_outputs = auxiliary_units(folded, auxiliary, config.auxiliary)
    out_of_sample = OutOfSample(breasts, ScoreOrigin(OUT_OF_FOLD), auxiliary_outputs)
    look = Look.fit([fitted.typicality for fitted in members], pd.concat(held_out_images))
    models = [fitted.model for fitted in members]
    weights = record_weights(source, members[0].weights)
    write_package(config, models, out_of_sample, data, preprocessing, history, result, look, weights)


def write_picture(frame: pd.DataFrame, config: TrainConfig) -> None:
    """Write RUN/augmented.png: augmented training crops, to check by eye that they still look like mammograms."""
    rows = frame[frame["fold"].notna()] if config.folds else frame[frame["split"] == "train"]
    rows = rows.sample(min(MAX_CROPS_SHOWN, len(rows)), random_state=config.seed)
    images = make_crop_dataset(rows, config, augment=True)
    examples = [images[SampleRequest(seed % len(images), seed)] for seed in range(MAX_CROPS_SHOWN)]
    picture = contact_grid([example.image[0].numpy() for example in examples if not example.problem])
    write_atomic(config.run / "augmented.png", cv2.imencode(".png", picture)[1].tobytes())
