"""Stage: manifest -> run folder with checkpoints, curves and a model package. Knows no pixel format."""

from __future__ import annotations

import contextlib
import gc
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from vitmodel.config import Preprocessing, TrainConfig
from vitmodel.data.fingerprint import Fingerprint, fingerprint
from vitmodel.data.manifest import write_manifest
from vitmodel.data.samplers import SampleRequest
from vitmodel.data.splits import write_splits
from vitmodel.jobs.journal import lock_folder
from vitmodel.metrics.metrics import compute_metrics
from vitmodel.model.network import Network
from vitmodel.reports.panel import contact_grid
from vitmodel.training.fit import (
    LABEL,
    check_sizes,
    common_preprocessing,
    labelled_crops,
    make_crop_dataset,
    make_network_config,
    train_and_validate,
)
from vitmodel.training.module import History
from vitmodel.training.packaging import aggregate_breasts, write_package, write_table
from vitmodel.training.trainer import STARTED, is_rank_zero, start_or_resume
from vitmodel.utils import write_atomic

MAX_CROPS_SHOWN = 32  # augmented crops in the picture of a recipe


def train(config: TrainConfig) -> None:
    """Train on the split `train`, choose the epoch, calibrate and set the threshold on `val`, leave `test` alone; write RUN/package.

    With folds: train a model on all folds but one, for each; calibrate and set the threshold on what each says of the fold left out.
    """
    frame = labelled_crops(config)
    preprocessing = common_preprocessing(frame, config.manifest)
    check_sizes(frame, config)
    parts = np.where(frame["fold"].notna(), "train", "test") if config.folds else frame["split"]
    data = fingerprint(frame.assign(split=parts), LABEL)
    with lock_folder(config.run, STARTED) if is_rank_zero() else contextlib.nullcontext():
        checkpoint = start_or_resume("train", config, config.run, data["sha256"])
        if is_rank_zero():
            write_manifest(frame, config.run / "manifest.csv")
            write_splits(frame, config.run / "splits.csv", "fold" if config.folds else "split")
            write_picture(frame, config)
        if config.folds:
            cross_validate(config, frame, preprocessing, data)
        else:
            train_once(config, frame, preprocessing, data, checkpoint)


def train_once(
    config: TrainConfig, frame: pd.DataFrame, preprocessing: Preprocessing, data: Fingerprint, checkpoint: Path | None
) -> None:
    """One model from the splits."""
    rows = {name: frame[frame["split"] == name] for name in ("train", "val")}
    network = make_network_config(config, preprocessing, [rows["train"]])
    fitted = train_and_validate(config, config.run, rows["train"], rows["val"], network, checkpoint)
    if fitted is not None:
        write_table(rows["val"], fitted.logits, config.run / "validation.csv")
        breasts = aggregate_breasts(rows["val"], fitted.logits)
        write_package(
            config, [fitted.model], breasts, data, preprocessing, fitted.history, f"best {fitted.selection_summary}"
        )


def cross_validate(config: TrainConfig, frame: pd.DataFrame, preprocessing: Preprocessing, data: Fingerprint) -> None:
    """A model for each fold, left out in its training and in the choice of its epoch (the last); then the ensemble of all."""
    members: list[Network] = []
    history: History = {}
    folded = frame[frame["fold"].notna()].reset_index(drop=True)
    logits = np.full(len(folded), np.nan)
    network = make_network_config(
        config, preprocessing, [folded[folded["fold"] != fold] for fold in range(config.folds)]
    )
    for fold in range(config.folds):
        held_out = folded["fold"] == fold
        run = config.run / f"fold_{fold}"
        checkpoint = start_or_resume("fold", replace(config, resume=True), run, data["sha256"])
        fitted = train_and_validate(config, run, folded[~held_out], folded[held_out], network, checkpoint)
        if fitted is None:
            return
        gc.collect()  # a trainer and its parts hold each other: the processes of its loaders would live on beside the next fold's
        members.append(fitted.model)
        logits[held_out] = fitted.logits
        history |= {f"{name}/fold_{fold}": points for name, points in fitted.history.items()}
    write_table(folded, logits, config.run / "out_of_fold.csv")
    breasts = aggregate_breasts(folded, logits)
    reached = f"out-of-fold AUROC per breast {compute_metrics(breasts, 0.5).intervals['auroc']}"
    write_package(config, members, breasts, data, preprocessing, history, reached)


def write_picture(frame: pd.DataFrame, config: TrainConfig) -> None:
    """RUN/augmented.png: what the recipe makes of some training crops, so that a person sees whether a mammogram stays one."""
    rows = frame[frame["fold"].notna()] if config.folds else frame[frame["split"] == "train"]
    images = make_crop_dataset(
        rows.sample(min(MAX_CROPS_SHOWN, len(rows)), random_state=config.seed), config, augment=True
    )
    drawn = [images[SampleRequest(row % len(images), row)] for row in range(MAX_CROPS_SHOWN)]
    picture = contact_grid([example.image[0].numpy() for example in drawn if not example.problem])
    write_atomic(config.run / "augmented.png", cv2.imencode(".png", picture)[1].tobytes())
