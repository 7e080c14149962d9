"""Stage: manifest -> run folder with checkpoints, curves and a model package. Knows no pixel format."""

import contextlib
import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from scipy.special import expit

from vitmodel.config import Preprocessing, TrainConfig, to_yaml
from vitmodel.data.fingerprint import Fingerprint, fingerprint
from vitmodel.data.manifest import breast_ids, write_manifest
from vitmodel.data.samplers import Draw
from vitmodel.data.splits import write_splits
from vitmodel.jobs.journal import exclusive
from vitmodel.metrics import calibration
from vitmodel.metrics.metrics import measure
from vitmodel.metrics.scored_units import Sample, to_logit
from vitmodel.metrics.threshold import choose_threshold, purpose
from vitmodel.model.network import Network
from vitmodel.model.package import save_package
from vitmodel.reports.panel import tile
from vitmodel.training.fit import LABEL, check_sizes, common_preprocessing, images_of, labelled_crops, network_of, train_on
from vitmodel.training.module import History
from vitmodel.training.trainer import STARTED, is_first, start_or_resume, system
from vitmodel.utils import NOT_A_MEDICAL_DEVICE, atomic_path, write_atomic

AGGREGATE = "mean_logit"
"""How a breast's images make its score: what is fitted to breasts then holds for the mean of their logits."""
SHOWN = 32  # augmented crops in the picture of a recipe


def train(config: TrainConfig) -> None:
    """Train on the split `train`, choose the epoch, calibrate and set the threshold on `val`, leave `test` alone; write RUN/package.

    With folds: train a model on all folds but one, for each; calibrate and set the threshold on what each says of the fold left out.
    """
    frame = labelled_crops(config)
    preprocessing = common_preprocessing(frame, config.manifest)
    check_sizes(frame, config)
    parts = np.where(frame["fold"].notna(), "train", "test") if config.folds else frame["split"]
    data = fingerprint(frame.assign(split=parts), LABEL)
    with exclusive(config.run, STARTED) if is_first() else contextlib.nullcontext():
        checkpoint = start_or_resume("train", config, config.run, data["sha256"])
        if is_first():
            write_manifest(frame, config.run / "manifest.csv")
            write_splits(frame, config.run / "splits.csv", "fold" if config.folds else "split")
            write_picture(frame, config)
        if config.folds:
            cross_validate(config, frame, preprocessing, data)
        else:
            train_once(config, frame, preprocessing, data, checkpoint)


def train_once(config: TrainConfig, frame: pd.DataFrame, preprocessing: Preprocessing, data: Fingerprint, checkpoint: Path | None) -> None:
    """One model from the splits."""
    rows = {name: frame[frame["split"] == name] for name in ("train", "val")}
    network = network_of(config, preprocessing, [rows["train"]])
    fitted = train_on(config, config.run, rows["train"], rows["val"], network, checkpoint)
    if fitted is not None:
        write_table(rows["val"], fitted.logits, config.run / "validation.csv")
        breasts = breasts_of(rows["val"], fitted.logits)
        write_package(config, [fitted.model], breasts, data, preprocessing, fitted.history, f"best {fitted.reached}")


def cross_validate(config: TrainConfig, frame: pd.DataFrame, preprocessing: Preprocessing, data: Fingerprint) -> None:
    """A model for each fold, left out in its training and in the choice of its epoch (the last); then the ensemble of all."""
    members: list[Network] = []
    history: History = {}
    folded = frame[frame["fold"].notna()].reset_index(drop=True)
    logits = np.full(len(folded), np.nan)
    network = network_of(config, preprocessing, [folded[folded["fold"] != fold] for fold in range(config.folds)])
    for fold in range(config.folds):
        held_out = folded["fold"] == fold
        run = config.run / f"fold_{fold}"
        checkpoint = start_or_resume("fold", replace(config, resume=True), run, data["sha256"])
        fitted = train_on(config, run, folded[~held_out], folded[held_out], network, checkpoint)
        if fitted is None:
            return
        gc.collect()  # a trainer and its parts hold each other: the processes of its loaders would live on beside the next fold's
        members.append(fitted.model)
        logits[held_out] = fitted.logits
        history |= {f"{name}/fold_{fold}": points for name, points in fitted.history.items()}
    write_table(folded, logits, config.run / "out_of_fold.csv")
    breasts = breasts_of(folded, logits)
    reached = f"out-of-fold AUROC per breast {measure(breasts, 0.5).intervals['auroc']}"
    write_package(config, members, breasts, data, preprocessing, history, reached)


