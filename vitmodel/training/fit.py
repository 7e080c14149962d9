"""Train one model on a table of crops: the steps that all training commands share."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import lightning as L
import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, EarlyStopping, EMAWeightAveraging, ModelCheckpoint

from vitmodel.config import AugmentConfig, TrainConfig
from vitmodel.config.auxiliary import AUXILIARY_TARGETS, count_outputs
from vitmodel.data.appearance import CATEGORIES, NUMBERS, measure_appearance
from vitmodel.data.dataset import CropDataset, ExamDataset, crop_size
from vitmodel.data.exams import image_metadata
from vitmodel.data.labels import proven_lesions
from vitmodel.data.lesions import NO_BOXES, boxes_from_text, boxes_on_crop
from vitmodel.data.manifest import breast_ids, exam_ids
from vitmodel.data.rows import mm_per_pixel, to_manifest_rows
from vitmodel.data.samplers import EpochSampler, SequentialSampler
from vitmodel.model.architecture import (
    NetworkConfig,
)
from vitmodel.model.device import resolve_device
from vitmodel.model.low_rank import add_low_rank_updates, merge_low_rank_updates
from vitmodel.model.network import Network
from vitmodel.model.typicality import Typicality, depth_features_shape, record_depth_features
from vitmodel.model.weights import WeightReport
from vitmodel.training.batching import BatchLoader
from vitmodel.training.callbacks import ValidationFigures
from vitmodel.training.initial_network import build_model
from vitmodel.training.module import ClassificationModule, History
from vitmodel.training.trainer import LAST_CHECKPOINT, build_trainer, fit, next_epoch

logger = logging.getLogger(__name__)

MAX_REFERENCE_IMAGES = 5000
"""Most training images that typicality is fitted to and that `drift` compares with."""
MONITOR_METRICS = {"auroc": "val/auroc", "f1": "val/macro_f1"}
"""Logged metric for each choice of `monitor`."""
VERTICAL_FLIP = AugmentConfig(flip=1, rotate=0, scale=0, shift=0, gamma=0, contrast=0, noise=0)
"""Augmentation that produces the flipped image for `flip_average`."""


@dataclass(frozen=True)
class TrainedModel:
    """A trained model and its predictions for the validation images."""

    model: Network
    logits: np.ndarray
    """Logit of each row of the validation table; with exam fusion that of the row's breast. NaN if unreadable."""
    auxiliary: np.ndarray
    """Outputs of the auxiliary heads for each row, `(N, A)`; NaN if unreadable."""
    validation_logits: dict[int, np.ndarray]
    """Logits of each row after each epoch, `(N,)`, without those of epochs before a resume by an older version; empty
    with folds."""
    weights: WeightReport | None
    """What was done with each tensor of the initial weights; None without any."""
    history: History
    selection_summary: str
    """Metric by which the epoch was selected, and its value."""
    typicality: Typicality | None
    """Fitted to the training images and calibrated on the validation images; None if there are too few."""
    appearance: pd.DataFrame
    """What the training and validation images look like: the columns of `data.appearance` and, for the validation
    images, typicality."""


def make_crop_dataset(rows: pd.DataFrame, config: TrainConfig, augment: bool) -> CropDataset:
    """Return the rows' crops with labels, auxiliary targets and, for segments, known lesions and pixel sizes."""
    targets = [torch.tensor(AUXILIARY_TARGETS[name].encode(rows[name].tolist())) for name in config.auxiliary]
    lesions = []
    pixel_sizes = []
    for row, text in zip(to_manifest_rows(rows), proven_lesions(rows, config.label), strict=True):
        # Only segments need the positions of lesions and the pixel size, for which each crop must be opened.
        geometry = row.geometry(crop_size(row.path)) if config.segments else None
        boxes = boxes_from_text(text, row.path) if isinstance(text, str) else NO_BOXES
        lesions.append(NO_BOXES if geometry is None else boxes_on_crop(boxes, geometry))
        pixel_sizes.append(mm_per_pixel(row.spacing_row, geometry))
    return CropDataset(
        rows["path"].tolist(),
        rows[config.label].tolist(),
        config.augment if augment else None,
        torch.stack(targets, dim=1) if targets else None,
        lesions,
        pixel_sizes,
    )


