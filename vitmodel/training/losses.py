"""Losses on logits, of the label and of auxiliary targets.

Every loss returns one value per image, so that the caller can average, weight or inspect them. A label of NaN is
unknown and has a loss of 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vitmodel.config.auxiliary import AuxiliaryTarget, output_slices
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


def auxiliary_losses(targets: Sequence[AuxiliaryTarget], outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of each image for each of A auxiliary targets `(B, A)`, 0 where the target is unknown.

    The caller averages over all images, so that a target which few images have gets a weight in proportion.

    Args:
        targets: The targets.
        outputs: Outputs of `AuxiliaryHeads` for these targets, `(B, K)`.
        labels: Encoded targets, `(B, A)`; NaN = unknown.
    """
    losses = [
        _auxiliary_loss(target, outputs[:, columns], labels[:, number])
        for number, (target, columns) in enumerate(output_slices(targets))
    ]
    return torch.stack(losses, dim=1)


def _auxiliary_loss(target: AuxiliaryTarget, outputs: Tensor, labels: Tensor) -> Tensor:
    """Return one loss per image `(B,)` of outputs `(B, num_outputs)` and encoded targets `(B,)`."""
    if target.classes:
        is_labelled = ~labels.isnan()
        index = torch.where(is_labelled, labels, 0).long()
        losses = F.cross_entropy(torch.where(is_labelled[:, None], outputs, 0), index, reduction="none")
        return losses * is_labelled / math.log(len(target.classes))
    if target.scale:
        return ignore_unknown_labels(_smooth_l1)(outputs[:, 0], labels)
    return bce()(outputs[:, 0], labels)


def _smooth_l1(predictions: Tensor, targets: Tensor) -> Tensor:
    return F.smooth_l1_loss(predictions, targets, reduction="none")
