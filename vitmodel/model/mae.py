"""Masked autoencoding: hide most patches of tissue and learn to reconstruct them from the others.

After He et al. 2021 (arXiv 2111.06377): the encoder, a `ViT`, sees only the visible patches; a small decoder sees their
encodings and a mask token in place of each hidden patch. Patches of air are neither shown nor reconstructed, because
the background carries no information.

Symbols in shapes: `B` images, `C` channels, `P` side of a patch in pixels, `T` tokens of all images, `M` hidden patches
of all images (or of one).
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
    """A pack of which most patches are hidden."""

    visible: PackedBatch
    """The images with the indices of their visible patches."""
    hidden: tuple[Tensor, ...]
    """Row-major indices of the hidden patches of each image."""


def mask_patches(pack: PackedBatch, ratio: float) -> MaskedBatch:
    """Hide random patches of each image.

    Hidden patches are also set to 0 in the image: otherwise a convolutional stem would see them from neighbouring
    patches.

    Args:
        pack: The images.
        ratio: Share of each image's kept patches to hide. At least one patch is hidden, and at least one stays visible
            in an image with two or more.
    """
    images = []
    visible = []
    hidden = []
    for image, kept, (h, w) in zip(pack.images, pack.patch_indices, pack.grids, strict=True):
        count = min(max(1, round(ratio * len(kept))), max(1, len(kept) - 1))
        order = kept[torch.randperm(len(kept), device=kept.device)]
        image_hidden = order[:count].sort().values
        mask = torch.ones(h * w, dtype=image.dtype, device=image.device)
        mask[image_hidden] = 0
        images.append(image * mask.view(h, 1, w, 1).expand(h, pack.patch, w, pack.patch).reshape(image.shape[-2:]))
        visible.append(order[count:].sort().values)
        hidden.append(image_hidden)
    return MaskedBatch(PackedBatch(pack.names, tuple(images), tuple(visible), pack.patch), tuple(hidden))


class MaskedAutoencoder(nn.Module):
    """A ViT encoder with a small decoder that is discarded after pretraining.

    Args:
        encoder: The ViT to pretrain.
        ratio: Share of the kept patches to hide.
        depth: Number of blocks of the decoder.
    """

    def __init__(self, encoder: ViT, ratio: float = 0.75, depth: int = 2) -> None:
        super().__init__()
        config = encoder.config
        self.ratio = ratio
        self.encoder = encoder
        width = max(64, config.dim // 2 // 64 * 64)
        small = replace(config, dim=width, heads=width // 32, depth=depth, stem="linear", layer_scale=None)
        # the decoder has a norm of its own because the encoder's last norm depends on its pool
        self.norm = nn.LayerNorm(config.dim, config.eps)
        self.narrow = nn.Linear(config.dim, width)
        self.mark = nn.Parameter(torch.empty(width))
        self.positions = nn.Parameter(torch.empty(1, *config.grid, width))
        self.blocks = nn.ModuleList(Block(small, drop_path=0.0) for _ in range(depth))
        self.paint = nn.Sequential(nn.LayerNorm(width, config.eps), nn.Linear(width, config.channels * config.patch**2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the decoder as the encoder: truncated normals (standard deviation 0.02), biases 0."""
        for module in (self.narrow, *self.blocks.modules(), *self.paint):
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.mark, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def reconstruct(self, pack: PackedBatch, masked: MaskedBatch) -> Tensor:
        """Return the reconstruction of the hidden patches of all images.

        Args:
            pack: The images before masking.
            masked: The same images from `mask_patches`.

        Returns:
            Patches `(M, C * P * P)`, image by image, in the units of `standardised_targets`.
        """
        encoded = self._encode(masked.visible)
        prefix = self.encoder.config.num_prefix_tokens
        sequence = []
        hidden_mask = []
        lengths = []
        images = zip(encoded, pack.grids, masked.visible.patch_indices, masked.hidden, strict=True)
        for tokens, grid, shown, hidden in images:
            positions = resize_positions(self.positions, grid).flatten(1, 2)[0].to(tokens.dtype)
            sequence += [
                tokens[:prefix],
                tokens[prefix:] + positions[shown],
                self.mark.to(tokens.dtype) + positions[hidden],
            ]
            hidden_mask += [torch.zeros(len(tokens), dtype=torch.bool), torch.ones(len(hidden), dtype=torch.bool)]
            lengths.append(len(tokens) + len(hidden))
        x = torch.cat(sequence)[None]
        layout = PackedLayout(lengths, x.device)
        for block in self.blocks:
            x = block(x, layout)
        return self.paint(x[0, torch.cat(hidden_mask).to(x.device)])

    def _encode(self, visible: PackedBatch) -> tuple[Tensor, ...]:
        """Return the encoder's tokens of each image at the decoder's width: prefix tokens, then visible patches."""
        lengths = visible.sequence_lengths(self.encoder.config.num_prefix_tokens)
        tokens = embed(self.encoder, visible)
        layout = PackedLayout(lengths, tokens.device)
        for block in self.encoder.blocks:
            tokens = block(tokens, layout)
        return self.narrow(self.norm(tokens))[0].split(lengths)

    def forward(self, pack: PackedBatch) -> Tensor:
        """Return the mean squared error over each image's hidden patches, `(B,)`.

        The target is the pixels standardised patch by patch, the paper's best choice.
        """
        masked = mask_patches(pack, self.ratio)
        reconstruction = self.reconstruct(pack, masked).float()
        targets = [
            standardised_targets(image, hidden, pack.patch)
            for image, hidden in zip(pack.images, masked.hidden, strict=True)
        ]
        errors = F.mse_loss(reconstruction, torch.cat(targets), reduction="none").mean(dim=1)
        per_image = errors.split([len(hidden) for hidden in masked.hidden])
        return torch.stack([patch_errors.mean() for patch_errors in per_image])


def standardised_targets(image: Tensor, hidden: Tensor, patch: int) -> Tensor:
    """Return the hidden patches, each standardised to mean 0 and standard deviation 1.

    Args:
        image: Pixels `(C, H, W)`.
        hidden: Row-major indices of the hidden patches `(M,)`.
        patch: Side of a patch in pixels.

    Returns:
        Patches `(M, C * P * P)`.
    """
    pixels = patchify(image[None], patch)[0, hidden].float()
    return (pixels - pixels.mean(dim=1, keepdim=True)) / (pixels.var(dim=1, keepdim=True) + 1e-4).sqrt()