def make_dataset(rows: pd.DataFrame, config: TrainConfig, augment: bool) -> CropDataset | ExamDataset:
    """Return the dataset of crops or, with exam fusion, of exams. Views of exams are dropped only with `augment`."""
    crops = make_crop_dataset(rows, config, augment)
    if not config.fusion:
        return crops
    return ExamDataset(
        crops, exam_ids(rows).tolist(), breast_ids(rows).tolist(), config.view_dropout if augment else 0.0
    )


def train_and_validate(
    config: TrainConfig,
    run: Path,
    train: pd.DataFrame,
    val: pd.DataFrame,
    network: NetworkConfig,
    checkpoint: Path | None,
    watchers: Sequence[Callback] = (),
) -> TrainedModel | None:
    """Train a model on `train` and validate it on `val`.

    Args:
        config: Settings of the training.
        run: The run folder.
        train: Training rows of the manifest.
        val: Validation rows of the manifest.
        network: Configuration of the network.
        checkpoint: Checkpoint to resume from, or None.
        watchers: Additional callbacks of the trainer.

    Returns:
        The trained model; None in all processes but the first.
    """
    L.seed_everything(config.seed, verbose=False)
    train_images = make_dataset(train, config, augment=True)
    val_images = make_dataset(val, config, augment=False)
    initial, weights = build_model(config, network, train)
    learner = ClassificationModule(
        initial,
        config,
        images_per_epoch=len(train_images),
        history={},
        validation_images=0 if config.folds else len(val),
    )
    sampler = EpochSampler(
        train_images.labels.tolist(), config.seed, config.sampling, config.batch_size, next_epoch(checkpoint)
    )
    batches = BatchLoader(train_images, sampler, config, image_metadata(train, network))
    val_batches = BatchLoader(val_images, SequentialSampler(len(val_images)), config, image_metadata(val, network))
    best, callbacks = checkpoint_callbacks(config, run)
    trainer = build_trainer(
        config, run, [*callbacks, *watchers, ValidationFigures(val_images.paths, val["patient_id"].tolist())]
    )
    loaders = [val_batches]
    if config.flip_average:
        loaders.append(_flipped_batches(config, val, network))
    fit(trainer, learner, batches, loaders if learner.validation_images else loaders[:1], checkpoint)
    is_first_process = trainer.is_global_zero
    if dist.is_initialized():
        dist.destroy_process_group()
    if not is_first_process:
        return None
    selected: str | Path = run / LAST_CHECKPOINT
    selection_summary = "last epoch"
    if best:
        selected = best.best_model_path
        selection_summary = f"{best.monitor} {best.best_model_score:.4f}"
    # The model is built again, because a sharded one cannot load whole tensors.
    validation_logits = {epoch: logits.mean(dim=0).numpy() for epoch, logits in learner.validation_logits.items()}
    model = Network(learner.model.config)
    if config.lora:
        add_low_rank_updates(model.trunk, config.lora)
    learner = ClassificationModule(model, config, len(train_images), learner.history)
    learner.load_state_dict(torch.load(selected, weights_only=True)["state_dict"])
    if config.lora:
        merge_low_rank_updates(model.trunk)
    judged = predict_rows(learner, val_batches, val)
    outputs = judged.outputs
    if config.flip_average:
        outputs = (outputs + predict_rows(learner, loaders[1], val).outputs) / 2
    known = sample_exams(train, MAX_REFERENCE_IMAGES, config.seed)
    known_images = make_dataset(known, config, augment=False)
    in_order = SequentialSampler(len(known_images))
    known_batches = BatchLoader(known_images, in_order, config, image_metadata(known, network))
    reference = predict_rows(learner, known_batches, known)
    typicality = Typicality.fit(reference.depths, judged.depths)
    found = np.full(len(val), np.nan) if typicality is None else typicality(judged.depths)
    appearance = pd.concat([reference.appearance.assign(typicality=np.nan), judged.appearance.assign(typicality=found)])
    return TrainedModel(
        model=learner.model,
        logits=outputs[:, 0],
        auxiliary=outputs[:, 1:],
        validation_logits=validation_logits,
        weights=weights,
        history=learner.history,
        selection_summary=selection_summary,
        typicality=typicality,
        appearance=appearance,
    )


