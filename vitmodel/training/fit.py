"""One training, from a table to a model: what the stages that train have in common. Knows no package and no command line."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import lightning as L
import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, EarlyStopping, EMAWeightAveraging, ModelCheckpoint

from vitmodel.config import AugmentConfig, Preprocessing, Size, TrainConfig, TrainingConfig, listed
from vitmodel.data.dataset import CropDataset, ExamDataset, crop_size
from vitmodel.data.exams import build_vocabulary, check_exams, check_sources, image_metadata
from vitmodel.data.lesions import NO_BOXES, boxes_from_text, boxes_on_crop
from vitmodel.data.manifest import breast_ids, is_repeated_file, read_manifests, usable_rows
from vitmodel.data.rows import mm_per_pixel, to_manifest_rows
from vitmodel.data.samplers import EpochSampler, SequentialSampler
from vitmodel.data.splits import assign_folds, assign_splits, read_splits
from vitmodel.errors import UsageError
from vitmodel.model.architecture import PRESETS, ExamConfig, NetworkConfig, SourcesConfig, ViTConfig
from vitmodel.model.device import resolve_device
from vitmodel.model.network import Network
from vitmodel.model.packed_batch import check_token_budget
from vitmodel.model.segments import check_segments
from vitmodel.model.weights import WeightAction, fit_weights, load_weights
from vitmodel.training.batching import BatchLoader
from vitmodel.training.callbacks import ValidationFigures
from vitmodel.training.losses import AUXILIARY_TARGETS, prior_bias
from vitmodel.training.module import ClassificationModule, History
from vitmodel.training.trainer import LAST_CHECKPOINT, build_trainer, fit, next_epoch

logger = logging.getLogger(__name__)

LABEL = "cancer"
MONITOR_METRICS = {"auroc": "val/auroc", "f1": "val/macro_f1"}
"""The logged figure that each choice of `monitor` means."""
VERTICAL_FLIP = AugmentConfig(flip=1, rotate=0, scale=0, shift=0, gamma=0, contrast=0, noise=0)
"""The other look at an image that `flip_average` takes."""


@dataclass(frozen=True)
class TrainedModel:
    """A trained model and what it says of images that it did not learn from."""

    model: Network
    logits: np.ndarray
    """By row of the table that it was validated on, with the fusion of exams those of the row's breast; NaN = unreadable."""
    history: History
    selection_summary: str
    """The figure that chose its epoch."""


def read_cropped_manifest(manifests: Sequence[Path]) -> pd.DataFrame:
    """Return the usable rows of one or several manifests. Raises UsageError where the images are not cropped."""
    frame = read_manifests(manifests)
    if frame["preprocessing"].isna().all():
        raise UsageError(f"{listed(manifests)}: its images are not cropped; run `vitmodel etl` on it first")
    return usable_rows(frame)


def labelled_crops(config: TrainConfig) -> pd.DataFrame:
    """The manifest's usable rows with a known label and a split or fold, copies of an image left out. With the fusion of exams, all of a
    patient of whom one is known.

    Raises UsageError where there is nothing to train on, or an option asks for what the rows do not have.
    """
    frame, manifest = read_cropped_manifest(config.manifest), listed(config.manifest)
    known = frame[LABEL].notna()
    frame = frame[known.groupby(frame["patient_id"]).transform("any") if config.fusion else known]
    copies = is_repeated_file(frame)
    if copies.any():
        logger.warning("left out, byte for byte copies of another image of their breast: %d", copies.sum())
    frame = frame[~copies]
    if frame.empty:
        raise UsageError(f"{manifest}: no row is usable and has a known `{LABEL}`")
    check_sources(frame, config.sources, manifest)
    if config.fusion:
        check_exams(frame, manifest)
    for name in config.auxiliary:
        if AUXILIARY_TARGETS[name].encode(frame[name].tolist()).isnan().all():
            raise UsageError(f"{manifest}: column {name} is unknown in all rows; leave it out of --auxiliary")
    column, where = ("fold" if config.folds else "split"), config.splits or manifest
    if config.splits is not None:
        frame = read_splits(frame, config.splits, column)
    elif config.folds:
        frame = assign_folds(frame, config.folds, config.seed)
    if not config.folds:
        fractions = {"train": 1 - config.val - config.test, "val": config.val, "test": config.test}
        frame = assign_splits(frame, {name: part for name, part in fractions.items() if part > 0}, config.seed)
    for part in range(config.folds) or ("train", "val"):
        rows = frame[frame[column] == part]
        if rows[LABEL].groupby(breast_ids(rows)).max().nunique() < 2:  # calibration and threshold are per breast
            raise UsageError(
                f"{where}: {column} {part} needs breasts with and without {LABEL}; mend or empty the column `{column}`"
            )
    return frame


