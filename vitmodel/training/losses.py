"""Losses on logits, and auxiliary heads that learn from whatever else is known of an image. Knows no table, model or sampler.

Every loss gives one value per image, so that the caller can average, weigh or inspect them; a label of NaN is unknown and costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vitmodel.config.choices import LOSSES, load_choice
from vitmodel.errors import UsageError

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits and labels (0, 1 or NaN), B each, to one loss per image, B."""


def ignore_unknown_labels(loss: Loss) -> Loss:
    """`loss` with 0 where the label is NaN; neither its value nor its gradient reaches the logit there."""

    def known_only(logits: Tensor, labels: Tensor) -> Tensor:
        known = ~labels.isnan()
        return loss(torch.where(known, logits, 0), torch.where(known, labels, 0)) * known

    return known_only


def prior_bias(prior: float) -> float:
    """The logit of a prior probability: a head that starts there does not spend its first steps on learning how rare a class is.

    Lin et al. 2017 (arXiv 1708.02002), section 3.3. Raises UsageError where there is only one class.
    """
    if not 0 < prior < 1:
        raise UsageError(f"the training images are all of one class (share of positives {prior:g}); both are needed")
    return math.log(prior / (1 - prior))


def bce(smoothing: float = 0.0) -> Loss:
    """Binary cross entropy; positives are taught as 1 - `smoothing`, negatives as 0.

    Only positives are softened: a breast with a proven cancer need not show it in each view, while a negative was followed up.
    """

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, labels * (1 - smoothing), reduction="none")

    return ignore_unknown_labels(loss)


def focal(gamma: float = 2.0, smoothing: float = 0.0) -> Loss:
    """Binary cross entropy times (1 - the probability of the truth) ** gamma: what is learned counts less (arXiv 1708.02002, eq. 4)."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        missed = torch.where(labels > 0.5, torch.sigmoid(-logits), torch.sigmoid(logits))
        return missed**gamma * F.binary_cross_entropy_with_logits(logits, labels * (1 - smoothing), reduction="none")

    return ignore_unknown_labels(loss)


def soft_f1(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - probabilistic F1 of the batch (Yacouby and Axman 2020, the metric of the RSNA challenge), the same value for each known image.

    pF1 = 2 Σpy / (Σp + Σy), summed over all processes, is differentiable in the probabilities p, but undefined without a positive: then
    it is left out (0), which is why the sampler gives every batch one.
    """
    known = ~labels.isnan()
    p, y = torch.sigmoid(torch.where(known, logits, 0)) * known, torch.where(known, labels, 0)
    both, said, positives = AllReduceSum.apply(torch.stack([(p * y).sum(), p.sum(), y.sum()]))
    pf1 = 2 * both / (said + positives).clamp(min=1e-6)
    return (1 - pf1) * known * (positives > 0)


class AllReduceSum(torch.autograd.Function):
    """Sums over the parts of a batch that the processes have, and back the sum of what each makes of them."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor) -> Tensor:
        whole = sums.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return AllReduceSum.forward(ctx, gradient)


def pf1(smoothing: float = 0.0) -> Loss:
    """Return the mean of BCE and 1 - pF1. On its own, pF1 has no gradient where the probabilities are saturated."""
    cross_entropy = bce(smoothing)
    return lambda logits, labels: (cross_entropy(logits, labels) + soft_f1(logits, labels)) / 2


def make_loss(name: str, smoothing: float = 0.0) -> Loss:
    """Return the loss registered under `name` in `vitmodel.config.choices.LOSSES`.

    Args:
        name: Key of the registry, such as "bce".
        smoothing: Positives are taught as 1 - `smoothing`, negatives as 0.

    Raises:
        UsageError: No loss is registered under `name`.
    """
    return load_choice(LOSSES, "loss", name)(smoothing=smoothing)


@dataclass(frozen=True)
class AuxiliaryTarget:
    """A column of the table as an auxiliary target."""

    name: str
    classes: tuple[str, ...] = ()
    """The values of a category, in order; empty = a flag (0 or 1) or, with `scale`, a number."""
    scale: float = 0.0
    """Unit of a number, so that its error is near 1; 0 = no number."""
    centre: float = 0.0
    """A number is taught as (value - centre) / scale."""

    @property
    def num_outputs(self) -> int:
        """Numbers that the head gives for it."""
        return len(self.classes) or 1

    def encode(self, values: Sequence[object]) -> Tensor:
        """Values of the column as float32: the class's index, 0 or 1, or the scaled number; NaN where unknown or not among the classes."""
        if self.classes:
            index = {name: float(number) for number, name in enumerate(self.classes)}
            return torch.tensor([index.get(_text(value), math.nan) for value in values])
        numbers = torch.tensor([math.nan if value is None else float(value) for value in values])  # type: ignore[arg-type]
        return (numbers - self.centre) / self.scale if self.scale else numbers

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One loss per image, 0 where the target is NaN: B O, B -> B."""
        if self.classes:
            known = ~targets.isnan()
            index = torch.where(known, targets, 0).long()
            return (
                F.cross_entropy(torch.where(known[:, None], outputs, 0), index, reduction="none")
                * known
                / math.log(len(self.classes))
            )
        if self.scale:
            return ignore_unknown_labels(
                lambda predicted, wanted: F.smooth_l1_loss(predicted, wanted, reduction="none")
            )(outputs[:, 0], targets)
        return bce()(outputs[:, 0], targets)


def _text(value: object) -> str:
    """5.0 and "5" alike."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


AUXILIARY_TARGETS: Mapping[str, AuxiliaryTarget] = {
    target.name: target
    for target in (
        AuxiliaryTarget("birads", classes=("0", "1", "2", "3", "4", "5", "6")),
        AuxiliaryTarget("density", classes=("A", "B", "C", "D")),
        AuxiliaryTarget("invasive"),
        AuxiliaryTarget("biopsy"),
        AuxiliaryTarget("difficult_negative_case"),
        AuxiliaryTarget("view", classes=("CC", "MLO")),
        AuxiliaryTarget("age", centre=58.0, scale=12.0),  # years: mean and deviation of a screened population
    )
}


class AuxiliaryHeads(nn.Module):
    """A linear head per target on the model's pooled features. Used in training only: no target is ever an input, nor part of a package."""

    def __init__(self, dim: int, names: Sequence[str]) -> None:
        super().__init__()
        self.targets = [AUXILIARY_TARGETS[name] for name in names]
        self.heads = nn.ModuleDict({target.name: nn.Linear(dim, target.num_outputs) for target in self.targets})

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        """The loss of each image for each target, 0 where it is unknown: B D, B A -> B A.

        Their mean is over all images, so that a target that few images know pulls no harder than those few.
        """
        outputs = [(target, self.heads[target.name](features).float()) for target in self.targets]
        return torch.stack(
            [target.loss(output, targets[:, column]) for column, (target, output) in enumerate(outputs)], dim=1
        )
