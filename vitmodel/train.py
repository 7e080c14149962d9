"""Stage: manifest -> run folder with checkpoints, curves and a model package. Knows no pixel format."""

if __name__ == "__main__":  # run as a file: the command line runs this stage under its own name, with the checkout on the path
    import sys

    sys.path[0] = __file__.rsplit("/", 2)[0]
    from vitmodel.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import lightning as L
import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from scipy.special import expit

from vitmodel.batches import Batches
from vitmodel.config import Preprocessing, TrainConfig, TrainingConfig, to_yaml
from vitmodel.data.dataset import CropDataset, crop_size
from vitmodel.data.fingerprint import fingerprint
from vitmodel.data.journal import exclusive
from vitmodel.data.manifest import breast_ids, read_manifest, usable, write_manifest
from vitmodel.data.panel import tile
from vitmodel.data.samplers import Draw, InOrder, Shuffled
from vitmodel.data.splits import assign_folds, assign_splits, read_splits, write_splits
from vitmodel.learner import History, Learner
from vitmodel.measure import calibration
from vitmodel.measure.metrics import measure
from vitmodel.measure.sample import Sample
from vitmodel.measure.threshold import choose_threshold
from vitmodel.model.architecture import PRESETS
from vitmodel.model.losses import TARGETS, prior_bias
from vitmodel.model.package import save_package
from vitmodel.model.packing import check_budget
from vitmodel.model.vit import ViT
from vitmodel.model.weights import fit_weights, load_weights
from vitmodel.monitoring import Pictures
from vitmodel.trainer import LAST, build_trainer, fit, is_first, next_epoch, start_or_resume, system
from vitmodel.utils import NOT_A_MEDICAL_DEVICE, UsageError, atomic_path, write_atomic

LABEL = "cancer"
SHOWN = 32  # augmented crops in the picture of a recipe


@dataclass(frozen=True)
class Fitted:
    """A trained model and what it says of images that it did not learn from."""

    model: ViT
    logits: np.ndarray
    """By row of the table that it was validated on; NaN = unreadable."""
    history: History
    reached: str
    """The figure that chose its epoch."""


def train(config: TrainConfig) -> None:
    """Train on the split `train`, choose the epoch, calibrate and set the threshold on `val`, leave `test` alone; write RUN/package.

    With folds: train a model on all folds but one, for each; calibrate and set the threshold on what each says of the fold left out.
    """
    frame = labelled_crops(config)
    preprocessing = common_preprocessing(frame, config.manifest)
    check_sizes(frame, config)
    with exclusive(config.run) if is_first() else contextlib.nullcontext():
        checkpoint = start_or_resume("train", config, config.run)
        if is_first():
            write_manifest(frame, config.run / "manifest.csv")
            write_splits(frame, config.run / "splits.csv", "fold" if config.folds else "split")
            write_picture(frame, config)
        if config.folds:
            cross_validate(config, frame, preprocessing)
        else:
            train_once(config, frame, preprocessing, checkpoint)


def train_once(config: TrainConfig, frame: pd.DataFrame, preprocessing: Preprocessing, checkpoint: Path | None) -> None:
    """One model from the splits."""
    rows = {name: frame[frame["split"] == name] for name in ("train", "val")}
    fitted = train_on(config, config.run, rows["train"], rows["val"], preprocessing, checkpoint)
    if fitted is not None:
        write_package(config, [fitted.model], rows["val"], fitted.logits, frame, preprocessing, fitted.history, f"best {fitted.reached}")


def cross_validate(config: TrainConfig, frame: pd.DataFrame, preprocessing: Preprocessing) -> None:
    """A model for each fold, left out in its training and in the choice of its epoch (the last); then the ensemble of all."""
    members: list[ViT] = []
    history: History = {}
    frame = frame.assign(split=np.where(frame["fold"].notna(), "train", "test"))
    folded = frame[frame["fold"].notna()].reset_index(drop=True)
    logits = np.full(len(folded), np.nan)
    for fold in range(config.folds):
        held_out = folded["fold"] == fold
        run = config.run / f"fold_{fold}"
        checkpoint = start_or_resume("fold", replace(config, resume=True), run)
        fitted = train_on(config, run, folded[~held_out], folded[held_out], preprocessing, checkpoint)
        if fitted is None:
            return
        members.append(fitted.model)
        logits[held_out] = fitted.logits
        history |= {f"{name}/fold_{fold}": points for name, points in fitted.history.items()}
    ids = ["image_id", "patient_id", "laterality", "view", "fold", LABEL]
    with atomic_path(config.run / "out_of_fold.csv") as temporary:
        folded[ids].assign(score=expit(logits)).to_csv(temporary, index=False)
    found = folded[np.isfinite(logits)]
    breasts = Sample(found[LABEL], expit(logits[np.isfinite(logits)]), found["patient_id"]).aggregate(breast_ids(found), "mean")
    reached = f"out-of-fold AUROC per breast {measure(breasts, 0.5).intervals['auroc']}"
    write_package(config, members, folded, logits, frame, preprocessing, history, reached)


