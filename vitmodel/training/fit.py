"""Train one model on a table of crops: the steps that all training commands share."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import yaml
from lightning.pytorch.callbacks import Callback, EarlyStopping, EMAWeightAveraging, ModelCheckpoint

from vitmodel.config import AugmentConfig, Preprocessing, Size, TrainConfig, TrainingConfig, listed
from vitmodel.config.auxiliary import AUXILIARY_TARGETS, count_outputs
from vitmodel.config.labels import CANCER, LabelRule, target_name
from vitmodel.data.appearance import CATEGORIES, NUMBERS, measure_appearance
from vitmodel.data.dataset import CropDataset, ExamDataset, crop_size
from vitmodel.data.exams import build_vocabulary, check_exams, check_sources, image_metadata
from vitmodel.data.labels import add_label, explain_missing, proven_lesions
from vitmodel.data.lesions import NO_BOXES, boxes_from_text, boxes_on_crop
from vitmodel.data.manifest import breast_ids, exam_ids, is_repeated_file, read_manifests, usable_rows
from vitmodel.data.rows import mm_per_pixel, to_manifest_rows
from vitmodel.data.samplers import EpochSampler, SequentialSampler
from vitmodel.data.splits import assign_folds, assign_splits, read_splits
from vitmodel.errors import UsageError
from vitmodel.hub.aliases import ALIASES
from vitmodel.hub.names import weights_name
from vitmodel.model.architecture import (
    PRESETS,
    ExamConfig,
    NetworkConfig,
    SourcesConfig,
    ViTConfig,
    whole_patches,
)
from vitmodel.model.device import resolve_device
from vitmodel.model.low_rank import add_low_rank_updates, merge_low_rank_updates
from vitmodel.model.network import Network
from vitmodel.model.packed_batch import check_token_budget
from vitmodel.model.pretrained import preset_of
from vitmodel.model.segments import check_segments
from vitmodel.model.typicality import Typicality, depth_features_shape, record_depth_features
from vitmodel.model.weight_source import WeightsSource, find_weights, weights_source
from vitmodel.model.weights import WeightAction, WeightReport, fit_weights, load_weights
from vitmodel.training.batching import BatchLoader
from vitmodel.training.callbacks import ValidationFigures
from vitmodel.training.losses import prior_bias
from vitmodel.training.module import ClassificationModule, History
from vitmodel.training.trainer import LAST_CHECKPOINT, build_trainer, fit, next_epoch

logger = logging.getLogger(__name__)

MAX_REFERENCE_IMAGES = 5000
"""Most training images that typicality is fitted to and that `drift` compares with."""
RECIPES_OF_RUNS = ("train.yaml", "tune.yaml")
"""Names of the recipe in a run folder."""
TrainerConfig = TypeVar("TrainerConfig", bound=TrainConfig)
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


def read_cropped_manifest(manifests: Sequence[Path]) -> pd.DataFrame:
    """Return the usable rows of one or several manifests. Raise UsageError if the images are not cropped."""
    frame = read_manifests(manifests)
    if frame["preprocessing"].isna().all():
        raise UsageError(f"{listed(manifests)}: its images are not cropped; run `vitmodel etl` on it first")
    return usable_rows(frame)


def settle_network(config: TrainerConfig, preprocessing: Preprocessing) -> tuple[TrainerConfig, WeightsSource | None]:
    """Return the configuration with the size of the network and the exact revision of --weights, and their source.

    Names of weights are replaced by their repository at a commit, so that folds, resumed runs and the recipe in the run
    folder use the same weights, whatever happens to the repository meanwhile.

    Args:
        config: Settings of the training.
        preprocessing: Preprocessing of the crops.

    Raises:
        UsageError: There are no weights of this name, no preset fits them, or patches do not fill the crops.
        VitmodelError: The weights cannot be downloaded or read.
    """
    alias = ALIASES.get(str(config.weights).partition("@")[0])
    if config.model == "auto" and alias and weights_name(str(config.weights)):
        config = _with_model(config, alias.preset)  # known before the download
    if config.model != "auto":
        _check_patches(config, preprocessing.size)
    if config.weights is None:
        return config, None
    path, name = find_weights(_weights_of_run(config) or config.weights)
    if name is not None:
        config = replace(config, weights=Path(str(name)))
    if config.model == "auto":
        model = preset_of(load_weights(path))
        logger.info("model: %s, which fits %s", model, config.weights)
        config = _with_model(config, model)
        _check_patches(config, preprocessing.size)
    return config, weights_source(path, name)


def _weights_of_run(config: TrainConfig) -> Path | None:
    """Return the weights of the run that is resumed, at their commit, if `config` names them without a revision."""
    name = weights_name(config.weights or "")
    recipe = next((path for path in config.run.glob("t*.yaml") if path.name in RECIPES_OF_RUNS), None)
    if not config.resume or name is None or name.revision or recipe is None:
        return None
    started = yaml.safe_load(recipe.read_text())["weights"]
    return Path(started) if str(started).startswith(f"{name}@") else None


def _with_model(config: TrainerConfig, model: str) -> TrainerConfig:
    settings: dict[str, Any] = {"model": model}
    return replace(config, **settings)


def _check_patches(config: TrainConfig, size: Size) -> None:
    """Raise UsageError if the patches of the network do not fill crops of `size`; segments have a size of their own."""
    patch = PRESETS[config.model].patch
    suited = whole_patches(size, patch)
    if not config.segments and suited != size:
        raise UsageError(
            f"{listed(config.manifest)}: crops of {size} are not whole patches of {patch}x{patch} pixels, as "
            f"{config.model} needs; make them with `vitmodel etl --size {suited}`, or choose another --model"
        )


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


def make_vit_config(config: TrainingConfig, size: Size) -> ViTConfig:
    """Return the preset with the changes of the recipe, for crops of `size`."""
    return replace(
        PRESETS[config.model], image_size=size, pool=config.pool, stem=config.stem, drop_path=config.drop_path
    )


def make_network_config(
    config: TrainConfig, preprocessing: Preprocessing, trainings: Sequence[pd.DataFrame]
) -> NetworkConfig:
    """Return the configuration of the whole network: the preset with source adapters, exam fusion and segments.

    Args:
        config: Settings of the training.
        preprocessing: Preprocessing of the crops; gives the image size unless segments are used.
        trainings: The training rows of each fold. A source or view gets parameters of its own if each of them has at
            least `config.source_images` images of it.
    """
    size = Size(config.segments, config.segments) if config.segments else preprocessing.size
    names = dict.fromkeys([*config.sources, *(["view"] if config.fusion else [])])
    vocabularies = {column: build_vocabulary(column, trainings, config.source_images) for column in names}
    columns = tuple(vocabularies[column] for column in config.sources)
    views = vocabularies.get("view")
    return NetworkConfig(
        vit=make_vit_config(config, size),
        sources=SourcesConfig(columns=columns) if columns else None,
        exam=ExamConfig(views=views, asymmetry=config.asymmetry) if config.fusion and views else None,
        segments=config.segmenting,
        auxiliary=tuple(AUXILIARY_TARGETS[name] for name in config.auxiliary),
    )


def build_model(
    config: TrainConfig, network: NetworkConfig, train: pd.DataFrame
) -> tuple[Network, WeightReport | None]:
    """Return the network, initialised with `config.weights` if given, and what was done with each of their tensors.

    The table of these is printed. The head's bias starts at the share of positives that the sampler produces.

    Args:
        config: Settings of the training.
        network: Configuration of the network.
        train: The training rows.
    """
    weights = load_weights(config.weights) if config.weights is not None else None
    if weights is not None and weights.eps is not None:
        network = replace(network, vit=replace(network.vit, eps=weights.eps))
    model = Network(network)
    model.trunk.gradient_checkpointing = config.checkpointing
    prior = 0.5 if config.sampling == "balanced" else float(train[config.label].mean())
    torch.nn.init.constant_(model.trunk.head.bias, prior_bias(prior))
    if weights is not None:
        report = fit_weights(model.trunk, weights)
        trunk_tensors = model.trunk.state_dict()
        fresh = [WeightAction("fresh", name) for name in model.tensors() if name not in trunk_tensors]
        if config.lora:
            add_low_rank_updates(model.trunk, config.lora, report.tensors_by_action("fresh"))
        report = replace(report, actions=(*report.actions, *fresh))
        print(report)
        return model, report
    return model, None


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
