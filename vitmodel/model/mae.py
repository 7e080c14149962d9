"""Masked autoencoding: hide most patches of tissue, and learn to paint them from the rest. Knows no data, no file and no trainer.

He et al. 2021 (arXiv 2111.06377): the encoder, a `ViT`, sees the visible patches alone; a small decoder sees them and a mark in the place
of each hidden one. Air is neither shown nor asked for, so that nothing is learned about a background that tells nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitmodel.model.packed_attention import PackedLayout, embed
from vitmodel.model.packed_batch import PackedBatch
from vitmodel.model.vit import Block, ViT, patchify, resize_positions


class MaskedBatch(NamedTuple):
    """A pack with most patches hidden, and which ones; numbers are of patches as in `Pack.kept`."""

    visible: PackedBatch
    hidden: tuple[Tensor, ...]


def mask_patches(pack: PackedBatch, ratio: float) -> MaskedBatch:
    """Hide the share `ratio` of each image's kept patches, at random, but at least one and not all where there are two.

    Hidden patches are blanked in the image, too: a convolutional stem must not see them from next door.
    """
    images, kept, hidden = [], [], []
    for image, numbers, (h, w) in zip(pack.images, pack.patch_indices, pack.grids, strict=True):
        count = min(max(1, round(ratio * len(numbers))), max(1, len(numbers) - 1))
        order = numbers[torch.randperm(len(numbers), device=numbers.device)]
        gone, shown = order[:count].sort().values, order[count:].sort().values
        mask = torch.ones(h * w, dtype=image.dtype, device=image.device)
        mask[gone] = 0
        images.append(image * mask.view(h, 1, w, 1).expand(h, pack.patch, w, pack.patch).reshape(image.shape[-2:]))
        kept.append(shown)
        hidden.append(gone)
    return MaskedBatch(PackedBatch(pack.names, tuple(images), tuple(kept), pack.patch), tuple(hidden))


class MaskedAutoencoder(nn.Module):
    """`encoder` with a decoder that is thrown away after the training."""

    def __init__(self, encoder: ViT, ratio: float = 0.75, depth: int = 2) -> None:
        super().__init__()
        config = encoder.config
        self.ratio = ratio
        self.encoder = encoder
        width = max(64, config.dim // 2 // 64 * 64)
        small = replace(config, dim=width, heads=width // 32, depth=depth, stem="linear", layer_scale=None)
        self.norm = nn.LayerNorm(
            config.dim, config.eps
        )  # of its own: what norm the encoder ends with depends on its pool
        self.narrow = nn.Linear(config.dim, width)
        self.mark = nn.Parameter(torch.empty(width))
        self.positions = nn.Parameter(torch.empty(1, *config.grid, width))
        self.blocks = nn.ModuleList(Block(small, drop_path=0.0) for _ in range(depth))
        self.paint = nn.Sequential(nn.LayerNorm(width, config.eps), nn.Linear(width, config.channels * config.patch**2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in the encoder."""
        for part in (self.narrow, *self.blocks.modules(), *self.paint):
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)
        nn.init.trunc_normal_(self.mark, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def reconstruct(self, pack: PackedBatch, visible: MaskedBatch) -> Tensor:
        """Paint the hidden patches of all images, one after another: M P·P, in units of `wanted`."""
        prefix = self.encoder.config.num_prefix_tokens
        lengths = visible.visible.sequence_lengths(prefix)
        tokens = embed(self.encoder, visible.visible)
        layout = PackedLayout(lengths, tokens.device)
        for block in self.encoder.blocks:
            tokens = block(tokens, layout)
        tokens = self.narrow(self.norm(tokens))[0]  # T D'
        sequences, marks = [], []
        for shown, grid, kept, hidden in zip(
            tokens.split(lengths), pack.grids, visible.visible.patch_indices, visible.hidden, strict=True
        ):
            positions = resize_positions(self.positions, grid).flatten(1, 2)[0].to(shown.dtype)
            sequences += [
                shown[:prefix],
                shown[prefix:] + positions[kept],
                self.mark.to(shown.dtype) + positions[hidden],
            ]
            marks += [torch.zeros(len(shown), dtype=torch.bool), torch.ones(len(hidden), dtype=torch.bool)]
        x = torch.cat(sequences)[None]
        layout = PackedLayout(
            [
                prefix + len(kept) + len(hidden)
                for kept, hidden in zip(visible.visible.patch_indices, visible.hidden, strict=True)
            ],
            x.device,
        )
        for block in self.blocks:
            x = block(x, layout)
        return self.paint(x[0, torch.cat(marks).to(x.device)])

    def forward(self, pack: PackedBatch) -> Tensor:
        """Mean squared error over each image's hidden patches, their pixels standardised patch by patch (the paper's best target): B."""
        visible = mask_patches(pack, self.ratio)
        painted = self.reconstruct(pack, visible).float()
        targets = torch.cat(
            [
                standardised_targets(image, hidden, pack.patch)
                for image, hidden in zip(pack.images, visible.hidden, strict=True)
            ]
        )
        errors = F.mse_loss(painted, targets, reduction="none").mean(dim=1)
        return torch.stack([each.mean() for each in errors.split([len(hidden) for hidden in visible.hidden])])


def standardised_targets(image: Tensor, hidden: Tensor, patch: int) -> Tensor:
    """The hidden patches, each with mean 0 and deviation 1: C H W -> M C·P·P."""
    pixels = patchify(image[None], patch)[0, hidden].float()
    return (pixels - pixels.mean(dim=1, keepdim=True)) / (pixels.var(dim=1, keepdim=True) + 1e-4).sqrt()
