"""Stage: unlabelled crops, or phantoms made on the fly -> a package that training can start from. Knows no label of a patient."""

import contextlib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from vitmodel.config import Preprocessing, PretrainConfig, TrainConfig, TrainingConfig, listed, to_yaml
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
from vitmodel.training.fit import LABEL, make_vit_config, read_cropped_manifest
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

HELD_OUT = 0.1  # phantoms per epoch to watch the model on, as a share of those it learns from


def pretrain(config: PretrainConfig) -> None:
    """Write RUN/package with the weights of the last epoch. Raises UsageError where the manifest has nothing to learn from."""
    frame = training_crops(config.manifest) if config.manifest else None
    preprocessing = most_common_preprocessing(frame) if frame is not None else Preprocessing(size=config.size)
    data = fingerprint(frame.assign(split="pretrain"), LABEL) if frame is not None else None
    with lock_folder(config.run, STARTED) if is_rank_zero() else contextlib.nullcontext():
        checkpoint = start_or_resume("pretrain", config, config.run, data["sha256"] if data else "")
        L.seed_everything(config.seed, verbose=False)
        network = NetworkConfig(vit=make_vit_config(config, preprocessing.size))

        def task(model: Network) -> PretrainTask:
            return (
                phantom_task(config, model, checkpoint) if frame is None else mae_task(config, model, frame, checkpoint)
            )

        learner, train, val = task(Network(network))
        last = ModelCheckpoint(config.run / LAST_CHECKPOINT.parent, LAST_CHECKPOINT.stem, enable_version_counter=False)
        trainer = build_trainer(config, config.run, [last])
        fit(trainer, learner, train, val, checkpoint)
        if trainer.is_global_zero:
            whole = task(model := Network(network))[0]  # afresh: shards are no model
            whole.load_state_dict(torch.load(config.run / LAST_CHECKPOINT, weights_only=True)["state_dict"])
            write_package(config, model, learner.history, data, preprocessing)


def training_crops(manifests: Sequence[Path]) -> pd.DataFrame:
    """The manifest's usable crops; where it has splits, those of `train` alone: what is held out is not looked at, label or no label."""
    frame = read_cropped_manifest(manifests)
    if frame["split"].notna().any():
        frame = frame[frame["split"] == "train"]
    if frame.empty:
        raise UsageError(f"{listed(manifests)}: no row is usable (where there are splits: of the split train)")
    return frame.reset_index(drop=True)


def most_common_preprocessing(frame: pd.DataFrame) -> Preprocessing:
    """The preprocessing of most crops: nothing but the size matters here, and the model takes any."""
    return Preprocessing.from_json(frame["preprocessing"].mode()[0])


PretrainTask = tuple[
    TrainingModule, BatchLoader, BatchLoader | None
]  # what learns, what from, and what it is watched on


def mae_task(config: PretrainConfig, model: Network, frame: pd.DataFrame, checkpoint: Path | None) -> PretrainTask:
    """Masked autoencoding of crops."""
    images = CropDataset(frame["path"].tolist(), [float("nan")] * len(frame), config.augment)
    order = EpochSampler(images.labels.tolist(), config.seed, "natural", epoch=next_epoch(checkpoint))
    return (
        MaePretrainer(MaskedAutoencoder(model.trunk, config.ratio), config, len(images), history={}),
        BatchLoader(images, order, config),
        None,
    )


def phantom_task(config: PretrainConfig, model: Network, checkpoint: Path | None) -> PretrainTask:
    """Cancers in phantoms, no two of them alike."""
    images = PhantomDataset(config.phantoms, config.size, config.difficulty, config.augment)
    watched = PhantomDataset(max(2, round(HELD_OUT * config.phantoms)), config.size, config.difficulty, None)
    order = EpochSampler(images.labels.tolist(), config.seed, "natural", epoch=next_epoch(checkpoint))
    shared = {field.name: getattr(config, field.name) for field in fields(TrainingConfig)}
    learner = ClassificationModule(
        model, TrainConfig(manifest=(config.run,), run=config.run, **shared), len(images), history={}
    )
    return learner, BatchLoader(images, order, config), BatchLoader(watched, SequentialSampler(len(watched)), config)


def write_package(
    config: PretrainConfig, model: Network, history: History, data: Fingerprint | None, made: Preprocessing
) -> None:
    """A package without calibration or threshold: training may start from it, but it gives no score."""
    recipe = to_yaml("pretrain", config, config.run / "pretrain.yaml")
    contents: dict[str, Any] = {
        "preprocessing": made.to_json(),
        "packed": config.packed,
        "history": history,
        "training": recipe,
        "versions": system_info()["versions"],
    }
    if data is not None:
        contents["data"] = data
    task = "masked autoencoding of unlabelled crops" if data is not None else "finding cancers in phantoms"
    watched = [name for name in ("train/loss", "val/auroc") if name in history]
    figures = ", ".join(f"{name} {history[name][-1][1]:.4f}" for name in watched)
    card = f"""# {config.model}: weights to start from

**{NOT_A_MEDICAL_DEVICE}**

Pretrained by {task} ({figures}). It gives no score: use it with `vitmodel train MANIFEST RUN --weights`.

```yaml
{recipe}```
"""
    save_package(config.run / "package", model, contents, card)
    print(f"{figures}\npackage: {config.run / 'package'}")
