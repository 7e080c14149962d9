"""What a person watches while a model learns: figures, pictures and warnings, under the same names in every logger.

Knows the learner's figures and the crops' paths, but nothing of how either came to be.
"""

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

WORST_CROPS = 8  # crops of each kind of mistake to show
BOOTSTRAP_REPLICATES = 100  # of patients, for a band that a person watches; the report takes more


class TrainingProgressBar(L.Callback):
    """One bar over the whole training: images done, time left, and the last validation's figures. It also speaks to a log file."""

    def on_train_start(self, trainer: L.Trainer, learner: L.LightningModule) -> None:
        assert isinstance(learner, TrainingModule)
        total, done = learner.images_per_epoch * learner.config.epochs, learner.images_per_epoch * trainer.current_epoch
        self.bar: Any = progress(None, "train", total=total, initial=done) if trainer.is_global_zero else None

    def on_train_batch_end(
        self, trainer: L.Trainer, learner: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(learner, TrainingModule)
        if self.bar is not None:  # the other processes may have one image less
            left = learner.images_per_epoch * (trainer.current_epoch + 1) - self.bar.n
            self.bar.update(min(len(batch.indices_by_sample) * world_size(), left))

    def on_validation_end(self, trainer: L.Trainer, learner: L.LightningModule) -> None:
        if self.bar is not None:
            names = ("loss", "auroc", "macro_f1")
            known = {name: trainer.callback_metrics.get(f"val/{name}") for name in names}
            shown = {name: f"{float(value):.3f}" for name, value in known.items() if value is not None}
            self.bar.set_postfix({"epoch": f"{trainer.current_epoch + 1}/{trainer.max_epochs}"} | shown)

    def on_exception(self, trainer: L.Trainer, learner: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, learner, "fit")

    def teardown(self, trainer: L.Trainer, learner: L.LightningModule, stage: str) -> None:
        if getattr(self, "bar", None) is not None:
            self.bar.close()


class ThroughputLogger(L.Callback):
    """Images per second and memory per epoch: logged, but no part of the history, for no two runs agree."""

    def on_train_epoch_start(self, trainer: L.Trainer, learner: L.LightningModule) -> None:
        self.began, self.images = time.perf_counter(), 0

    def on_train_batch_end(
        self, trainer: L.Trainer, learner: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.images += len(batch.pack) * world_size()

    def on_train_epoch_end(self, trainer: L.Trainer, learner: L.LightningModule) -> None:
        learner.log("train/images_per_second", self.images / (time.perf_counter() - self.began), rank_zero_only=True)
        learner.log("train/memory_gb", peak_memory() / 1e9, rank_zero_only=True)


def peak_memory() -> float:
    """The most that this process has held, bytes: of the GPU where it uses one, else of the machine."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class NonFiniteStepMonitor(L.Callback):
    """Warns of each step that was skipped for its loss or gradient, keeps the images' names in a file, and stops after `most`."""

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
            write_atomic(
                self.path,
                json.dumps(
                    [{"image_ids": [Path(name).stem for name in names]} for names in learner.nonfinite_steps], indent=1
                )
                + "\n",
            )
        if count >= self.max_steps:
            raise DivergedError(
                f"{count} steps had a loss or gradient that is not finite (--nonfinite); their images are in {self.path}. "
                "Lower --lr or --clip, or use --precision fp32"
            )


class ValidationFigures(L.Callback):
    """After each validation: confusion matrix, ROC and precision-recall curves, and the worst mistakes with their crops."""

    def __init__(self, paths: Sequence[str], patients: Sequence[str]) -> None:
        """`paths` and `patients` of the validation images by row."""
        self.paths = list(paths)
        self.patients = np.asarray(patients)

    def on_validation_end(self, trainer: L.Trainer, learner: L.LightningModule) -> None:
        assert isinstance(learner, ClassificationModule)
        if not trainer.is_global_zero or "val" not in learner.epoch_predictions or not learner.loggers:
            return
        scores, labels, rows = learner.epoch_predictions["val"]
        rows = rows.astype(int)
        sample = ScoredUnits(labels, scores, self.patients[rows])
        metrics = compute_metrics(sample, 0.5, BOOTSTRAP_REPLICATES)
        log_image(
            learner, "val/confusion_matrix", figures.to_pixels(figures.confusion(metrics.confusion, threshold=0.5))
        )
        if 0 < metrics.positives < metrics.units:
            log_image(learner, "val/roc", figures.to_pixels(figures.roc(Roc.from_units(sample), metrics)))
            log_image(
                learner,
                "val/precision_recall",
                figures.to_pixels(figures.precision_recall(PrecisionRecall.from_units(sample), metrics)),
            )
        for name, label in (("false_negatives", 1), ("false_positives", 0)):
            wrong = np.flatnonzero((labels == label) & ((scores >= 0.5) != label))
            worst = wrong[np.argsort(scores[wrong] * (1 if label else -1), kind="stable")][:WORST_CROPS]
            if len(worst):
                crops = [read_crop(self.paths[rows[index]]) for index in worst]
                log_image(
                    learner, f"val/worst_{name}", contact_grid(crops, [f"score {scores[index]:.3f}" for index in worst])
                )


@rank_zero_only
def log_image(learner: L.LightningModule, name: str, picture: np.ndarray) -> None:
    """Send a picture (H W or H W 3, uint8) to every logger that takes one."""
    picture = picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=2)
    for each in learner.loggers:
        if isinstance(each, TensorBoardLogger):
            each.experiment.add_image(name, picture, learner.current_epoch, dataformats="HWC")
        elif isinstance(each, WandbLogger):
            each.log_image(name, [picture])
