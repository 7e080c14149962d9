"""The LightningModule that joins model, loss and metrics. Knows no file, no table and no split."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from matplotlib.figure import Figure
from scipy.special import expit
from torch import Tensor

from vitmodel.config import TrainConfig
from vitmodel.measure.figures import confusion, to_pixels
from vitmodel.measure.metrics import Ranking
from vitmodel.measure.sample import Sample
from vitmodel.model import packing
from vitmodel.model.packing import Pack
from vitmodel.model.vit import ViT
from vitmodel.utils import atomic_path, progress, seed_from

WATCHED = {
    "accuracy": "accuracy",
    "macro_f1": "macro_f1",
    "recall": "sensitivity",
    "precision": "precision",
    "auroc": "auroc",
    "pf1": "pf1",
}


class Batch(NamedTuple):
    """What one step sees."""

    pack: Pack
    label: Tensor  # B, 0 or 1
    row: Tensor  # B, the images' places in their table, for a pack has an order of its own


class Learner(L.LightningModule):
    """Binary cross entropy on one logit per image; metrics over whole epochs at the threshold 0.5."""

    def __init__(self, model: ViT, config: TrainConfig, images: int, history: dict[str, list[tuple[int, float]]]) -> None:
        """`images` are drawn in an epoch; `history` receives every logged figure as (epoch, value) and survives a resumption."""
        super().__init__()
        self.model = model
        self.config = config
        self.images = images
        self.drawn = 0  # since the start of the training
        self.history = history
        self.seen: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {"train": [], "val": []}

    def forward(self, pack: Pack) -> Tensor:
        """Logits of a pack's B images: B."""
        return packing.forward(self.model, pack).squeeze(-1)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: Batch, _: int) -> None:
        self._step(batch, "val")

    def _step(self, batch: Batch, stage: str) -> Tensor:
        logits = self(batch.pack).float()  # B
        losses = F.binary_cross_entropy_with_logits(logits, batch.label, reduction="none")
        self.seen[stage].append((logits.detach(), batch.label, losses.detach()))
        return losses.mean()

    def on_train_epoch_start(self) -> None:
        self.drawn = self.current_epoch * self.images

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.drawn += len(batch.pack)
        # A step's randomness depends on its number alone, so that a resumed run repeats what was interrupted.
        torch.manual_seed(seed_from("step", self.config.seed, self.global_step))

    def on_train_epoch_end(self) -> None:
        self._report("train")

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def _report(self, stage: str) -> None:
        """Log an epoch's figures under the same names everywhere: <stage>/<figure>."""
        logits, labels, losses = (torch.cat(column).cpu().numpy() for column in zip(*self.seen[stage], strict=True))
        self.seen[stage].clear()
        ranking = Ranking(Sample(labels, expit(logits), np.arange(len(labels))), threshold=0.5)
        weights = np.ones(len(labels))
        values, counts = ranking.values(weights), ranking.confusion(ranking.curve(weights))
        figures = {"loss": float(losses.mean())} | {name: values[metric] for name, metric in WATCHED.items()} | asdict(counts)
        figures = {f"{stage}/{name}": float(value) for name, value in figures.items()}
        if stage == "train":
            figures["learning_rate"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log_dict(figures)
        if stage == "val":
            self._show("val/confusion_matrix", confusion(counts, threshold=0.5))
        for name, value in figures.items():
            self.history.setdefault(name, []).append((self.current_epoch, value))

    def _show(self, name: str, figure: Figure) -> None:
        """Send a picture to every logger that takes one."""
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name, to_pixels(figure), self.current_epoch, dataformats="HWC")
            elif isinstance(logger, WandbLogger):
                logger.log_image(name, [to_pixels(figure)])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["history"] = self.history

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        self.history.clear()
        self.history.update({name: [tuple(point) for point in points] for name, points in checkpoint["history"].items()})

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, decay on matrices only; the rate rises from 1 % over the first images, then falls as a cosine back to it."""
        config = self.config

        def rate(_: int) -> float:  # by images, for the number of steps is not known before packs are filled
            done = self.drawn / (config.epochs * self.images)
            if done < config.warmup:
                return max(0.01, done / config.warmup)
            return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (done - config.warmup) / (1 - config.warmup)))

        decays: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, parameter in self.named_parameters():
            decays[name.endswith(".weight") and parameter.ndim > 1].append(parameter)
        groups = [{"params": decays[True], "weight_decay": config.weight_decay}, {"params": decays[False], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints that replace the previous one only when they are whole, and that never unpickle code when read."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        with atomic_path(path) as temporary:
            torch.save(checkpoint, temporary)


class Progress(L.Callback):
    """One bar over the whole training: images done, time left, and the last validation's figures. It also speaks to a log file."""

    def on_train_start(self, trainer: L.Trainer, learner: L.LightningModule) -> None:
        assert isinstance(learner, Learner)
        initial = learner.images * trainer.current_epoch
        self.bar: Any = progress(None, "train", total=learner.images * learner.config.epochs, initial=initial)

    def on_train_batch_end(self, trainer: L.Trainer, learner: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.bar.update(len(batch.pack))

    def on_validation_end(self, trainer: L.Trainer, learner: L.LightningModule) -> None:
        shown = {name: f"{float(trainer.callback_metrics[f'val/{name}']):.3f}" for name in ("loss", "auroc", "macro_f1")}
        self.bar.set_postfix({"epoch": f"{trainer.current_epoch + 1}/{trainer.max_epochs}"} | shown)

    def teardown(self, trainer: L.Trainer, learner: L.LightningModule, stage: str) -> None:
        self.bar.close()