def train_on(
    config: TrainConfig, run: Path, train: pd.DataFrame, val: pd.DataFrame, preprocessing: Preprocessing, checkpoint: Path | None
) -> Fitted | None:
    """Train a model on `train` and watch it on `val`; None in all processes but the first."""
    L.seed_everything(config.seed, verbose=False)
    learner = Learner(build_model(config, preprocessing, train), config, images=len(train), history={})
    train_images, val_images = images_of(train, config, augment=True), images_of(val, config, augment=False)
    order = Shuffled(train[LABEL].tolist(), config.seed, config.sampling, config.batch_size, next_epoch(checkpoint))
    batches, val_batches = Batches(train_images, order, config), Batches(val_images, InOrder(len(val)), config)
    best, callbacks = choosers(config, run)
    trainer = build_trainer(config, run, [*callbacks, Pictures(val_images.paths, val["patient_id"].tolist())])
    fit(trainer, learner, batches, val_batches, checkpoint)
    first = trainer.is_global_zero
    if dist.is_initialized():
        dist.destroy_process_group()
    if not first:
        return None
    chosen, reached = (best.best_model_path, f"{best.monitor} {best.best_model_score:.4f}") if best else (run / LAST, "last epoch")
    learner.load_state_dict(torch.load(chosen, weights_only=True)["state_dict"])
    return Fitted(learner.model, validation_logits(learner, val_batches, len(val)), learner.history, reached)


def choosers(config: TrainConfig, run: Path) -> tuple[ModelCheckpoint | None, list[Callback]]:
    """What keeps weights: an average of them, the best epoch's (unless folds take the last), the last epoch's; and when to stop."""
    figure = {"auroc": "val/auroc", "f1": "val/macro_f1"}[config.monitor]
    best = ModelCheckpoint(run / "checkpoints", "best", monitor=figure, mode="max", enable_version_counter=False)
    last = ModelCheckpoint(run / LAST.parent, LAST.stem, enable_version_counter=False)  # after `best`, whose state it holds
    average: list[Callback] = [EMAWeightAveraging(decay=config.ema)] if config.ema else []
    if config.folds:
        return None, [*average, last]
    stop: list[Callback] = [EarlyStopping(figure, mode="max", patience=config.patience)] if config.patience else []
    return best, [*average, best, last, *stop]


def labelled_crops(config: TrainConfig) -> pd.DataFrame:
    """The manifest's usable rows with a known label and a split or fold. Raises UsageError where there is nothing to train on."""
    frame = read_manifest(config.manifest)
    if frame["preprocessing"].isna().all():
        raise UsageError(f"{config.manifest}: its images are not cropped; run `vitmodel etl` on it first")
    frame = usable(frame).dropna(subset=[LABEL])
    if frame.empty:
        raise UsageError(f"{config.manifest}: no row is usable and has a known `{LABEL}`")
    for name in config.auxiliary:
        if TARGETS[name].encode(frame[name].tolist()).isnan().all():
            raise UsageError(f"{config.manifest}: column {name} is unknown in all rows; leave it out of --auxiliary")
    column, where = ("fold" if config.folds else "split"), config.splits or config.manifest
    if config.splits is not None:
        frame = read_splits(frame, config.splits, column)
    elif config.folds:
        frame = assign_folds(frame, config.folds, config.seed)
    if not config.folds:
        fractions = {"train": 1 - config.val - config.test, "val": config.val, "test": config.test}
        frame = assign_splits(frame, {name: part for name, part in fractions.items() if part > 0}, config.seed)
    for part in range(config.folds) or ("train", "val"):
        if frame.loc[frame[column] == part, LABEL].nunique() < 2:
            raise UsageError(f"{where}: {column} {part} needs images with and without {LABEL}; mend or empty the column `{column}`")
    return frame


def common_preprocessing(frame: pd.DataFrame, manifest: Path) -> Preprocessing:
    """The preprocessing that all crops went through. Raises UsageError where they differ."""
    kinds = sorted(frame["preprocessing"].unique())
    if len(kinds) > 1:
        raise UsageError(f"{manifest}: its crops were made in {len(kinds)} ways, {'; '.join(kinds)}; run `vitmodel etl` on all")
    return Preprocessing.from_json(kinds[0])


def check_sizes(frame: pd.DataFrame, config: TrainingConfig) -> None:
    """Raises UsageError naming a crop that exceeds the budget of tokens if all of it is tissue: better now than in the tenth epoch."""
    patch, prefix = PRESETS[config.model].patch, PRESETS[config.model].prefix
    for path in frame["path"]:
        height, width = crop_size(path)
        check_budget(path, prefix + math.ceil(height / patch) * math.ceil(width / patch), config.tokens)


