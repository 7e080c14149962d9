"""Losses on logits, and auxiliary heads that predict other annotations of an image.

Every loss returns one value per image, so that the caller can average, weight or inspect them. A label of NaN is
unknown and has a loss of 0.
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
"""Function of logits `(B,)` and labels `(B,)` (0, 1 or NaN) that returns one loss per image `(B,)`."""


def ignore_unknown_labels(loss: Loss) -> Loss:
    """Return `loss` with value and gradient 0 for images whose label is NaN."""

    def masked_loss(logits: Tensor, labels: Tensor) -> Tensor:
        is_labelled = ~labels.isnan()
        return loss(torch.where(is_labelled, logits, 0), torch.where(is_labelled, labels, 0)) * is_labelled

    return masked_loss


def prior_bias(prior: float) -> float:
    """Return the logit of a prior probability, the initial bias of the head.

    A head with this bias does not spend its first steps on learning how rare the positive class is (Lin et al. 2017,
    arXiv 1708.02002, section 3.3).

    Args:
        prior: Share of positives.

    Raises:
        UsageError: There is only one class.
    """
    if not 0 < prior < 1:
        raise UsageError(
            f"the training images are all of one class (share of positives {prior:g}); add images of the other class"
        )
    return math.log(prior / (1 - prior))


def bce(smoothing: float = 0.0) -> Loss:
    """Return binary cross entropy with targets 1 - `smoothing` for positives and 0 for negatives.

    Only positives are smoothed: a breast with a proven cancer need not show it in every view, while negatives were
    confirmed by follow-up.
    """

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, labels * (1 - smoothing), reduction="none")

    return ignore_unknown_labels(loss)


def focal(gamma: float = 2.0, smoothing: float = 0.0) -> Loss:
    """Return the focal loss, binary cross entropy times (1 - probability of the true class) ** gamma.

    Images that are already classified well count less (Lin et al. 2017, arXiv 1708.02002, eq. 4).
    """

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        error = torch.where(labels > 0.5, torch.sigmoid(-logits), torch.sigmoid(logits))
        return error**gamma * F.binary_cross_entropy_with_logits(logits, labels * (1 - smoothing), reduction="none")

    return ignore_unknown_labels(loss)


def soft_f1(logits: Tensor, labels: Tensor) -> Tensor:
    """Return 1 - probabilistic F1 of the batch, the same value for each labelled image.

    pF1 = 2 Σpy / (Σp + Σy) (Yacouby and Axman 2020, the metric of the RSNA challenge), summed over all processes, is
    differentiable in the probabilities p. It is undefined without a positive; the loss is then 0, which is why the
    sampler puts a positive into every batch.

    Args:
        logits: `(B,)`.
        labels: `(B,)`, 0, 1 or NaN.
    """
    is_labelled = ~labels.isnan()
    p = torch.sigmoid(torch.where(is_labelled, logits, 0)) * is_labelled
    y = torch.where(is_labelled, labels, 0)
    true_positives, predicted, positives = AllReduceSum.apply(torch.stack([(p * y).sum(), p.sum(), y.sum()]))
    pf1 = 2 * true_positives / (predicted + positives).clamp(min=1e-6)
    return (1 - pf1) * is_labelled * (positives > 0)


class AllReduceSum(torch.autograd.Function):
    """Sum over all processes whose backward pass sums the gradients over all processes."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor) -> Tensor:
        total = sums.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        return total

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
        smoothing: The target of positives is 1 - `smoothing`, that of negatives 0.

    Raises:
        UsageError: No loss is registered under `name`.
    """
    return load_choice(LOSSES, "loss", name)(smoothing=smoothing)


@dataclass(frozen=True)
class AuxiliaryTarget:
    """A manifest column that is predicted as an auxiliary target."""

    name: str
    classes: tuple[str, ...] = ()
    """Values of a categorical column, in order. Empty for a flag (0 or 1) or, with `scale`, a number."""
    scale: float = 0.0
    """Unit of a number, chosen so that errors are near 1. 0 if the column is not a number."""
    centre: float = 0.0
    """The target of a number is (value - centre) / scale."""

    @property
    def num_outputs(self) -> int:
        """Number of outputs of the target's head."""
        return len(self.classes) or 1

    def encode(self, values: Sequence[object]) -> Tensor:
        """Return the column's values as float32: class index, 0 or 1, or scaled number.

        Unknown values and values outside the classes are NaN.
        """
        if self.classes:
            index = {name: float(number) for number, name in enumerate(self.classes)}
            return torch.tensor([index.get(_text(value), math.nan) for value in values])
        numbers = torch.tensor([math.nan if value is None else float(value) for value in values])  # type: ignore[arg-type]
        return (numbers - self.centre) / self.scale if self.scale else numbers

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return one loss per image `(B,)`, 0 where the target is NaN.

        Args:
            outputs: Outputs of the head, `(B, num_outputs)`.
            targets: Encoded targets, `(B,)`.
        """
        if self.classes:
            is_labelled = ~targets.isnan()
            index = torch.where(is_labelled, targets, 0).long()
            losses = F.cross_entropy(torch.where(is_labelled[:, None], outputs, 0), index, reduction="none")
            return losses * is_labelled / math.log(len(self.classes))
        if self.scale:
            return ignore_unknown_labels(_smooth_l1)(outputs[:, 0], targets)
        return bce()(outputs[:, 0], targets)


def _smooth_l1(predictions: Tensor, targets: Tensor) -> Tensor:
    return F.smooth_l1_loss(predictions, targets, reduction="none")


def _text(value: object) -> str:
    """Return the text of a value, the same for 5.0 and "5"."""
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
        AuxiliaryTarget("age", centre=58.0, scale=12.0),  # years: mean and standard deviation of a screened population
    )
}


class AuxiliaryHeads(nn.Module):
    """One linear head per auxiliary target on the model's pooled features.

    The heads are used in training only: targets are never an input, and the heads are not part of a package.
    """

    def __init__(self, dim: int, names: Sequence[str]) -> None:
        super().__init__()
        self.targets = [AUXILIARY_TARGETS[name] for name in names]
        self.heads = nn.ModuleDict({target.name: nn.Linear(dim, target.num_outputs) for target in self.targets})

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each image for each target `(B, A)`, 0 where the target is unknown.

        The caller averages over all images, so that a target which few images have gets a weight in proportion.

        Args:
            features: Pooled features, `(B, D)`.
            targets: Encoded targets, `(B, A)`.
        """
        outputs = [(target, self.heads[target.name](features).float()) for target in self.targets]
        return torch.stack(
            [target.loss(output, targets[:, column]) for column, (target, output) in enumerate(outputs)], dim=1
        )
