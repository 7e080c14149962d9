"""Callbacks that report on a running training: progress, metrics, figures and warnings, named alike in every logger."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from vitmodel.data.dataset import read_crop
from vitmodel.errors import DivergedError
from vitmodel.metrics.curve_data import PrecisionRecall, Roc
from vitmodel.metrics.metrics import compute_metrics
from vitmodel.metrics.scored_units import ScoredUnits
from vitmodel.reports import figures
from vitmodel.reports.panel import contact_grid
from vitmodel.training.batching import Batch, world_size
from vitmodel.training.module import ClassificationModule, TrainingModule
from vitmodel.utils import progress, write_atomic

logger = logging.getLogger(__name__)

WORST_CROPS = 8  # number of crops shown for each kind of mistake
BOOTSTRAP_REPLICATES = 100  # resamples of patients; enough for a band in a live figure, reports use more


class TrainingProgressBar(L.Callback):
    """One progress bar over the whole training: images done, time left and the last validation metrics.

    It also works when the output goes to a log file.
    """

    def on_train_start(self, trainer: L.Trainer, learner: L.LightningModule) -> None:
        assert isinstance(learner, TrainingModule)
        total = learner.images_per_epoch * learner.config.epochs
        done = learner.images_per_epoch * trainer.current_epoch
        self.bar: Any = progress(None, "train", total=total, initial=done) if trainer.is_global_zero else None

    def on_train_batch_end(
        self, trainer: L.Trainer, learner: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(learner, TrainingModule)
        if self.bar is not None:  # the estimate is capped, because other processes may have one image less
            left = learner.images_per_epoch * (trainer.current_epoch + 1) - self.bar.n
            self.bar.update(min(len(batch.indices_by_sample) * world_size(), left))

    def on_validation_end(self, trainer: L.Trainer, learner: L.LightningModule) -> None:
        if self.bar is not None:
            names = ("loss", "auroc", "macro_f1")
            metrics = {name: trainer.callback_metrics.get(f"val/{name}") for name in names}
            texts = {name: f"{float(value):.3f}" for name, value in metrics.items() if value is not None}
            self.bar.set_postfix({"epoch": f"{trainer.current_epoch + 1}/{trainer.max_epochs}"} | texts)

    def on_exception(self, trainer: L.Trainer, learner: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, learner, "fit")

    def teardown(self, trainer: L.Trainer, learner: L.LightningModule, stage: str) -> None:
        if getattr(self, "bar", None) is not None:
            self.bar.close()


class ThroughputLogger(L.Callback):
    """Log images per second and peak memory of each epoch.

    They are not stored in the history, because they differ between identical runs.
    """

    def on_train_epoch_start(self, trainer: L.Trainer, learner: L.LightningModule) -> None:
        self.start_time = time.perf_counter()
        self.images = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, learner: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.images += len(batch.pack) * world_size()

    def on_train_epoch_end(self, trainer: L.Trainer, learner: L.LightningModule) -> None:
        seconds = time.perf_counter() - self.start_time
        learner.log("train/images_per_second", self.images / seconds, rank_zero_only=True)
        learner.log("train/memory_gb", peak_memory() / 1e9, rank_zero_only=True)


def peak_memory() -> float:
    """Return this process's peak memory in bytes: GPU memory if it uses a GPU, else main memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class NonFiniteStepMonitor(L.Callback):
    """Warn of each step that was skipped because its loss or gradient is not finite, and stop after too many.

    Args:
        path: JSON file that receives the image ids of the skipped steps.
        max_steps: Number of skipped steps at which the training stops.

    Raises:
        DivergedError: `max_steps` steps were skipped.
    """

    def __init__(self, path: Path, max_steps: int) -> None:
        self.path = path
        self.max_steps = max_steps

    def on_train_batch_end(
        self, trainer: L.Trainer, learner: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(learner, TrainingModule)
        count = len(learner.nonfinite_steps)
        if count == getattr(self, "warned", 0):
            return
        self.warned = count
        if trainer.is_global_zero:
            logger.warning(
                "step %d: loss or gradient is not finite; skipped (%d of at most %d)",
                trainer.global_step,
                count,
                self.max_steps,
            )
            steps = [{"image_ids": [Path(name).stem for name in names]} for names in learner.nonfinite_steps]
            write_atomic(self.path, json.dumps(steps, indent=1) + "\n")
        if count >= self.max_steps:
            raise DivergedError(
                f"training stopped: {count} steps had a loss or gradient that is not finite (--nonfinite); "
                f"{self.path} lists their images: lower --lr or --clip, or use --precision fp32"
            )


class ValidationFigures(L.Callback):
    """Log the confusion matrix, ROC and precision-recall curves, and the worst errors with their crops.

    The figures are drawn after each validation.

    Args:
        paths: Path of each validation image, by row.
        patients: Patient id of each validation image, by row.
    """

    def __init__(self, paths: Sequence[str], patients: Sequence[str]) -> None:
        self.paths = list(paths)
        self.patients = np.asarray(patients)

    def on_validation_end(self, trainer: L.Trainer, learner: L.LightningModule) -> None:
        assert isinstance(learner, ClassificationModule)
        if not trainer.is_global_zero or "val" not in learner.epoch_predictions or not learner.loggers:
            return
        scores, labels, rows = learner.epoch_predictions["val"]
        rows = rows.astype(int)
        units = ScoredUnits(labels, scores, self.patients[rows])
        metrics = compute_metrics(units, 0.5, BOOTSTRAP_REPLICATES)
        confusion = figures.confusion(metrics.confusion, threshold=0.5)
        log_image(learner, "val/confusion_matrix", figures.to_pixels(confusion))
        if 0 < metrics.positives < metrics.units:
            roc = figures.roc(Roc.from_units(units), metrics)
            log_image(learner, "val/roc", figures.to_pixels(roc))
            precision_recall = figures.precision_recall(PrecisionRecall.from_units(units), metrics)
            log_image(learner, "val/precision_recall", figures.to_pixels(precision_recall))
        for name, label in (("false_negatives", 1), ("false_positives", 0)):
            wrong = np.flatnonzero((labels == label) & ((scores >= 0.5) != label))
            worst = wrong[np.argsort(scores[wrong] * (1 if label else -1), kind="stable")][:WORST_CROPS]
            if len(worst):
                crops = [read_crop(self.paths[rows[index]]) for index in worst]
                captions = [f"score {scores[index]:.3f}" for index in worst]
                log_image(learner, f"val/worst_{name}", contact_grid(crops, captions))


@rank_zero_only
def log_image(learner: L.LightningModule, name: str, picture: np.ndarray) -> None:
    """Send an image to every logger that accepts images.

    Args:
        learner: The module whose loggers are used.
        name: Name of the image in the loggers.
        picture: Grey `(H, W)` or colour `(H, W, 3)`, uint8.
    """
    picture = picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=2)
    for image_logger in learner.loggers:
        if isinstance(image_logger, TensorBoardLogger):
            image_logger.experiment.add_image(name, picture, learner.current_epoch, dataformats="HWC")
        elif isinstance(image_logger, WandbLogger):
            image_logger.log_image(name, [picture])