def sample_exams(rows: pd.DataFrame, most: int, seed: int) -> pd.DataFrame:
    """Return the rows of random exams with about `most` images in all, in their order; all rows if they are fewer."""
    if len(rows) <= most:
        return rows
    exams = exam_ids(rows)
    order = exams.drop_duplicates().sample(frac=1, random_state=seed)
    sizes = exams.value_counts()[order].cumsum()
    return rows[exams.isin(sizes.index[sizes <= most])]


def _flipped_batches(config: TrainConfig, val: pd.DataFrame, network: NetworkConfig) -> BatchLoader:
    """Return batches of the vertically flipped validation images, all views included."""
    all_views = replace(config, view_dropout=0.0) if config.fusion else config
    flipped = make_dataset(val, replace(all_views, augment=VERTICAL_FLIP), augment=True)
    return BatchLoader(flipped, SequentialSampler(len(flipped)), config, image_metadata(val, network))


def checkpoint_callbacks(config: TrainConfig, run: Path) -> tuple[ModelCheckpoint | None, list[Callback]]:
    """Return the callback that saves the best epoch, and all callbacks that save, average or stop.

    The first is None with folds, which use the last epoch.
    """
    metric = MONITOR_METRICS[config.monitor]
    best = ModelCheckpoint(run / "checkpoints", "best", monitor=metric, mode="max", enable_version_counter=False)
    # `last` must run after `best`, because it saves the state of `best`.
    last = ModelCheckpoint(run / LAST_CHECKPOINT.parent, LAST_CHECKPOINT.stem, enable_version_counter=False)
    average: list[Callback] = [EMAWeightAveraging(decay=config.ema)] if config.ema else []
    if config.folds:
        return None, [*average, last]
    stop: list[Callback] = [EarlyStopping(metric, mode="max", patience=config.patience)] if config.patience else []
    return best, [*average, best, last, *stop]


@dataclass(frozen=True)
class RowOutputs:
    """What a network computes from the images of a table; NaN for unreadable images."""

    outputs: np.ndarray
    """Logit and auxiliary outputs, `(N, 1 + A)`."""
    depths: np.ndarray
    """Features of `model.typicality`, `(N, F, D)`."""
    appearance: pd.DataFrame
    """The columns of `data.appearance`."""


def predict_rows(learner: ClassificationModule, batches: BatchLoader, rows: pd.DataFrame) -> RowOutputs:
    """Return what `learner` computes from the images of a table, in its order.

    Args:
        learner: The trained module.
        batches: Batches of the images.
        rows: The rows of the images.
    """
    device = resolve_device(learner.config.device)
    learner.eval().to(device)
    trunk = learner.model.trunk
    records = to_manifest_rows(rows)
    outputs = np.full((len(rows), 1 + count_outputs(learner.model.config.auxiliary)), np.nan)
    depths = np.full((len(rows), *depth_features_shape(trunk)), np.nan, np.float32)
    numbers = np.full((len(rows), len(NUMBERS)), np.nan)
    with torch.inference_mode():
        for batch in batches:
            places = batch.row.numpy()
            for place, image in zip(places, batch.pack.images, strict=True):
                appearance = measure_appearance(image[0].numpy(), records[place]._asdict())
                numbers[place] = np.array(list(appearance.to_record().values()), float)
            with record_depth_features(trunk) as recorded:
                outputs[places] = learner(batch.pack.to(device)).float().cpu().numpy()
            depths[places] = recorded.of_first(len(places)).cpu().numpy()
    names = rows[["patient_id", *CATEGORIES]]
    return RowOutputs(outputs, depths, names.assign(**dict(zip(NUMBERS, numbers.T, strict=True))))