def breasts_of(rows: pd.DataFrame, logits: np.ndarray) -> Sample:
    """The rows' breasts, scored by the mean logit of their images (fusion gives all of them the breast's own); those that could not be
    read (NaN) are left out."""
    rows, logits = rows[np.isfinite(logits)], logits[np.isfinite(logits)]
    return Sample(rows[LABEL].to_numpy(), expit(logits), rows["patient_id"].to_numpy()).aggregate(breast_ids(rows), AGGREGATE)


def write_table(rows: pd.DataFrame, logits: np.ndarray, path: Path) -> None:
    """What the models say of images that they did not learn from: raw scores, before any calibration; empty = unreadable."""
    columns = ["image_id", "patient_id", "laterality", "view", "fold", LABEL]
    with atomic_path(path) as temporary:
        rows[columns].assign(score=expit(logits)).to_csv(temporary, index=False)


def write_picture(frame: pd.DataFrame, config: TrainConfig) -> None:
    """RUN/augmented.png: what the recipe makes of some training crops, so that a person sees whether a mammogram stays one."""
    rows = frame[frame["fold"].notna()] if config.folds else frame[frame["split"] == "train"]
    images = images_of(rows.sample(min(SHOWN, len(rows)), random_state=config.seed), config, augment=True)
    drawn = [images[Draw(row % len(images), row)] for row in range(SHOWN)]
    picture = tile([example.image[0].numpy() for example in drawn if not example.problem])
    write_atomic(config.run / "augmented.png", cv2.imencode(".png", picture)[1].tobytes())


def write_package(
    config: TrainConfig,
    models: Sequence[Network],
    breasts: Sample,
    data: Fingerprint,
    preprocessing: Preprocessing,
    history: History,
    reached: str,
) -> None:
    """Write the package, calibrated and with its threshold chosen on `breasts`: raw scores by models that did not learn from them."""
    logits = to_logit(breasts.scores)
    fitted = calibration.fit(config.calibration, breasts.labels, logits)
    threshold = choose_threshold(breasts.labels, fitted.apply(logits), config.objective, config.sensitivity)
    decision = {"level": "breast", "aggregate": "fusion" if config.fusion else AGGREGATE, "threshold": threshold}
    here = system()
    contents = {
        "label": LABEL,
        "preprocessing": preprocessing.to_json(),
        "packed": config.packed,
        "flip": config.flip_average,
        "calibration": fitted.to_dict() | {"level": "breast"},
        "decision": decision | {"objective": config.objective, "sensitivity": config.sensitivity},
        "data": data,
        "history": history,
        "training": to_yaml("train", config, config.run / "train.yaml"),
        "versions": here["versions"],
        "code_sha256": here["code_sha256"],
    }
    save_package(config.run / "package", models, contents, model_card(config, contents, reached))
    print(f"{reached}\npackage: {config.run / 'package'}")


def model_card(config: TrainConfig, contents: dict[str, Any], reached: str) -> str:
    """Return MODEL_CARD.md: what the model is, what it was trained on, and what it must not be used for."""
    splits = "\n".join(
        f"| {name} | {counts['patients']} | {counts['images']} | {counts['positive_images']} |"
        for name, counts in contents["data"]["splits"].items()
    )
    if config.folds:
        kind = f"An ensemble of {config.folds} Vision Transformers, one per fold, that gives the mean of their logits per cropped mammogram"
        where = "patients of the fold that each member was not trained on"
        caution = "This is the performance of single members; the ensemble itself was not measured on any patient."
    else:
        kind = "A Vision Transformer that gives one logit per cropped mammogram"
        where = "validation patients"
        caution = (
            "This figure also selected the epoch and is therefore optimistic; for figures on patients\n"
            "that played no part in training, run `vitmodel evaluate`."
        )
    score = "the logit that the fusion of all images of the exam gives the breast" if config.fusion else "the mean logit of its images"
    return f"""# {config.model}: breast cancer score from a mammogram

**{NOT_A_MEDICAL_DEVICE}**

{kind}.
The probability of a breast is {score}, calibrated
({contents["calibration"]["method"]}) on the breasts of {where}. The decision threshold is
{contents["decision"]["threshold"]:.4f}, chosen on the same patients for: {purpose(config.objective, config.sensitivity)}.

| split | patients | images | cancer images |
|---|---|---|---|
{splits}

{reached[0].upper()}{reached[1:]}. {caution}
Prevalence and machines differ between sites: check calibration and threshold before using the model elsewhere.

```yaml
{contents["training"]}```
"""
