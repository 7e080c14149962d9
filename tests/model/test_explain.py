"""Explanations: each method against its definition written out in full, and what all of them must keep."""

from __future__ import annotations

import sys
from itertools import product
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from vitmodel.config import Size
from vitmodel.errors import UsageError
from vitmodel.model.architecture import NetworkConfig, ViTConfig
from vitmodel.model.explain import (
    INTEGRATION_STEPS,
    METHODS,
    WINDOWS_PER_HEIGHT,
    AttentionRecorder,
    explain,
    smooth_tissue,
)
from vitmodel.model.network import Network
from vitmodel.model.packed_attention import embed
from vitmodel.model.packed_batch import PackedBatch, pack_images

Pool = Literal["cls", "mean", "attention"]
POOLS: tuple[Pool, ...] = ("cls", "mean", "attention")


def draw(pool: Pool = "mean", stem: Literal["linear", "conv"] = "linear") -> tuple[Network, PackedBatch]:
    torch.manual_seed(0)
    vit = ViTConfig(image_size=Size(64, 32), patch=8, dim=24, depth=3, heads=2, pool=pool, stem=stem, registers=1)
    model = Network(NetworkConfig(vit=vit)).eval()
    for parameter in model.parameters():  # as large as after training: of tiny weights all attention is alike
        parameter.data.mul_(3)
    image = torch.rand(1, 64, 32)
    image[:, :16], image[:, :, 24:] = 0, 0
    return model, pack_images([image], 8)


def full_attention(model: Network, image: PackedBatch, slope: bool) -> list[Tensor]:
    """Each block's attention, heads averaged, after weighting it by its own gradient where `slope`: T T."""
    trunk = model.trunk
    tokens, layouts = embed(trunk, image), []
    for block in trunk.blocks:
        layouts.append(AttentionRecorder())
        tokens = block(tokens, layouts[-1])
        layouts[-1].weights.retain_grad()
    trunk.head(trunk.pool(trunk.norm(tokens))).sum().backward()
    maps = [layout.weights for layout in layouts]
    return [(each.grad * each).clamp(min=0)[0].mean(0).detach() if slope else each[0].mean(0).detach() for each in maps]  # type: ignore[operator]


@pytest.mark.parametrize("pool", POOLS)
def test_rollout_is_the_product_of_the_attention_matrices(pool: Pool) -> None:
    model, image = draw(pool)
    rolled = torch.eye(len(image.patch_indices[0]) + 2)
    for attention in full_attention(model, image, slope=False):
        rolled = (attention + torch.eye(len(attention))) / 2 @ rolled
    read = rolled[0] if pool == "cls" else rolled[2:].mean(0)
    expected = read[2:] / read[2:].mean()
    torch.testing.assert_close(explain(model, image, "rollout").flatten()[image.patch_indices[0]], expected)


@pytest.mark.parametrize("pool", POOLS)
def test_gradient_is_the_rule_on_the_whole_relevance_matrix(pool: Pool) -> None:
    model, image = draw(pool)
    start = torch.eye(len(image.patch_indices[0]) + 2, dtype=torch.float64)
    relevance = start
    for attention in full_attention(model, image, slope=True):
        relevance = relevance + attention.double() @ relevance
    gained = relevance - start
    read = gained[0] if pool == "cls" else gained[2:].mean(0)
    expected = (read[2:] / read[2:].mean()).float()
    torch.testing.assert_close(
        explain(model, image, "gradient").flatten()[image.patch_indices[0]], expected, rtol=1e-4, atol=1e-5
    )


def test_occlusion_is_the_mean_fall_of_the_windows_that_cover_a_patch() -> None:
    model, image = draw()
    (pixels,) = image.images
    side = 8 * max(1, round(64 / WINDOWS_PER_HEIGHT / 8))
    other = smooth_tissue(pixels, 8)
    total, times = torch.zeros(64, 32), torch.zeros(64, 32)
    with torch.no_grad():
        whole = model(image).images.item()
        for top, left in product(range(0, 64 - side + 1, side // 2), range(0, 32 - side + 1, side // 2)):
            covered = pixels.clone()
            covered[:, top : top + side, left : left + side] = other[:, top : top + side, left : left + side]
            total[top : top + side, left : left + side] += whole - model(pack_images([covered], 8)).images.item()
            times[top : top + side, left : left + side] += 1
    expected = (total / times).unflatten(1, (4, 8)).unflatten(0, (8, 8)).mean((1, 3))
    found = explain(model, image, "occlusion")
    torch.testing.assert_close(
        found.flatten()[image.patch_indices[0]], expected.flatten()[image.patch_indices[0]], atol=1e-5, rtol=1e-4
    )


def test_integrated_gradients_add_up_to_what_the_image_adds_to_the_logit() -> None:
    model, image = draw()
    assert INTEGRATION_STEPS >= 16
    with torch.no_grad():
        gained = model(image).images - model(pack_images([smooth_tissue(image.images[0], 8)], 8)).images
    assert abs(gained.item()) > 1e-3
    assert explain(model, image, "integrated").nansum().item() == pytest.approx(gained.item(), rel=0.01)


def test_the_smoothed_breast_has_the_same_air_and_no_lesion() -> None:
    image = torch.full((1, 256, 128), 0.4)
    image[:, :64] = 0
    lesion = image.clone()
    lesion[:, 150:158, 60:68] = 0.9
    other = smooth_tissue(lesion, 16)
    assert torch.equal(other > 0, lesion > 0)
    assert (other - image).abs().max() < 0.05
    torch.testing.assert_close(smooth_tissue(image, 16), image)


@pytest.mark.parametrize(("method", "stem"), list(product(METHODS, ("linear", "conv"))))
def test_a_map_covers_the_breast_and_leaves_the_model_alone(method: str, stem: Literal["linear", "conv"]) -> None:
    model, image = draw(stem=stem)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = explain(model, image, method)
    assert found.shape == (8, 4)
    assert np.array_equal(found.flatten().isfinite().nonzero().squeeze(1), image.patch_indices[0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(UsageError, match=r"vitmodel\[explain\]"):
        explain(*draw(), "occlusion")