def common_preprocessing(frame: pd.DataFrame, manifests: Sequence[Path]) -> Preprocessing:
    """The preprocessing that all crops went through. Raises UsageError where they differ."""
    kinds = sorted(frame["preprocessing"].unique())
    if len(kinds) > 1:
        raise UsageError(
            f"{listed(manifests)}: its crops were made in {len(kinds)} ways, {'; '.join(kinds)}; run `vitmodel etl` on all"
        )
    return Preprocessing.from_json(kinds[0])


def check_sizes(frame: pd.DataFrame, config: TrainingConfig) -> None:
    """Raises UsageError naming a crop that exceeds the budget of tokens if all of it is tissue: better now than in the tenth epoch. So for
    segments that the network cannot take."""
    patch, prefix = PRESETS[config.model].patch, PRESETS[config.model].num_prefix_tokens
    if isinstance(config, TrainConfig) and config.segmenting:
        check_segments(config.segmenting, patch, prefix)
    sizes = [crop_size(path) for path in frame["path"]]
    lengths = pd.Series(
        [prefix + math.ceil(height / patch) * math.ceil(width / patch) for height, width in sizes], index=frame.index
    )
    for path, length in zip(frame["path"], lengths, strict=True):
        check_token_budget(path, length, config.most_tokens)
    if isinstance(config, TrainConfig) and config.fusion:
        for patient, images in lengths.groupby(frame["patient_id"]):
            check_token_budget(
                f"the exam of patient {patient} ({len(images)} images)", int(images.sum()), config.most_tokens
            )


def make_vit_config(config: TrainingConfig, size: Size) -> ViTConfig:
    """The preset with the recipe's changes, for crops of `size`."""
    return replace(
        PRESETS[config.model], image_size=size, pool=config.pool, stem=config.stem, drop_path=config.drop_path
    )


def make_network_config(
    config: TrainConfig, preprocessing: Preprocessing, trainings: Sequence[pd.DataFrame]
) -> NetworkConfig:
    """The preset at the crops' size, or that of segments, with all that stands around it; sources and views are those that each of
    `trainings` has in number."""
    size = Size(config.segments, config.segments) if config.segments else preprocessing.size
    wanted = dict.fromkeys([*config.sources, *(["view"] if config.fusion else [])])
    learned = {column: build_vocabulary(column, trainings, config.source_images) for column in wanted}
    columns, views = tuple(learned[column] for column in config.sources), learned.get("view")
    return NetworkConfig(
        vit=make_vit_config(config, size),
        sources=SourcesConfig(columns=columns) if columns else None,
        exam=ExamConfig(views=views, asymmetry=config.asymmetry) if config.fusion and views else None,
        segments=config.segmenting,
    )


def build_model(config: TrainConfig, network: NetworkConfig, train: pd.DataFrame) -> Network:
    """The network with the given weights; the head's bias starts at the prior that the sampler shows."""
    weights = load_weights(config.weights) if config.weights is not None else None
    if weights is not None and weights.eps is not None:
        network = replace(network, vit=replace(network.vit, eps=weights.eps))
    model = Network(network)
    model.trunk.gradient_checkpointing = config.checkpointing
    torch.nn.init.constant_(
        model.trunk.head.bias, prior_bias(0.5 if config.sampling == "balanced" else float(train[LABEL].mean()))
    )
    if weights is not None:
        report, own = fit_weights(model.trunk, weights), model.trunk.state_dict()
        print(
            replace(
                report,
                actions=(
                    *report.actions,
                    *(WeightAction("fresh", name) for name in model.tensors() if name not in own),
                ),
            )
        )
    return model


