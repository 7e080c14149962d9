"""Masked autoencoding: what is hidden stays hidden, air is never asked for, and painting is learned."""

from __future__ import annotations

import pytest
import torch

from vitmodel.config import Size
from vitmodel.model.architecture import ViTConfig
from vitmodel.model.mae import MaskedAutoencoder, mask_patches, standardised_targets
from vitmodel.model.packed_batch import pack_images
from vitmodel.model.vit import ViT


def images() -> list[torch.Tensor]:
    """Two crops of different shapes, with columns of air."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.rand(1, 32, 24, generator=generator), torch.rand(1, 16, 32, generator=generator)]
    for image in made:
        image[..., 16:] = 0
    return made


def model(stem="linear") -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(
        ViT(ViTConfig(image_size=Size(32, 32), patch=8, dim=32, depth=2, heads=2, stem=stem)), ratio=0.5, depth=1
    )


def test_patches_are_shown_or_hidden_and_air_is_neither() -> None:
    whole = pack_images(images(), 8)
    visible = mask_patches(whole, 0.75)
    for shown, hidden, kept in zip(visible.visible.patch_indices, visible.hidden, whole.patch_indices, strict=True):
        assert sorted([*shown.tolist(), *hidden.tolist()]) == kept.tolist()
        assert len(hidden) == round(0.75 * len(kept))


@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_hidden_pixels_reach_nothing_but_the_target(stem) -> None:
    """Other pixels in the hidden patches paint the same picture."""
    autoencoder = model(stem).eval()
    whole = pack_images(images(), 8)
    torch.manual_seed(1)
    visible = mask_patches(whole, 0.5)
    other = [image.clone() for image in images()]
    for image, hidden in zip(other, visible.hidden, strict=True):
        for number in hidden.tolist():
            row, column = divmod(number, image.shape[-1] // 8)
            image[:, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 0.123
    torch.manual_seed(1)
    changed = mask_patches(pack_images(other, 8), 0.5)
    torch.testing.assert_close(
        autoencoder.reconstruct(whole, visible), autoencoder.reconstruct(pack_images(other, 8), changed)
    )


def test_the_target_is_standardised() -> None:
    targets = standardised_targets(images()[0], torch.tensor([0, 3]), 8)
    torch.testing.assert_close(targets.mean(dim=1), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(targets.std(dim=1), torch.ones(2), atol=0.02, rtol=0)


def test_painting_is_learned() -> None:
    """Stripes can be told from their neighbours: the error falls far below 1, that of painting every patch grey."""
    stripes = (torch.arange(32) % 4 < 2).float().expand(1, 32, 32) * 0.5 + 0.25
    autoencoder = model()
    optimiser = torch.optim.AdamW(autoencoder.parameters(), lr=3e-3)
    for _ in range(60):
        loss = autoencoder(pack_images([stripes, stripes.transpose(1, 2).contiguous()], 8)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.3
    assert all(
        parameter.grad is not None
        for name, parameter in autoencoder.encoder.named_parameters()
        if name.startswith("blocks")
    )
