"""Low-rank adaptation of a ViT (LoRA, Hu et al. 2021, arXiv 2106.09685): small learned updates of frozen matrices."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vitmodel.errors import UsageError
from vitmodel.model.vit import ViT

TRAINED_PREFIXES = ("head.", "attn_pool.", "norm.", "fc_norm.")
"""Parts after the blocks, which learn with the updates."""


class LowRankUpdate(nn.Module):
    """The matrix `W + up @ down`, `(D', D)`, for the matrix `W`. At first it is `W`, because `up` is zero.

    Args:
        weight: The matrix `W` `(D', D)`.
        rank: Number of rows of `down` `(rank, D)` and of columns of `up` `(D', rank)`.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, weight.shape[1]))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def _block_matrices(vit: ViT) -> Iterator[nn.Linear]:
    """Return the linear layers of all blocks."""
    for block in vit.blocks:
        yield from (module for module in block.modules() if isinstance(module, nn.Linear))


def add_low_rank_updates(vit: ViT, rank: int, fresh: Collection[str] = ()) -> None:
    """Freeze the backbone and give each matrix of its blocks an update that learns.

    Args:
        vit: The network; changed in place.
        rank: Rank of the updates.
        fresh: Names of tensors that were initialised at random, for lack of published ones; they learn as well.

    Raises:
        UsageError: The rank is so large that an update has no fewer parameters than its matrix.
    """
    largest = vit.config.dim // 2
    if rank > largest:
        raise UsageError(f"lora: rank {rank} saves no parameters at a width of {vit.config.dim}; use at most {largest}")
    for name, parameter in vit.named_parameters():
        parameter.requires_grad_(name in fresh or name.startswith(TRAINED_PREFIXES))
    for layer in _block_matrices(vit):
        parametrize.register_parametrization(layer, "weight", LowRankUpdate(layer.weight, rank))


def merge_low_rank_updates(vit: ViT) -> None:
    """Replace each matrix by its sum with the update, so that the network has its usual tensors again."""
    for layer in _block_matrices(vit):
        parametrize.remove_parametrizations(layer, "weight")