def make_crop_dataset(rows: pd.DataFrame, config: TrainConfig, augment: bool) -> CropDataset:
    """The rows' crops with labels and auxiliary targets and, for segments, known lesions and scale."""
    targets = [AUXILIARY_TARGETS[name].encode(rows[name].tolist()) for name in config.auxiliary]
    # segments alone ask where a lesion lies and how large a pixel is, for which each crop must be opened
    known = [(row, row.geometry(crop_size(row.path)) if config.segments else None) for row in to_manifest_rows(rows)]
    boxes = [boxes_from_text(text) if isinstance(text, str) else NO_BOXES for text in rows["lesions"]]
    return CropDataset(
        rows["path"].tolist(),
        rows[LABEL].tolist(),
        config.augment if augment else None,
        torch.stack(targets, dim=1) if targets else None,
        [
            NO_BOXES if place is None else boxes_on_crop(each, place)
            for each, (_, place) in zip(boxes, known, strict=True)
        ],
        [mm_per_pixel(row.spacing_row, place) for row, place in known],
    )


def make_dataset(rows: pd.DataFrame, config: TrainConfig, augment: bool) -> CropDataset | ExamDataset:
    """What a step's draws come from: crops or, with their fusion, exams, of which images are left out only where they are changed, too."""
    crops = make_crop_dataset(rows, config, augment)
    if not config.fusion:
        return crops
    return ExamDataset(
        crops, rows["patient_id"].tolist(), breast_ids(rows).tolist(), config.view_dropout if augment else 0.0
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
    """Train a model on `train` and watch it on `val`; None in all processes but the first."""
    L.seed_everything(config.seed, verbose=False)
    train_images, val_images = make_dataset(train, config, augment=True), make_dataset(val, config, augment=False)
    learner = ClassificationModule(
        build_model(config, network, train), config, images_per_epoch=len(train_images), history={}
    )
    order = EpochSampler(
        train_images.labels.tolist(), config.seed, config.sampling, config.batch_size, next_epoch(checkpoint)
    )
    batches = BatchLoader(train_images, order, config, image_metadata(train, network))
    val_batches = BatchLoader(val_images, SequentialSampler(len(val_images)), config, image_metadata(val, network))
    best, callbacks = checkpoint_callbacks(config, run)
    trainer = build_trainer(
        config, run, [*callbacks, *watchers, ValidationFigures(val_images.paths, val["patient_id"].tolist())]
    )
    fit(trainer, learner, batches, val_batches, checkpoint)
    first = trainer.is_global_zero
    if dist.is_initialized():
        dist.destroy_process_group()
    if not first:
        return None
    chosen, selection_summary = (
        (best.best_model_path, f"{best.monitor} {best.best_model_score:.4f}")
        if best
        else (run / LAST_CHECKPOINT, "last epoch")
    )
    learner = ClassificationModule(
        Network(learner.model.config), config, len(train_images), learner.history
    )  # afresh: shards are no model
    learner.load_state_dict(torch.load(chosen, weights_only=True)["state_dict"])
    looks = [val_batches]
    if config.flip_average:
        all_views = replace(config, view_dropout=0.0) if config.fusion else config
        turned = make_dataset(val, replace(all_views, augment=VERTICAL_FLIP), augment=True)
        looks.append(BatchLoader(turned, SequentialSampler(len(turned)), config, image_metadata(val, network)))
    logits = np.mean([validation_logits(learner, look, len(val)) for look in looks], axis=0)
    return TrainedModel(learner.model, logits, learner.history, selection_summary)


def checkpoint_callbacks(config: TrainConfig, run: Path) -> tuple[ModelCheckpoint | None, list[Callback]]:
    """What keeps weights: an average of them, the best epoch's (unless folds take the last), the last epoch's; and when to stop."""
    figure = MONITOR_METRICS[config.monitor]
    best = ModelCheckpoint(run / "checkpoints", "best", monitor=figure, mode="max", enable_version_counter=False)
    last = ModelCheckpoint(
        run / LAST_CHECKPOINT.parent, LAST_CHECKPOINT.stem, enable_version_counter=False
    )  # after `best`, whose state it holds
    average: list[Callback] = [EMAWeightAveraging(decay=config.ema)] if config.ema else []
    if config.folds:
        return None, [*average, last]
    stop: list[Callback] = [EarlyStopping(figure, mode="max", patience=config.patience)] if config.patience else []
    return best, [*average, best, last, *stop]


def validation_logits(learner: ClassificationModule, batches: BatchLoader, count: int) -> np.ndarray:
    """Logits of the images, or of their breasts, in the order of their table; NaN = unreadable."""
    device = resolve_device(learner.config.device)
    learner.eval().to(device)
    logits = np.full(count, np.nan)
    with torch.inference_mode():
        for batch in batches:
            logits[batch.row.numpy()] = learner(batch.pack.to(device)).float().cpu().numpy()
    return logits
