"""LightningModules that combine model, loss and metrics, for classification and for masked autoencoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from scipy.special import expit
from torch import Tensor

from vitmodel.config import PretrainConfig, TrainConfig
from vitmodel.metrics.metrics import RankedUnits
from vitmodel.metrics.scored_units import ScoredUnits
from vitmodel.model import segments
from vitmodel.model.fusion import group_by_breast
from vitmodel.model.mae import MaskedAutoencoder
from vitmodel.model.network import Logits, Network
from vitmodel.model.packed_batch import PackedBatch, group_indices
from vitmodel.training.batching import Batch, gather_names, world_size
from vitmodel.training.losses import auxiliary_losses, make_loss
from vitmodel.training.optimizer import parameter_groups, warmup_cosine
from vitmodel.utils import derive_seed

EPOCH_METRICS = {
    "accuracy": "accuracy",
    "macro_f1": "macro_f1",
    "recall": "sensitivity",
    "precision": "precision",
    "auroc": "auroc",
    "pf1": "pf1",
}
History = dict[str, list[tuple[int, float]]]
StepOutputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""Logit, label, loss and row of each image or breast, `(B,)` each."""


class TrainingModule(L.LightningModule):
    """Base class of all trainings: reproducible steps, learning rate by images, and skipping of non-finite steps.

    Args:
        config: Settings of the training.
        images_per_epoch: Number of images, or exams, that are sampled in an epoch.
        history: Receives every logged metric as (epoch, value); it is kept when a run is resumed.
    """

    def __init__(self, config: Any, images_per_epoch: int, history: History) -> None:
        super().__init__()
        self.config = config
        self.images_per_epoch = images_per_epoch
        self.images_drawn = 0
        """Number of images since the start of the training."""
        self.accumulated_steps = 0
        """Number of steps whose gradients have not been applied yet."""
        self.skip_update = False
        """Whether these gradients must be discarded."""
        self.step_image_names: tuple[str, ...] = ()
        """Names of the images of the current step."""
        self.history = history
        self.nonfinite_steps: list[tuple[str, ...]] = []
        """Names of the images of each skipped step."""

    def on_train_epoch_start(self) -> None:
        self.images_drawn = self.current_epoch * self.images_per_epoch

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.step_image_names = batch.pack.names
        # The seed depends only on the step's number, so that a resumed run repeats the interrupted epoch exactly.
        rank = (self.global_rank,) if self.global_rank else ()
        torch.manual_seed(derive_seed("step", self.config.seed, self.current_epoch, batch_idx, *rank))

    def distributed_mean(self, losses: Tensor, batch: Batch) -> Tensor | None:
        """Return the loss whose gradient, averaged over the processes, is that of the mean over all their images.

        A loss that is not finite changes no weight. Lightning skips the step if None is returned, but several processes
        must complete the step together, so they discard the gradients later.

        Args:
            losses: Losses of this process, `(B,)`.
            batch: The batch that they were computed on.
        """
        losses = losses * 0 if batch.is_filler else losses
        count = 0 if batch.is_filler else len(losses)
        is_broken = not losses.isfinite().all()
        total = torch.tensor([count, is_broken], dtype=torch.float32, device=losses.device)
        if world_size() > 1:
            dist.all_reduce(total)
        self.images_drawn += int(total[0])
        if total[1]:
            self.nonfinite_steps.append(gather_names(batch.pack.names))
            if world_size() == 1:
                return None
            self.skip_update = True
        self.accumulated_steps += 1
        return losses.sum() * world_size() / total[0]

    @property
    def sharded(self) -> bool:
        """Whether each process holds only a part of the weights and of their gradients."""
        return isinstance(self.trainer.strategy, FSDPStrategy)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Rescale incomplete accumulations, log the gradient norm, and skip the step if it is not finite.

        Lightning divides each loss by `config.accumulate`. Fewer gradients are accumulated at the end of an epoch and
        after a skipped step.
        """
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        if self.accumulated_steps and self.accumulated_steps != self.config.accumulate:
            for gradient in gradients:
                gradient.mul_(self.config.accumulate / self.accumulated_steps)
        self.accumulated_steps = 0
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.sharded:
            total = norm.square()
            dist.all_reduce(total)
            norm = total.sqrt()
        self.log("train/gradient_norm", norm)
        # With fp16 the scaler skips such steps itself: they are part of its search for a scale.
        is_broken = not norm.isfinite() and self.trainer.scaler is None
        if is_broken and not self.skip_update:
            self.nonfinite_steps.append(gather_names(self.step_image_names))
        if is_broken or self.skip_update:
            optimizer.zero_grad(set_to_none=True)
        self.skip_update = False

    def log_epoch_metrics(self, metrics: Mapping[str, float]) -> None:
        """Log the metrics of an epoch to every logger and append them to the history."""
        self.log_dict(dict(metrics))  # the same in every process
        for name, value in metrics.items():
            self.history.setdefault(name, []).append((self.current_epoch, value))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["history"] = self.history

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        self.history.clear()
        self.history.update(
            {name: [tuple(point) for point in points] for name, points in checkpoint["history"].items()}
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer, with weight decay on matrices only, and the schedule (`vitmodel.training.optimizer`).

        The learning rate rises during warm-up, then falls as a cosine.
        """
        config = self.config

        def lr_fraction(_: int) -> float:
            # It depends on images, because the number of steps is not known before packs are filled.
            return warmup_cosine(self.images_drawn / (config.epochs * self.images_per_epoch), config.warmup)

        groups = parameter_groups(self, config.lr, config.weight_decay, config.layer_decay)
        optimizer: torch.optim.Optimizer
        if config.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=0.9)
        else:
            # With a loss scale, a fused step would divide by the scale only after the gradient was clipped.
            has_loss_scale = self.trainer.precision == "16-mixed"
            optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=not has_loss_scale)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_fraction)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip gradients as Lightning does, but also with a fused optimizer in bfloat16.

        Lightning refuses fused optimizers in all 16-bit precisions because of the loss scale, which only fp16 has.
        """
        if gradient_clip_val and self.sharded:
            root: Any = self.trainer.strategy.model
            root.clip_grad_norm_(gradient_clip_val)
        elif self.trainer.precision == "bf16-mixed" and gradient_clip_val:
            self.trainer.precision_plugin.clip_grad_by_norm(optimizer, gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)


class ClassificationModule(TrainingModule):
    """Training of a classifier with one logit per image and, with exam fusion, per breast and patient.

    Auxiliary heads are trained along. Metrics are computed over whole epochs at the threshold 0.5, per image or, with
    exam fusion, per breast.

    Args:
        model: The network.
        config: Settings of the training.
        images_per_epoch: Number of images, or exams, that are sampled in an epoch.
        history: Receives every logged metric as (epoch, value).
        validation_images: Number of rows of the validation table whose logits are kept; 0 = none are kept.
    """

    def __init__(
        self,
        model: Network,
        config: TrainConfig,
        images_per_epoch: int,
        history: History,
        validation_images: int = 0,
    ) -> None:
        super().__init__(config, images_per_epoch, history)
        self.model = model
        self.validation_images = validation_images
        self.validation_logits: dict[int, Tensor] = {}
        """Logits of each validation row after each epoch, `(S, N)`: with exam fusion that of its breast, NaN if
        unreadable. S is 1, or 2 with the logits of flipped images."""
        self.step_logits: list[tuple[Tensor, Tensor, Tensor]] = []
        """Flipped or not, row and logit of each image, `(B,)` each."""
        self.loss = make_loss(config.loss, config.smoothing)
        self.step_outputs: dict[str, list[StepOutputs]] = {"train": [], "val": []}
        self.epoch_predictions: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        """Scores, labels and rows of the last epoch by stage ("train", "val"), for figures."""

    @property
    def frozen(self) -> bool:
        """Whether only the head is trained in the current epoch."""
        return self.training and self.current_epoch < self.config.freeze

    def features(self, pack: PackedBatch) -> Tensor:
        """Return the pooled features `(B, D)`. A frozen backbone gets no gradient and no dropout."""
        if not self.frozen:
            return self.model.features(pack)
        with torch.no_grad():
            self.model.eval()
            features = self.model.features(pack)
            self.model.train()
        return features

    def forward(self, pack: PackedBatch) -> Tensor:
        """Return the outputs for each image of the pack, `(B, 1 + A)`.

        The first is the logit of the image or, with exam fusion, of its breast; the others are those of the auxiliary
        heads.
        """
        features = self.features(pack)
        logits = self.model.image_and_breast_logits(features, pack.metadata)[:, -1:]
        return torch.cat([logits, self.model.auxiliary_outputs(features)], dim=1)

    def training_step(self, batch: Batch, _: int) -> Tensor | None:
        pack = drop_sources(batch.pack, self.config.source_dropout)
        output = self.model.encode_segments(pack, batch.lesions) if self.model.segments and not self.frozen else None
        features = output.features if output else self.features(pack)  # (B, D)
        extra_losses = torch.zeros_like(batch.label)
        if output:
            extra_losses = extra_losses + segments.segment_losses(output, batch.label, batch.lesions)
        if self.model.auxiliary is not None:
            outputs = self.model.auxiliary(features).float()
            auxiliary = auxiliary_losses(self.model.config.auxiliary, outputs, batch.targets)  # (B, A)
            counts = (~batch.targets.isnan()).sum(dim=0).clamp(min=1)
            averages = zip(self.config.auxiliary, auxiliary.detach().sum(dim=0) / counts, strict=True)
            self.log_dict({f"train/auxiliary/{name}": value for name, value in averages})
            extra_losses = extra_losses + self.config.auxiliary_weight * auxiliary.sum(dim=1)
        logits = self.model.apply_heads(features, pack.metadata)
        return self.distributed_mean(self._losses("train", batch, logits, extra_losses), batch)

    def validation_step(self, batch: Batch, _: int, dataloader_idx: int = 0) -> None:
        """Collect the outputs for the metrics of the epoch, and the logits of all rows.

        The second loader has the flipped images, whose logits alone are collected.
        """
        features = self.features(batch.pack)
        if dataloader_idx == 0:
            logits = self.model.apply_heads(features, batch.pack.metadata)
            self._losses("val", batch, logits, torch.zeros_like(batch.label))
        if self.validation_images:
            row_logits = self.model.image_and_breast_logits(features, batch.pack.metadata)[:, -1].float()
            if not batch.is_filler:
                self.step_logits.append((torch.full_like(batch.row, dataloader_idx), batch.row, row_logits))

    def _losses(self, stage: str, batch: Batch, output: Logits, extra_losses: Tensor) -> Tensor:
        """Return one loss per sample: that of its images and, for an exam, also those of its breasts and its patient.

        Losses of images and of breasts are averaged within the sample.

        Args:
            stage: "train" or "val"; where the outputs are collected for the metrics of the epoch.
            batch: The batch.
            output: Logits of the network for the batch.
            extra_losses: Losses added to those of the images, `(B,)`.
        """
        logits = output.images[:, 0].float()  # (B,)
        labels = batch.label
        rows = batch.row
        losses = self.loss(logits, labels)
        sample_losses = group_means(losses + extra_losses, batch.indices_by_sample)
        if output.breasts is not None and output.patients is not None:
            breasts = group_by_breast(batch.pack.metadata)  # image indices of each of G breasts
            first_images = [images[0] for images in breasts]
            logits = output.breasts.float()  # (G,)
            rows = batch.row[first_images]
            labels = torch.stack([batch.label[images].nan_to_num(-1).max() for images in breasts])
            labels = labels.where(labels >= 0, torch.nan)
            losses = self.loss(logits, labels)
            exams = group_indices(batch.pack.metadata[image].exam for image in first_images)
            patient_labels = torch.stack([_patient_label(labels[exam]) for exam in exams])
            patient_losses = self.loss(output.patients.float(), patient_labels)
            sample_losses = sample_losses + group_means(losses, exams) + patient_losses
        if not batch.is_filler:
            self.step_outputs[stage].append((logits.detach(), labels, losses.detach(), rows))
        return sample_losses

    def on_train_epoch_end(self) -> None:
        self._log_epoch("train")

    def on_validation_epoch_end(self) -> None:
        self._log_epoch("val")
        if self.validation_images:
            self.validation_logits[self.current_epoch] = self._gather_validation_logits()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["validation_logits"] = self.validation_logits

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.validation_logits = dict(checkpoint.get("validation_logits", {}))  # older checkpoints lack them

    def _gather_validation_logits(self) -> Tensor:
        """Return the logits of all rows, `(S, N)`, from all processes."""
        flipped, rows, logits = gather_columns(self.step_logits, 3)
        self.step_logits.clear()
        table = np.full((1 + bool(self.config.flip_average), self.validation_images), np.nan, np.float32)
        table[flipped.astype(int), rows.astype(int)] = logits
        return torch.from_numpy(table)

    def _log_epoch(self, stage: str) -> None:
        """Log the metrics of an epoch as <stage>/<metric>."""
        logits, labels, losses, rows = gather_columns(self.step_outputs[stage], 4)
        self.step_outputs[stage].clear()
        is_finite = np.isfinite(logits) & np.isfinite(labels)
        logits, labels, losses, rows = (column[is_finite] for column in (logits, labels, losses, rows))
        if not len(logits):
            return
        scores = expit(logits)
        self.epoch_predictions[stage] = (scores, labels, rows)
        ranking = RankedUnits(ScoredUnits(labels, scores, np.arange(len(labels))), threshold=0.5)
        values = ranking.metric_values()
        metrics: dict[str, Any] = {"loss": float(losses.mean())}
        metrics |= {name: values[metric] for name, metric in EPOCH_METRICS.items()}
        metrics |= asdict(ranking.confusion())
        metrics = {f"{stage}/{name}": float(value) for name, value in metrics.items()}
        if stage == "train":
            metrics["learning_rate"] = self.trainer.optimizers[0].param_groups[-1]["lr"]
        self.log_epoch_metrics(metrics)


def gather_columns(steps: Sequence[tuple[Tensor, ...]], columns: int) -> list[np.ndarray]:
    """Return the joined columns of all steps, from all processes, in the order of the processes."""
    own = [torch.cat(column).cpu().numpy() for column in zip(*steps, strict=True)] or [np.empty(0)] * columns
    if world_size() == 1:
        return own
    columns_by_rank: list[Any] = [None] * world_size()
    dist.all_gather_object(columns_by_rank, own)
    return [np.concatenate(parts) for parts in zip(*columns_by_rank, strict=True)]


def _patient_label(breast_labels: Tensor) -> Tensor:
    """Return 1 if a breast of the patient is positive, NaN if one is unknown and none positive, else 0."""
    if (breast_labels != 1).all():
        return breast_labels.max()
    return breast_labels.new_ones(())


def group_means(values: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """Return the mean of each group of indices into `values` `(B,)`, one value per group."""
    return torch.stack([values[list(indices)].mean() for indices in groups])


def drop_sources(pack: PackedBatch, share: float) -> PackedBatch:
    """Return the pack with each source of each image set to unknown (0) with probability `share`."""
    is_hidden = (torch.rand(len(pack), len(pack.metadata[0].sources)) < share).tolist()
    metadata = []
    for image, flags in zip(pack.metadata, is_hidden, strict=True):
        sources = tuple(0 if hidden else value for value, hidden in zip(image.sources, flags, strict=True))
        metadata.append(replace(image, sources=sources))
    return replace(pack, metadata=tuple(metadata))


class MaePretrainer(TrainingModule):
    """Pretraining by masked autoencoding: the mean squared error of the masked patches' reconstruction.

    Args:
        model: The masked autoencoder.
        config: Settings of the training.
        images_per_epoch: Number of images that are sampled in an epoch.
        history: Receives every logged metric as (epoch, value).
    """

    def __init__(
        self, model: MaskedAutoencoder, config: PretrainConfig, images_per_epoch: int, history: History
    ) -> None:
        super().__init__(config, images_per_epoch, history)
        self.model = model
        self.errors: list[Tensor] = []

    def training_step(self, batch: Batch, _: int) -> Tensor | None:
        losses = self.model(batch.pack)  # (B,)
        self.errors.append(losses.detach()[: 0 if batch.is_filler else None])
        return self.distributed_mean(losses, batch)

    def on_train_epoch_end(self) -> None:
        errors = torch.cat(self.errors)
        self.errors.clear()
        total = torch.stack([errors.nansum(), errors.isfinite().sum()])
        if world_size() > 1:
            dist.all_reduce(total)
        self.log_epoch_metrics(
            {
                "train/loss": float(total[0] / total[1]),
                "learning_rate": self.trainer.optimizers[0].param_groups[-1]["lr"],
            }
        )
