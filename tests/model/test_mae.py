"""Masked autoencoding: hidden patches stay hidden, air is never a target, and reconstruction is learned."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from vitmodel.config import Size
from vitmodel.model.architecture import ViTConfig
from vitmodel.model.mae import MaskedAutoencoder, mask_patches, standardised_targets
from vitmodel.model.packed_batch import pack_images
from vitmodel.model.vit import ViT

Stem = Literal["linear", "conv"]


def images() -> list[torch.Tensor]:
    """Return two crops of different shapes with columns of air."""
    generator = torch.Generator().manual_seed(0)
    crops = [torch.rand(1, 32, 24, generator=generator), torch.rand(1, 16, 32, generator=generator)]
    for crop in crops:
        crop[..., 16:] = 0
    return crops


def build(stem: Stem = "linear") -> MaskedAutoencoder:
    """Return a small autoencoder that hides half of the patches."""
    torch.manual_seed(0)
    config = ViTConfig(image_size=Size(32, 32), patch=8, dim=32, depth=2, heads=2, stem=stem)
    return MaskedAutoencoder(ViT(config), ratio=0.5, depth=1)


def test_each_patch_of_tissue_is_either_visible_or_hidden() -> None:
    pack = pack_images(images(), 8)
    masked = mask_patches(pack, 0.75)
    for shown, hidden, kept in zip(masked.visible.patch_indices, masked.hidden, pack.patch_indices, strict=True):
        assert sorted([*shown.tolist(), *hidden.tolist()]) == kept.tolist()
        assert len(hidden) == round(0.75 * len(kept))


@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_the_reconstruction_does_not_depend_on_hidden_pixels(stem: Stem) -> None:
    autoencoder = build(stem).eval()
    pack = pack_images(images(), 8)
    torch.manual_seed(1)
    masked = mask_patches(pack, 0.5)
    changed_images = [image.clone() for image in images()]
    for image, hidden in zip(changed_images, masked.hidden, strict=True):
        for index in hidden.tolist():
            row, column = divmod(index, image.shape[-1] // 8)
            image[:, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 0.123
    changed_pack = pack_images(changed_images, 8)
    torch.manual_seed(1)
    changed = mask_patches(changed_pack, 0.5)
    torch.testing.assert_close(autoencoder.reconstruct(pack, masked), autoencoder.reconstruct(changed_pack, changed))


def test_targets_are_standardised_per_patch() -> None:
    targets = standardised_targets(images()[0], torch.tensor([0, 3]), 8)
    torch.testing.assert_close(targets.mean(dim=1), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(targets.std(dim=1), torch.ones(2), atol=0.02, rtol=0)


def test_reconstruction_is_learned() -> None:
    """Stripes can be predicted from visible patches: the error falls far below 1, the error of grey patches."""
    stripes = (torch.arange(32) % 4 < 2).float().expand(1, 32, 32) * 0.5 + 0.25
    autoencoder = build()
    optimiser = torch.optim.AdamW(autoencoder.parameters(), lr=3e-3)
    for _ in range(60):
        loss = autoencoder(pack_images([stripes, stripes.transpose(1, 2).contiguous()], 8)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.3
    assert all(parameter.grad is not None for parameter in autoencoder.encoder.blocks.parameters())
