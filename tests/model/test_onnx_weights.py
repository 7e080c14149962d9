"""A Vision Transformer exported to ONNX loads as weights and computes what onnxruntime computes."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torchvision_stub import torchvision_stub

from vitmodel.errors import UsageError, VitmodelError
from vitmodel.model.architecture import ViTConfig
from vitmodel.model.pretrained import described
from vitmodel.model.vit import ViT
from vitmodel.model.weights import IMAGENET_NORMALISATION, fit_weights, load_weights

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

SIZES: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


class Tokens(nn.Module):
    """A model of transformers or timm that returns only its tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        if hasattr(self.model, "forward_features"):
            return self.model.forward_features(images)  # type: ignore[operator]
        tokens: Tensor = self.model(images, interpolate_pos_encoding=True).last_hidden_state
        return tokens


class Dinov2Tokens(Tokens):
    """DINOv2 of transformers, which always interpolates its positions."""

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.model(images).last_hidden_state
        return tokens


def published(kind: str) -> nn.Module:
    """Return a small network with random weights, no two of which are alike, in evaluation mode."""
    torch.manual_seed(0)
    model: nn.Module
    if kind.startswith("DINOv2 with"):
        config = transformers.Dinov2WithRegistersConfig(**SIZES, image_size=112, patch_size=14)
        model = Dinov2Tokens(transformers.Dinov2WithRegistersModel(config))
    elif kind.startswith("DINOv2"):
        model = Dinov2Tokens(
            transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, image_size=112, patch_size=14))
        )
    elif kind.startswith("Hugging Face"):
        sizes = SIZES | {"intermediate_size": 512}
        vit = transformers.ViTConfig(**sizes, image_size=128, patch_size=16, layer_norm_eps=1e-6)
        model = Tokens(transformers.ViTModel(vit, add_pooling_layer=False))
    else:
        with torchvision_stub():
            import timm.models.vision_transformer as timm

            model = Tokens(timm.VisionTransformer(128, 16, embed_dim=128, depth=2, num_heads=4, num_classes=0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def export(model: nn.Module, path: Path, size: tuple[int, int], dynamo: bool = False, dynamic: bool = True) -> Path:
    """Write a network as ONNX by the exporter of TorchScript, or by that of torch.export."""
    settings: dict[str, Any] = {"input_names": ["images"], "output_names": ["tokens"], "dynamo": dynamo}
    if dynamic and not dynamo:
        settings["dynamic_axes"] = {"images": {0: "B", 2: "H", 3: "W"}}
    if dynamo:
        settings["verbose"] = False
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.onnx.export(model, (torch.rand(1, 3, *size),), str(path), **settings)
    return path


@torch.no_grad()
def largest_difference(path: Path, size: tuple[int, int]) -> tuple[float, str]:
    """Return how far our tokens of an image are from onnxruntime's, and the table of what was done."""
    weights = load_weights(path)
    model = ViT(ViTConfig(**described(weights) | {"image_size": size, "channels": 3})).eval()
    report = str(fit_weights(model, replace(weights, normalisation=IMAGENET_NORMALISATION)))
    image = torch.rand(1, 3, *size)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET_NORMALISATION)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    expected = session.run(None, {"images": ((image - mean) / std).numpy()})[0]
    return float(np.abs(model.encode(model.embed(image)).numpy() - expected).max()), report


@pytest.mark.parametrize(
    ("kind", "dynamo", "size", "resized"),
    [
        ("DINOv2", False, (112, 112), False),
        ("DINOv2", False, (84, 42), True),
        ("DINOv2", True, (112, 112), False),
        ("DINOv2 with registers", True, (112, 112), False),
        ("Hugging Face ViT", False, (64, 96), True),
        ("Hugging Face ViT", True, (128, 128), False),
        ("timm ViT", False, (128, 128), False),
        ("timm ViT", True, (128, 128), False),
    ],
)
def test_a_graph_loads_as_weights_and_gives_the_tokens_of_onnxruntime(
    kind: str, dynamo: bool, size: tuple[int, int], resized: bool, tmp_path: Path
) -> None:
    native = (112, 112) if "DINO" in kind else (128, 128)
    path = export(published(kind), tmp_path / "vit.onnx", native, dynamo, dynamic=kind[0] != "t")
    difference, report = largest_difference(path, size)
    assert difference <= 2e-4
    assert ("without antialiasing" in report) == resized
    assert "folded   patch_embed.proj.weight" in report


def small_graph(tmp_path: Path) -> Path:
    """Return the graph of a small DINOv2, with its data in a file of its own."""
    return export(published("DINOv2"), tmp_path / "vit.onnx", (112, 112), dynamo=True)


def test_damaged_and_quantized_graphs_and_data_outside_the_folder_are_refused(tmp_path: Path) -> None:
    path = small_graph(tmp_path)
    data = tmp_path / "vit.onnx.data"
    graph = onnx.load(str(path), load_external_data=False)
    data.rename(tmp_path / "elsewhere")
    with pytest.raises(VitmodelError, match=r"vit.onnx.data cannot be read .*copy both files"):
        load_weights(path)
    data.write_bytes((tmp_path / "elsewhere").read_bytes()[:1000])
    with pytest.raises(VitmodelError, match="is damaged"):
        load_weights(path)
    for constant in graph.graph.initializer:
        for entry in constant.external_data:
            if entry.key == "location":
                entry.value = "../elsewhere"
    path.write_bytes(graph.SerializeToString())
    with pytest.raises(VitmodelError, match=r"'../elsewhere', which is not a file next to it"):
        load_weights(path)
    path.write_bytes(b"\x08\x07garbage")
    with pytest.raises(VitmodelError, match="damaged or not an ONNX file"):
        load_weights(path)
    eight_bits = onnx.helper.make_graph([onnx.helper.make_node("DequantizeLinear", ["a", "b"], ["c"])], "g", [], [])
    path.write_bytes(onnx.helper.make_model(eight_bits).SerializeToString())
    with pytest.raises(UsageError, match="8 bits; use the graph in 32 or 16 bits"):
        load_weights(path)


def test_a_graph_without_a_vision_transformer_is_refused_by_what_it_holds(tmp_path: Path) -> None:
    path = export(nn.Sequential(nn.Conv2d(3, 4, 3)), tmp_path / "conv.onnx", (32, 32), dynamic=False)
    with pytest.raises(UsageError, match=r"no Vision Transformer"):
        fit_weights(ViT(ViTConfig()), load_weights(path))


def test_masks_of_the_graph_are_reported_as_dropped(tmp_path: Path) -> None:
    weights = load_weights(small_graph(tmp_path))
    assert all("(1, 1, 65, 65)" in name for name in weights.unused_names)
    assert weights.eps == 1e-6


@pytest.mark.parametrize(
    ("kind", "antialias"), [("DINOv2", False), ("DINOv2 with registers", True), ("timm ViT", True)]
)
def test_positions_of_each_library_are_resized_as_it_does(kind: str, antialias: bool, tmp_path: Path) -> None:
    """The peers themselves compute the tokens of an image of another size than that of their positions."""
    model: Any = published(kind)
    state = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    weights = load_weights(tmp_path / "weights.pth")
    assert weights.antialias == antialias
    size = (56, 28) if "DINO" in kind else (64, 32)
    if "timm" in kind:
        model.model.set_input_size(size)
    ours = ViT(ViTConfig(**described(weights) | {"image_size": size, "channels": 3})).eval()
    fit_weights(ours, replace(weights, normalisation=IMAGENET_NORMALISATION))
    image = torch.rand(1, 3, *size)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET_NORMALISATION)
    with torch.no_grad():
        difference = (ours.encode(ours.embed(image)) - model((image - mean) / std)).abs().max()
    assert difference <= 2e-4
