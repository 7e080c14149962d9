"""The start of the original recipe, jx_vit_base_patch16_224_in21k, loads as its own library computes it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from torchvision_stub import torchvision_stub

from vitmodel.config import Preprocessing, Size, TrainConfig
from vitmodel.model.vit import ViT
from vitmodel.training.initial_network import build_model, make_network_config, settle_network

FILE = "jx_vit_base_patch16_224_in21k-e5005f0a.pth"
DIM, CLASSES = 768, 21_843


def original_state(depth: int) -> dict[str, Tensor]:
    """Return random tensors under the exact names and shapes of the published file; its depth is 12."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, DIM),
        "pos_embed": (1, 197, DIM),
        "patch_embed.proj.weight": (DIM, 3, 16, 16),
        "patch_embed.proj.bias": (DIM,),
    }
    for block in range(depth):
        for name, shape in {
            "norm1.weight": (DIM,),
            "norm1.bias": (DIM,),
            "attn.qkv.weight": (3 * DIM, DIM),
            "attn.qkv.bias": (3 * DIM,),
            "attn.proj.weight": (DIM, DIM),
            "attn.proj.bias": (DIM,),
            "norm2.weight": (DIM,),
            "norm2.bias": (DIM,),
            "mlp.fc1.weight": (4 * DIM, DIM),
            "mlp.fc1.bias": (4 * DIM,),
            "mlp.fc2.weight": (DIM, 4 * DIM),
            "mlp.fc2.bias": (DIM,),
        }.items():
            shapes[f"blocks.{block}.{name}"] = shape
    shapes |= {"norm.weight": (DIM,), "norm.bias": (DIM,)}
    shapes |= {"pre_logits.fc.weight": (DIM, DIM), "pre_logits.fc.bias": (DIM,)}
    shapes |= {"head.weight": (CLASSES, DIM), "head.bias": (CLASSES,)}
    state = {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in state:
        if "norm" in name and name.endswith("weight"):
            state[name] += 1
    return state


@torch.no_grad()
def peer_tokens(state: dict[str, Tensor], depth: int, grey: Tensor) -> Tensor:
    """Return the tokens that timm computes of grey images, prepared as in the original recipe."""
    with torchvision_stub():
        timm: Any = importlib.import_module("timm.models.vision_transformer")
        peer = timm.VisionTransformer(224, 16, embed_dim=DIM, depth=depth, num_heads=12, num_classes=0).eval()
    own = {name: tensor for name, tensor in state.items() if not name.startswith(("head.", "pre_logits."))}
    peer.load_state_dict(own, strict=True)
    tokens: Tensor = peer.forward_features((grey.expand(-1, 3, -1, -1) - 0.5) / 0.5)
    return tokens


def test_the_original_weights_give_the_features_of_timm(tmp_path: Path) -> None:
    """Two of the twelve blocks; the slow test has all."""
    state = original_state(depth=2)
    torch.save(state, tmp_path / FILE)
    model = ViT.from_pretrained(tmp_path / FILE, classes=1)
    grey = torch.rand(2, 1, 224, 224)
    with torch.no_grad():
        difference = (model.encode(model.embed(grey)) - peer_tokens(state, 2, grey)).abs().max()
    assert difference <= 1e-4


@pytest.mark.nightly
def test_a_training_starts_from_all_of_the_original_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = original_state(depth=12)
    torch.save(state, tmp_path / FILE)
    preprocessing = Preprocessing(size=Size(224, 224))
    given = TrainConfig(manifest=tmp_path, run=tmp_path, weights=tmp_path / FILE, pool="cls")
    config, source = settle_network(given, preprocessing)
    assert config.model == "vit_base"
    assert source
    table = pd.DataFrame({"cancer": [0.0, 1.0]})
    model = build_model(config, make_network_config(config, preprocessing, [table]), table)[0].eval()
    shown = capsys.readouterr().out
    assert "dropped  head.weight (21843, 768)" in shown
    assert "dropped  pre_logits.fc.weight (768, 768)" in shown
    grey = torch.rand(1, 1, 224, 224)
    with torch.no_grad():
        difference = (model.trunk.encode(model.trunk.embed(grey)) - peer_tokens(state, 12, grey)).abs().max()
    assert difference <= 1e-3
