"""Explanations: each method equals its definition, and all methods share the same invariants."""

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


def model_and_image(pool: Pool = "mean", stem: Literal["linear", "conv"] = "linear") -> tuple[Network, PackedBatch]:
    """Return a small network and a pack of one image with air on two sides."""
    torch.manual_seed(0)
    vit = ViTConfig(image_size=Size(64, 32), patch=8, dim=24, depth=3, heads=2, pool=pool, stem=stem, registers=1)
    model = Network(NetworkConfig(vit=vit)).eval()
    for parameter in model.parameters():  # as large as after training; tiny weights give uniform attention
        parameter.data.mul_(3)
    image = torch.rand(1, 64, 32)
    image[:, :16] = 0
    image[:, :, 24:] = 0
    return model, pack_images([image], 8)


def full_attention(model: Network, image: PackedBatch, times_gradient: bool) -> list[Tensor]:
    """Return the attention `(T, T)` of each block, averaged over heads.

    With `times_gradient`, it is first multiplied by its gradient, and negative values are set to 0.
    """
    trunk = model.trunk
    tokens = embed(trunk, image)
    weights = []
    for block in trunk.blocks:
        recorder = AttentionRecorder()
        tokens = block(tokens, recorder)
        recorder.weights.retain_grad()
        weights.append(recorder.weights)
    trunk.head(trunk.pool(trunk.norm(tokens))).sum().backward()
    maps = [(w.grad * w).clamp(min=0) if times_gradient else w for w in weights]  # type: ignore[operator]
    return [attention[0].mean(0).detach() for attention in maps]


@pytest.mark.parametrize("pool", POOLS)
def test_rollout_equals_the_product_of_the_attention_matrices(pool: Pool) -> None:
    model, image = model_and_image(pool)
    rolled = torch.eye(len(image.patch_indices[0]) + 2)
    for attention in full_attention(model, image, times_gradient=False):
        rolled = (attention + torch.eye(len(attention))) / 2 @ rolled
    read = rolled[0] if pool == "cls" else rolled[2:].mean(0)
    expected = read[2:] / read[2:].mean()
    torch.testing.assert_close(explain(model, image, "rollout").flatten()[image.patch_indices[0]], expected)


@pytest.mark.parametrize("pool", POOLS)
def test_gradient_equals_the_rule_on_the_full_relevance_matrix(pool: Pool) -> None:
    model, image = model_and_image(pool)
    start = torch.eye(len(image.patch_indices[0]) + 2, dtype=torch.float64)
    relevance = start
    for attention in full_attention(model, image, times_gradient=True):
        relevance = relevance + attention.double() @ relevance
    gained = relevance - start
    read = gained[0] if pool == "cls" else gained[2:].mean(0)
    expected = (read[2:] / read[2:].mean()).float()
    torch.testing.assert_close(
        explain(model, image, "gradient").flatten()[image.patch_indices[0]], expected, rtol=1e-4, atol=1e-5
    )


def test_occlusion_equals_the_mean_logit_drop_of_the_windows_that_cover_a_patch() -> None:
    model, image = model_and_image()
    (pixels,) = image.images
    side = 8 * max(1, round(64 / WINDOWS_PER_HEIGHT / 8))
    smoothed = smooth_tissue(pixels, 8)
    total = torch.zeros(64, 32)
    count = torch.zeros(64, 32)
    with torch.no_grad():
        whole = model(image).images.item()
        for top, left in product(range(0, 64 - side + 1, side // 2), range(0, 32 - side + 1, side // 2)):
            window = (slice(top, top + side), slice(left, left + side))
            covered = pixels.clone()
            covered[:, *window] = smoothed[:, *window]
            total[window] += whole - model(pack_images([covered], 8)).images.item()
            count[window] += 1
    expected = (total / count).unflatten(1, (4, 8)).unflatten(0, (8, 8)).mean((1, 3))
    kept = image.patch_indices[0]
    heat_map = explain(model, image, "occlusion")
    torch.testing.assert_close(heat_map.flatten()[kept], expected.flatten()[kept], atol=1e-5, rtol=1e-4)


def test_integrated_gradients_sum_to_the_rise_of_the_logit_above_the_baseline() -> None:
    model, image = model_and_image()
    assert INTEGRATION_STEPS >= 16
    with torch.no_grad():
        baseline = pack_images([smooth_tissue(image.images[0], 8)], 8)
        rise = model(image).images - model(baseline).images
    assert abs(rise.item()) > 1e-3
    assert explain(model, image, "integrated").nansum().item() == pytest.approx(rise.item(), rel=0.01)


@pytest.mark.parametrize("method", ["occlusion", "integrated"])
def test_the_number_of_images_per_pass_does_not_change_a_map(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = model_and_image()
    passes: list[int] = []
    model.trunk.head.register_forward_hook(lambda _module, _inputs, output: passes.append(len(output)))
    batched = explain(model, image, method)
    largest_batch = max(passes)
    passes.clear()
    monkeypatch.setattr("vitmodel.model.explain.TOKENS_PER_PASS", 1)
    single = explain(model, image, method)
    assert largest_batch > 4
    assert max(passes) == 1
    torch.testing.assert_close(batched, single, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_the_smoothed_breast_has_the_same_air_and_no_lesion() -> None:
    image = torch.full((1, 256, 128), 0.4)
    image[:, :64] = 0
    lesion = image.clone()
    lesion[:, 150:158, 60:68] = 0.9
    smoothed = smooth_tissue(lesion, 16)
    assert torch.equal(smoothed > 0, lesion > 0)
    assert (smoothed - image).abs().max() < 0.05
    torch.testing.assert_close(smooth_tissue(image, 16), image)


@pytest.mark.parametrize(("method", "stem"), list(product(METHODS, ("linear", "conv"))))
def test_a_map_covers_the_tissue_and_does_not_change_the_model(method: str, stem: Literal["linear", "conv"]) -> None:
    model, image = model_and_image(stem=stem)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    heat_map = explain(model, image, method)
    assert heat_map.shape == (8, 4)
    assert np.array_equal(heat_map.flatten().isfinite().nonzero().squeeze(1), image.patch_indices[0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_missing_library_is_reported_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(UsageError, match=r"vitmodel\[explain\]"):
        explain(*model_and_image(), "occlusion")
