"""The command `pretrain`: make weights that a training can start from, without labels of patients.

The task is masked autoencoding of unlabelled crops, or finding cancers in phantoms that are made on the fly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from vitmodel.config import Preprocessing, PretrainConfig, TrainConfig, TrainingConfig, listed, to_yaml
from vitmodel.config.labels import CANCER
from vitmodel.data.dataset import CropDataset
from vitmodel.data.fingerprint import Fingerprint, fingerprint
from vitmodel.data.samplers import EpochSampler, SequentialSampler
from vitmodel.errors import UsageError
from vitmodel.jobs.journal import lock_folder
from vitmodel.model.architecture import NetworkConfig
from vitmodel.model.mae import MaskedAutoencoder
from vitmodel.model.network import Network
from vitmodel.model.package import save_package
from vitmodel.phantoms.dataset import PhantomDataset
from vitmodel.training.batching import BatchLoader
from vitmodel.training.crops import read_cropped_manifest
from vitmodel.training.initial_network import make_vit_config
from vitmodel.training.module import ClassificationModule, History, MaePretrainer, TrainingModule
from vitmodel.training.trainer import (
    LAST_CHECKPOINT,
    STARTED,
    build_trainer,
    fit,
    is_rank_zero,
    next_epoch,
    start_or_resume,
    system_info,
)
from vitmodel.utils import NOT_A_MEDICAL_DEVICE

HELD_OUT = 0.1
"""Number of validation phantoms as a fraction of the training phantoms."""


@dataclass(frozen=True)
class PretrainTask:
    """What is trained, on what, and on what it is validated."""

    module: TrainingModule
    train: BatchLoader
    val: BatchLoader | None = None
    """Batches to validate on; None = no validation."""


def pretrain(config: PretrainConfig) -> None:
    """Pretrain a network and write RUN/package with the weights of the last epoch.

    Raises:
        UsageError: The manifest has no usable crop, or RUN holds another run.
    """
    frame = training_crops(config.manifest) if config.manifest else None
    preprocessing = most_common_preprocessing(frame) if frame is not None else Preprocessing(size=config.size)
    data = fingerprint(frame.assign(split="pretrain"), CANCER) if frame is not None else None
    with lock_folder(config.run, STARTED) if is_rank_zero() else contextlib.nullcontext():
        checkpoint = start_or_resume("pretrain", config, config.run, data["sha256"] if data else "")
        L.seed_everything(config.seed, verbose=False)
        network = NetworkConfig(vit=make_vit_config(config, preprocessing.size))

        def make_task(model: Network) -> PretrainTask:
            if frame is None:
                return phantom_task(config, model, checkpoint)
            return mae_task(config, model, frame, checkpoint)

        task = make_task(Network(network))
        last = ModelCheckpoint(config.run / LAST_CHECKPOINT.parent, LAST_CHECKPOINT.stem, enable_version_counter=False)
        trainer = build_trainer(config, config.run, [last])
        fit(trainer, task.module, task.train, task.val, checkpoint)
        if trainer.is_global_zero:
            model = Network(network)  # a new one, because each process may hold only a shard of the trained one
            state = torch.load(config.run / LAST_CHECKPOINT, weights_only=True)["state_dict"]
            make_task(model).module.load_state_dict(state)
            write_package(config, model, task.module.history, data, preprocessing)


def training_crops(manifests: Sequence[Path]) -> pd.DataFrame:
    """Return the usable crops of the manifests; if these have splits, only those of `train`.

    Held-out images are not used for pretraining either, although it needs no labels.

    Raises:
        UsageError: There is no such crop.
    """
    frame = read_cropped_manifest(manifests)
    if frame["split"].notna().any():
        frame = frame[frame["split"] == "train"]
    if frame.empty:
        raise UsageError(
            f"{listed(manifests)}: no row is usable (if there are splits: no row of the split train); "
            "make the manifest with `vitmodel etl`"
        )
    return frame.reset_index(drop=True)


def most_common_preprocessing(frame: pd.DataFrame) -> Preprocessing:
    """Return the preprocessing of most crops. Only its size matters here, and the model accepts any size."""
    return Preprocessing.from_json(frame["preprocessing"].mode()[0])


def mae_task(config: PretrainConfig, model: Network, frame: pd.DataFrame, checkpoint: Path | None) -> PretrainTask:
    """Return the task of masked autoencoding of crops."""
    images = CropDataset(frame["path"].tolist(), [float("nan")] * len(frame), config.augment)
    order = EpochSampler(images.labels.tolist(), config.seed, "natural", epoch=next_epoch(checkpoint))
    module = MaePretrainer(MaskedAutoencoder(model.trunk, config.ratio), config, len(images), history={})
    return PretrainTask(module, BatchLoader(images, order, config))


def phantom_task(config: PretrainConfig, model: Network, checkpoint: Path | None) -> PretrainTask:
    """Return the task of finding cancers in phantoms, each of which is drawn only once."""
    images = PhantomDataset(config.phantoms, config.size, config.difficulty, config.augment)
    val_images = PhantomDataset(max(2, round(HELD_OUT * config.phantoms)), config.size, config.difficulty, None)
    order = EpochSampler(images.labels.tolist(), config.seed, "natural", epoch=next_epoch(checkpoint))
    shared = {field.name: getattr(config, field.name) for field in fields(TrainingConfig)}
    recipe = TrainConfig(manifest=(config.run,), run=config.run, **shared)
    module = ClassificationModule(model, recipe, len(images), history={})
    val = BatchLoader(val_images, SequentialSampler(len(val_images)), config)
    return PretrainTask(module, BatchLoader(images, order, config), val)


def write_package(
    config: PretrainConfig, model: Network, history: History, data: Fingerprint | None, preprocessing: Preprocessing
) -> None:
    """Write a package without calibration and threshold: a training can start from it, but it gives no scores."""
    recipe = to_yaml("pretrain", config, config.run / "pretrain.yaml")
    contents: dict[str, Any] = {
        "preprocessing": preprocessing.to_json(),
        "packed": config.packed,
        "history": history,
        "training": recipe,
        "versions": system_info()["versions"],
    }
    if data is not None:
        contents["data"] = data
    task = "masked autoencoding of unlabelled crops" if data is not None else "finding cancers in phantoms"
    metrics = [name for name in ("train/loss", "val/auroc") if name in history]
    summary = ", ".join(f"{name} {history[name][-1][1]:.4f}" for name in metrics)
    card = f"""# {config.model}: weights to start from

**{NOT_A_MEDICAL_DEVICE}**

Pretrained by {task} ({summary}). This package gives no scores: use it with `vitmodel train MANIFEST RUN --weights`.

```yaml
{recipe}```
"""
    save_package(config.run / "package", model, contents, card)
    print(f"{summary}\npackage: {config.run / 'package'}")