def build_model(config: TrainConfig, preprocessing: Preprocessing, train: pd.DataFrame) -> ViT:
    """The preset at the crops' size, with the given weights; the head's bias starts at the prior that the sampler shows."""
    architecture = replace(
        PRESETS[config.model], image_size=preprocessing.size, pool=config.pool, stem=config.stem, drop_path=config.drop_path
    )
    model = ViT(architecture)
    torch.nn.init.constant_(model.head.bias, prior_bias(0.5 if config.sampling == "balanced" else float(train[LABEL].mean())))
    if config.weights is not None:
        print(fit_weights(model, load_weights(config.weights)))
    return model


def images_of(rows: pd.DataFrame, config: TrainConfig, augment: bool) -> CropDataset:
    """The rows' crops with labels and auxiliary targets."""
    targets = [TARGETS[name].encode(rows[name].tolist()) for name in config.auxiliary]
    return CropDataset(
        rows["path"].tolist(), rows[LABEL].tolist(), config.augment if augment else None, torch.stack(targets, dim=1) if targets else None
    )


def write_picture(frame: pd.DataFrame, config: TrainConfig) -> None:
    """RUN/augmented.png: what the recipe makes of some training crops, so that a person sees whether a mammogram stays one."""
    rows = frame[frame["fold"].notna()] if config.folds else frame[frame["split"] == "train"]
    images = images_of(rows.sample(min(SHOWN, len(rows)), random_state=config.seed), config, augment=True)
    drawn = [images[Draw(row % len(images), row)] for row in range(SHOWN)]
    picture = tile([example.image[0].numpy() for example in drawn if not example.problem])
    write_atomic(config.run / "augmented.png", cv2.imencode(".png", picture)[1].tobytes())


def validation_logits(learner: Learner, batches: Batches, count: int) -> np.ndarray:
    """Logits of the images in the order of their table; NaN = unreadable."""
    learner.eval().cpu()
    logits = np.full(count, np.nan)
    with torch.inference_mode():
        for batch in batches:
            logits[batch.row.numpy()] = learner(batch.pack).float().numpy()
    return logits


def write_package(
    config: TrainConfig,
    models: Sequence[ViT],
    rows: pd.DataFrame,
    logits: np.ndarray,
    frame: pd.DataFrame,
    preprocessing: Preprocessing,
    history: History,
    reached: str,
) -> None:
    """Write the package, calibrated and with the threshold chosen on `rows`, of which `logits` come from models that did not learn them."""
    rows, logits = rows[np.isfinite(logits)], logits[np.isfinite(logits)]
    fitted = calibration.fit("platt", rows[LABEL], logits)
    breasts = Sample(rows[LABEL].to_numpy(), fitted.apply(logits), rows["patient_id"].to_numpy()).aggregate(breast_ids(rows), "mean")
    threshold = choose_threshold(breasts.labels, breasts.scores, "f1")
    contents = {
        "label": LABEL,
        "preprocessing": preprocessing.to_json(),
        "packed": config.packed,
        "calibration": fitted.to_dict(),
        "decision": {"level": "breast", "aggregate": "mean", "objective": "f1", "threshold": threshold},
        "data": fingerprint(frame, LABEL),
        "history": history,
        "training": to_yaml("train", config, config.run / "train.yaml"),
        "versions": system()["versions"],
    }
    save_package(config.run / "package", models, contents, model_card(config, contents, reached))
    print(f"{reached}\npackage: {config.run / 'package'}")


def model_card(config: TrainConfig, contents: dict[str, Any], reached: str) -> str:
    """MODEL_CARD.md: what the model is, what it saw, and what it must not be used for."""
    splits = "\n".join(
        f"| {name} | {counts['patients']} | {counts['images']} | {counts['positive_images']} |"
        for name, counts in contents["data"]["splits"].items()
    )
    kind = f"{config.folds} Vision Transformers, one for each fold, whose logits are averaged," if config.folds else "A Vision Transformer"
    where = "patients of the fold that each one did not see" if config.folds else "validation patients"
    caution = (
        "The ensemble itself was measured on nobody: each figure is of single members."
        if config.folds
        else "It picked the epoch, so it flatters the model; figures on patients that played\nno part come from `vitmodel evaluate`."
    )
    return f"""# {config.model}: breast cancer score from a mammogram

**{NOT_A_MEDICAL_DEVICE}**

{kind} that give one logit per cropped mammogram; the breast's probability is the mean over its images, calibrated on
{where} ({contents["calibration"]["method"]}). Decision threshold {contents["decision"]["threshold"]:.4f}, chosen for the best
{contents["decision"]["objective"]} on the same patients.

| split | patients | images | cancer images |
|---|---|---|---|
{splits}

{reached[0].upper()}{reached[1:]}. {caution} Prevalence and machines
elsewhere differ: calibration and threshold do not carry over unchecked.

```yaml
{contents["training"]}```
"""
