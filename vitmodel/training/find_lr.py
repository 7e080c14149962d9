"""Search for a learning rate: train for some steps while the rate rises, and see where the loss is smallest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import lightning as L
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler

from vitmodel.config import TrainConfig
from vitmodel.data.exams import image_metadata
from vitmodel.data.samplers import EpochSampler
from vitmodel.errors import VitmodelError
from vitmodel.model.architecture import NetworkConfig
from vitmodel.model.device import resolve_device
from vitmodel.reports import figures
from vitmodel.training.batching import Batch, BatchLoader
from vitmodel.training.fit import make_dataset
from vitmodel.training.initial_network import build_model
from vitmodel.training.module import ClassificationModule
from vitmodel.training.trainer import fit, resolve_precision
from vitmodel.utils import atomic_path, progress, write_atomic

STEPS = 100
LOWEST, HIGHEST = 1e-3, 1e2
"""First and last rate of the sweep, as multiples of `lr`."""
SMOOTHING = 0.9
"""Decay per step of the moving average of the losses."""
DIVERGED = 3.0
"""Multiple of the smallest smoothed loss at which the sweep ends."""
FIRST_STEPS = 20
"""Number of steps, with rates too small to learn, that show the loss before the sweep."""
LEAST_FALL = 1.5
"""Standard deviations of these losses by which the moving average must fall below their mean for a suggestion. Its own
is 0.23 of one, and the mean's 0.22, so chance reaches this rarely."""


def rate_factor(step: int) -> float:
    """Return the learning rate at a step of the sweep as a multiple of `lr`; it rises exponentially."""
    return LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1))


@dataclass(frozen=True, eq=False)
class LearningRateSweep:
    """The losses of a sweep of the learning rate (Smith 2017, arXiv 1506.01186)."""

    rates: np.ndarray
    """Learning rate of each step `(S,)`."""
    losses: np.ndarray
    """Loss of each step `(S,)`, before the step."""

    @property
    def smoothed(self) -> np.ndarray:
        """Exponential moving average of the losses, corrected for its start at zero, `(S,)`."""
        average = 0.0
        result = []
        for step, loss in enumerate(self.losses):
            average = SMOOTHING * average + (1 - SMOOTHING) * float(loss)
            result.append(average / (1 - SMOOTHING ** (step + 1)))
        return np.array(result)

    @property
    def suggestion(self) -> float | None:
        """A tenth of the rate with the smallest smoothed loss; None if the loss never fell noticeably."""
        if not len(self.losses):
            return None
        smoothed = self.smoothed
        best = int(smoothed.argmin())
        first = self.losses[:FIRST_STEPS]
        has_learned = smoothed[best] < first.mean() - LEAST_FALL * first.std()
        return float(self.rates[best]) / 10 if has_learned else None


class SweepRecorder(L.Callback):
    """Record rate and loss of each step, and end the training after the sweep or once the loss has diverged."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.bar: Any = progress(None, "find-lr", total=STEPS, unit="step")

    def on_train_batch_start(
        self, trainer: L.Trainer, learner: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self.rate = trainer.optimizers[0].param_groups[-1]["lr"]  # after the step it is that of the next one

    def on_train_batch_end(
        self, trainer: L.Trainer, learner: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        loss = float(outputs["loss"]) if outputs else math.nan
        if math.isfinite(loss):
            self.rates.append(self.rate)
            self.losses.append(loss)
            self.bar.update()
        smallest = LearningRateSweep(np.array(self.rates), np.array(self.losses)).smoothed.min(initial=math.inf)
        if not loss <= DIVERGED * smallest or len(self.losses) >= STEPS:
            trainer.should_stop = True

    def teardown(self, trainer: L.Trainer, learner: L.LightningModule, stage: str) -> None:
        self.bar.close()


class SweepModule(ClassificationModule):
    """A classifier whose learning rate follows `rate_factor`, with the ratios between layers of a usual training."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        setup: Any = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(setup["optimizer"], rate_factor)
        return {"optimizer": setup["optimizer"], "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def sweep_learning_rate(config: TrainConfig, train: pd.DataFrame, network: NetworkConfig) -> LearningRateSweep:
    """Return the losses of a sweep of the learning rate on the training rows.

    Args:
        config: Settings of the training; the sweep is relative to its `lr`.
        train: The training rows of the manifest.
        network: Configuration of the network.
    """
    L.seed_everything(config.seed, verbose=False)
    images = make_dataset(train, config, augment=True)
    learner = SweepModule(build_model(config, network, train)[0], config, images_per_epoch=len(images), history={})
    sampler = EpochSampler(images.labels.tolist(), config.seed, config.sampling, config.batch_size)
    batches = BatchLoader(images, sampler, config, image_metadata(train, network))
    recorder = SweepRecorder()
    trainer = L.Trainer(
        accelerator=resolve_device(config.device),
        devices=1,
        precision=resolve_precision(config),
        max_epochs=-1,
        logger=False,
        callbacks=[recorder],
        gradient_clip_val=config.clip or None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    fit(trainer, learner, batches, None, None)
    return LearningRateSweep(np.array(recorder.rates), np.array(recorder.losses))


def write_sweep(sweep: LearningRateSweep, run: Path) -> None:
    """Write RUN/find_lr.csv and RUN/find_lr.png.

    Raises:
        VitmodelError: No step had a finite loss.
    """
    if not len(sweep.losses):
        raise VitmodelError(
            "find-lr: the loss of the first step is not finite; check the crops, or use --precision fp32"
        )
    with atomic_path(run / "find_lr.csv") as temporary:
        columns = {"lr": sweep.rates, "loss": sweep.losses, "smoothed": sweep.smoothed}
        pd.DataFrame(columns).to_csv(temporary, index=False)
    picture = figures.to_pixels(figures.learning_rates(sweep.rates, sweep.losses, sweep.smoothed, sweep.suggestion))
    write_atomic(run / "find_lr.png", cv2.imencode(".png", picture[..., ::-1])[1].tobytes())
