"""The LightningModule that joins model, loss and metrics. Knows no file, no table and no split."""

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
from vitmodel.training.losses import AuxiliaryHeads, make_loss
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
StepOutputs = tuple[Tensor, Tensor, Tensor, Tensor]  # logit, label, loss, row of each image or breast: B, B, B, B


class TrainingModule(L.LightningModule):
    """What every training shares: randomness by step, the learning rate by images drawn, steps that are not finite skipped."""

    def __init__(self, config: Any, images_per_epoch: int, history: History) -> None:
        """`images`, or exams, are drawn in an epoch; `history` receives every logged figure as (epoch, value) and survives a resumption."""
        super().__init__()
        self.config = config
        self.images_per_epoch = images_per_epoch
        self.images_drawn = 0  # since the start of the training
        self.accumulated_steps = 0  # steps whose gradients wait for the weights to change
        self.skip_update = False  # whether they must not
        self.step_image_names: tuple[str, ...] = ()  # the images of the step at hand
        self.history = history
        self.nonfinite_steps: list[tuple[str, ...]] = []
        """The images' names of each step that was skipped."""

    def on_train_epoch_start(self) -> None:
        self.images_drawn = self.current_epoch * self.images_per_epoch

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.step_image_names = batch.pack.names
        # A step's randomness depends on its number alone, so that a resumed run repeats what was interrupted.
        rank = (self.global_rank,) if self.global_rank else ()
        torch.manual_seed(derive_seed("step", self.config.seed, self.current_epoch, batch_idx, *rank))

    def distributed_mean(self, losses: Tensor, batch: Batch) -> Tensor | None:
        """The loss whose gradient, averaged over the processes, is that of the mean over all their images.

        One that is not finite changes no weight: Lightning skips the step for None, but several processes must go through it together.
        """
        losses = losses * 0 if batch.is_filler else losses
        counted, broken = 0 if batch.is_filler else len(losses), not losses.isfinite().all()
        total = torch.tensor([counted, broken], dtype=torch.float32, device=losses.device)
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
        """Whether each process has but a part of the weights and of their gradient."""
        return isinstance(self.trainer.strategy, FSDPStrategy)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Weigh a short window as a whole one, log the gradient's norm, and skip the step where it is not finite.

        Lightning divides by ACCUMULATE; the last steps of an epoch may be fewer, and so may those that are left when one was skipped.
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
        broken = (
            not norm.isfinite() and self.trainer.scaler is None
        )  # with fp16 the scaler skips such steps, which belong to its search
        if broken and not self.skip_update:
            self.nonfinite_steps.append(gather_names(self.step_image_names))
        if broken or self.skip_update:
            optimizer.zero_grad(set_to_none=True)
        self.skip_update = False

    def log_epoch_metrics(self, figures: Mapping[str, float]) -> None:
        """Log an epoch's figures to every logger, and keep them."""
        self.log_dict(dict(figures))  # the same in every process
        for name, value in figures.items():
            self.history.setdefault(name, []).append((self.current_epoch, value))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["history"] = self.history

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        self.history.clear()
        self.history.update(
            {name: [tuple(point) for point in points] for name, points in checkpoint["history"].items()}
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Decay on matrices only; the rate rises over the first images, then falls as a cosine (`model.optimisation`)."""
        config = self.config

        def rate(_: int) -> float:  # by images, for the number of steps is not known before packs are filled
            return warmup_cosine(self.images_drawn / (config.epochs * self.images_per_epoch), config.warmup)

        groups = parameter_groups(self, config.lr, config.weight_decay, config.layer_decay)
        optimizer: torch.optim.Optimizer
        if config.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=0.9)
        else:
            scaled = (
                self.trainer.precision == "16-mixed"
            )  # a fused step would undo the scale after the gradient was clipped
            optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=not scaled)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """As Lightning does, but also with a fused optimizer in bfloat16, which it refuses for the sake of fp16's scale."""
        if gradient_clip_val and self.sharded:
            root: Any = self.trainer.strategy.model
            root.clip_grad_norm_(gradient_clip_val)
        elif self.trainer.precision == "bf16-mixed" and gradient_clip_val:
            self.trainer.precision_plugin.clip_grad_by_norm(optimizer, gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)


class ClassificationModule(TrainingModule):
    """One logit per image and, with the fusion of exams, per breast and patient; while it learns, auxiliary heads. Metrics over whole
    epochs at the threshold 0.5, per image or per breast."""

    def __init__(self, model: Network, config: TrainConfig, images_per_epoch: int, history: History) -> None:
        super().__init__(config, images_per_epoch, history)
        self.model = model
        self.heads = AuxiliaryHeads(model.config.vit.dim, config.auxiliary) if config.auxiliary else None
        self.loss = make_loss(config.loss, config.smoothing)
        self.step_outputs: dict[str, list[StepOutputs]] = {"train": [], "val": []}
        self.epoch_predictions: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        """Scores, labels and rows of the last epoch by stage, for pictures."""

    @property
    def frozen(self) -> bool:
        """Whether the head alone learns at the moment."""
        return self.training and self.current_epoch < self.config.freeze

    def features(self, pack: PackedBatch) -> Tensor:
        """What the heads read: B D. While the body is frozen it neither learns nor is it disturbed."""
        if not self.frozen:
            return self.model.features(pack)
        with torch.no_grad():
            self.model.eval()
            features = self.model.features(pack)
            self.model.train()
        return features

    def forward(self, pack: PackedBatch) -> Tensor:
        """The logit of each of a pack's B images or, with the fusion of exams, of its breast: B."""
        return self.model.image_and_breast_logits(self.features(pack), pack.metadata)[:, -1]

    def training_step(self, batch: Batch, _: int) -> Tensor | None:
        pack = drop_sources(batch.pack, self.config.source_dropout)
        reading = self.model.encode_segments(pack, batch.lesions) if self.model.segments and not self.frozen else None
        features = reading.features if reading else self.features(pack)  # B D
        more = torch.zeros_like(batch.label)
        if reading:
            more = more + segments.segment_losses(reading, batch.label, batch.lesions)
        if self.heads is not None:
            extra = self.heads(features, batch.targets)  # B A
            known = (~batch.targets.isnan()).sum(dim=0).clamp(min=1)
            averages = zip(self.config.auxiliary, extra.detach().sum(dim=0) / known, strict=True)
            self.log_dict({f"train/auxiliary/{name}": value for name, value in averages})
            more = more + self.config.auxiliary_weight * extra.sum(dim=1)
        return self.distributed_mean(
            self._losses("train", batch, self.model.apply_heads(features, pack.metadata), more), batch
        )

    def validation_step(self, batch: Batch, _: int) -> None:
        self._losses(
            "val",
            batch,
            self.model.apply_heads(self.features(batch.pack), batch.pack.metadata),
            torch.zeros_like(batch.label),
        )

    def _losses(self, stage: str, batch: Batch, said: Logits, more: Tensor) -> Tensor:
        """One loss per draw: the mean of its images', to which `more` (B) is added, and for an exam that of its breasts' and its own."""
        logits, labels, rows = said.images[:, 0].float(), batch.label, batch.row  # B
        losses = self.loss(logits, labels)
        of_draws = group_means(losses + more, batch.indices_by_sample)
        if said.breasts is not None and said.patients is not None:
            places = group_by_breast(batch.pack.metadata)
            logits, rows = said.breasts.float(), batch.row[[each[0] for each in places]]  # G
            labels = torch.stack([batch.label[each].nan_to_num(-1).max() for each in places])
            labels = labels.where(labels >= 0, torch.nan)
            exams = group_indices(batch.pack.metadata[each[0]].exam for each in places)
            losses = self.loss(logits, labels)
            patients = torch.stack(
                [labels[each].max() if (labels[each] != 1).all() else labels.new_ones(()) for each in exams]
            )
            of_draws = of_draws + group_means(losses, exams) + self.loss(said.patients.float(), patients)
        if not batch.is_filler:
            self.step_outputs[stage].append((logits.detach(), labels, losses.detach(), rows))
        return of_draws

    def on_train_epoch_end(self) -> None:
        self._log_epoch("train")

    def on_validation_epoch_end(self) -> None:
        self._log_epoch("val")

    def _log_epoch(self, stage: str) -> None:
        """Record an epoch's figures under the same names everywhere: <stage>/<figure>."""
        logits, labels, losses, rows = self._gather_step_outputs(stage)
        finite = np.isfinite(logits) & np.isfinite(labels)
        logits, labels, losses, rows = logits[finite], labels[finite], losses[finite], rows[finite]
        if not len(logits):
            return
        scores = expit(logits)
        self.epoch_predictions[stage] = (scores, labels, rows)
        ranking = RankedUnits(ScoredUnits(labels, scores, np.arange(len(labels))), threshold=0.5)
        values, counts = ranking.metric_values(), ranking.confusion()
        figures = (
            {"loss": float(losses.mean())}
            | {name: values[metric] for name, metric in EPOCH_METRICS.items()}
            | asdict(counts)
        )
        figures = {f"{stage}/{name}": float(value) for name, value in figures.items()}
        if stage == "train":
            figures["learning_rate"] = self.trainer.optimizers[0].param_groups[-1]["lr"]
        self.log_epoch_metrics(figures)

    def _gather_step_outputs(self, stage: str) -> list[np.ndarray]:
        """The epoch's logits, labels, losses and rows, from all processes."""
        mine = [torch.cat(column).cpu().numpy() for column in zip(*self.step_outputs[stage], strict=True)] or [
            np.empty(0)
        ] * 4
        self.step_outputs[stage].clear()
        if world_size() == 1:
            return mine
        each: list[Any] = [None] * world_size()
        dist.all_gather_object(each, mine)
        return [np.concatenate(columns) for columns in zip(*each, strict=True)]


def group_means(values: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """The mean of each group: B -> one per group."""
    return torch.stack([values[list(each)].mean() for each in groups])


def drop_sources(pack: PackedBatch, share: float) -> PackedBatch:
    """The pack with this share of its images' sources, drawn one by one, made unknown."""
    hidden = (torch.rand(len(pack), len(pack.metadata[0].sources)) < share).tolist()
    metadata = [
        replace(known, sources=tuple(0 if hide else value for value, hide in zip(known.sources, row, strict=True)))
        for known, row in zip(pack.metadata, hidden, strict=True)
    ]
    return replace(pack, metadata=tuple(metadata))


class MaePretrainer(TrainingModule):
    """Masked autoencoding: the mean squared error of what was hidden and painted."""

    def __init__(
        self, model: MaskedAutoencoder, config: PretrainConfig, images_per_epoch: int, history: History
    ) -> None:
        super().__init__(config, images_per_epoch, history)
        self.model = model
        self.errors: list[Tensor] = []

    def training_step(self, batch: Batch, _: int) -> Tensor | None:
        losses = self.model(batch.pack)  # B
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
