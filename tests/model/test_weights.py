"""All published weight formats load to the same function, and incompatible weights are refused by tensor name.

Model packages are written completely or not at all, and damaged ones are refused.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from vitmodel.config import SegmentsConfig, Size, TrainConfig
from vitmodel.errors import UsageError, VitmodelError
from vitmodel.model import package
from vitmodel.model.architecture import PRESETS, ExamConfig, NetworkConfig, SourcesConfig, ViTConfig, Vocabulary
from vitmodel.model.network import Network
from vitmodel.model.package import load_package, save_package
from vitmodel.model.vit import ViT, resize_positions
from vitmodel.model.weight_files import SHARD_INDEX, read_tensors
from vitmodel.model.weights import HALF_NORMALISATION, IMAGENET_NORMALISATION, Normalisation, fit_weights, load_weights
from vitmodel.training.initial_network import build_model

CONFIG = ViTConfig(image_size=Size(64, 64), dim=32, depth=2, heads=2, classes=1, pool="cls")
StateDict = dict[str, Tensor]


def rgb_model(seed: int = 0, **options: Any) -> ViT:
    """Return a model as its authors publish it: three channels, a normalised input and many classes."""
    torch.manual_seed(seed)
    model = ViT(replace(CONFIG, channels=3, classes=21, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def timm_state(model: ViT) -> StateDict:
    """Return the tensors as timm stores them: positions of the class token and of a square grid in one sequence."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    positions = 0.1 * torch.randn(1, 1, model.config.dim)
    state["cls_token"] -= positions
    state["pos_embed"] = torch.cat([positions, state["pos_embed"].flatten(1, 2)], dim=1)
    return state


def hugging_face_state(model: ViT, version_5: bool) -> StateDict:
    """Return the tensors under the names of transformers.

    These are the names of version 5 in memory (`vit.layers.0...`), or those that all versions write to disk
    (`vit.encoder.layer.0...`).
    """
    config = model.config
    peer = transformers.ViTForImageClassification(
        transformers.ViTConfig(  # type: ignore[call-arg]
            hidden_size=config.dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            intermediate_size=config.hidden,
            image_size=64,
            patch_size=16,
            num_labels=config.classes,
        )
    )
    layer, attention = ("layers", "attention.{}_proj") if version_5 else ("encoder.layer", "attention.attention.{}")
    names = {"attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    if not version_5:
        names = {"attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    names |= {"norm1": "layernorm_before", "norm2": "layernorm_after"}
    state = {}
    for name, tensor in timm_state(model).items():
        if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(.*)", name):
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                peer_part = attention.format(part[0] if version_5 else part)
                state[f"vit.{layer}.{match[1]}.{peer_part}.{match[2]}"] = third.clone()
        elif match := re.fullmatch(r"blocks\.(\d+)\.(.*)\.(weight|bias)", name):
            state[f"vit.{layer}.{match[1]}.{names[match[2]]}.{match[3]}"] = tensor
        elif name.startswith("head."):
            state[name.replace("head", "classifier")] = tensor
        else:
            name = name.replace("patch_embed.proj", "patch_embeddings.projection")
            name = name.replace("pos_embed", "position_embeddings")
            name = name.replace("norm", "layernorm") if name.startswith("norm") else f"embeddings.{name}"
            state[f"vit.{name}"] = tensor
    if version_5:
        assert state.keys() == peer.state_dict().keys()
    return state


def google_arrays(model: ViT) -> dict[str, np.ndarray]:
    """Return the arrays as Google's JAX code stores them, with the representation layer of in21k."""
    dim, heads = model.config.dim, model.config.heads
    arrays: dict[str, Tensor] = {"pre_logits/kernel": torch.randn(dim, dim), "pre_logits/bias": torch.randn(dim)}
    top_level_names = {
        "cls_token": "cls",
        "pos_embed": "Transformer/posembed_input/pos_embedding",
        "norm.weight": "Transformer/encoder_norm/scale",
        "norm.bias": "Transformer/encoder_norm/bias",
        "head.bias": "head/bias",
        "patch_embed.proj.bias": "embedding/bias",
    }
    block_names = {
        "norm1": "LayerNorm_0",
        "norm2": "LayerNorm_2",
        "mlp.fc1": "MlpBlock_3/Dense_0",
        "mlp.fc2": "MlpBlock_3/Dense_1",
    }
    for name, tensor in timm_state(model).items():
        if name in top_level_names:
            arrays[top_level_names[name]] = tensor
        elif name == "patch_embed.proj.weight":
            arrays["embedding/kernel"] = tensor.permute(2, 3, 1, 0)
        elif name == "head.weight":
            arrays["head/kernel"] = tensor.T
        else:
            match = re.fullmatch(r"blocks\.(\d+)\.(.*)\.(weight|bias)", name)
            block, part, leaf = match.groups()  # type: ignore[union-attr]
            prefix = f"Transformer/encoderblock_{block}/"
            attention = prefix + "MultiHeadDotProductAttention_1/"
            if part == "attn.qkv":
                for projection, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    shaped = third.T.reshape(dim, heads, -1) if leaf == "weight" else third.reshape(heads, -1)
                    arrays[f"{attention}{projection}/{'kernel' if leaf == 'weight' else 'bias'}"] = shaped
            elif part == "attn.proj":
                arrays[f"{attention}out/{'kernel' if leaf == 'weight' else 'bias'}"] = (
                    tensor.T.reshape(heads, -1, dim) if leaf == "weight" else tensor
                )
            else:
                kind = "scale" if "norm" in part else "kernel"
                if leaf == "bias":
                    kind = "bias"
                arrays[f"{prefix}{block_names[part]}/{kind}"] = tensor.T if kind == "kernel" else tensor
    return {name: tensor.contiguous().numpy() for name, tensor in arrays.items()}


def write(folder: Path, kind: str, model: ViT) -> Path:
    """Write `model` in the file format `kind` and return the path of the file."""
    state = timm_state(model)
    headless = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    if kind == "timm augreg .pth":
        torch.save(state, path := folder / "augreg.pth")
    elif kind == "timm in21k_ft_in1k .safetensors":
        save_file(state, path := folder / "in21k_ft_in1k.safetensors")
    elif kind == "jx in21k with pre_logits":
        pre_logits = {"pre_logits.fc.weight": torch.randn(32, 32), "pre_logits.fc.bias": torch.randn(32)}
        torch.save(state | pre_logits, path := folder / "jx_vit_base_patch16_224_in21k-e5005f0a.pth")
    elif kind == "DINO teacher":
        teacher = {f"backbone.{name}": tensor for name, tensor in headless.items()}
        teacher["head.mlp.0.weight"] = torch.randn(4, 32)
        torch.save({"teacher": teacher, "student": {}, "epoch": 3}, path := folder / "dino.pth")
    elif kind == "MAE":
        decoder = {
            name: torch.randn(1, 1, 16)
            for name in ("mask_token", "decoder_embed.weight", "decoder_blocks.0.norm1.bias")
        }
        torch.save({"model": headless | decoder}, path := folder / "mae_pretrain.pth")
    elif kind.startswith("Hugging Face"):
        save_file(hugging_face_state(model, version_5="5" in kind), path := folder / "model.safetensors")
    elif kind == "Google .npz":
        arrays: dict[str, Any] = google_arrays(model)
        np.savez(path := folder / "B_16.npz", **arrays)
    else:
        raise AssertionError(kind)
    return path


KINDS = {
    "timm augreg .pth": HALF_NORMALISATION,
    "timm in21k_ft_in1k .safetensors": HALF_NORMALISATION,
    "jx in21k with pre_logits": HALF_NORMALISATION,
    "DINO teacher": IMAGENET_NORMALISATION,
    "MAE": IMAGENET_NORMALISATION,
    "Hugging Face on disk": HALF_NORMALISATION,
    "Hugging Face 5 in memory": HALF_NORMALISATION,
    "Google .npz": HALF_NORMALISATION,
}


@torch.no_grad()
def tokens_of_rgb(model: ViT, grey: Tensor, normalisation: Normalisation) -> Tensor:
    """Return the authors' model's tokens of a grey image replicated to three channels and normalised."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in normalisation)
    return model.encode(model.embed((grey.expand(-1, 3, -1, -1) - mean) / std))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_grey_image_gives_the_tokens_of_its_rgb_copy(kind: str, tmp_path: Path) -> None:
    original = rgb_model()
    weights = load_weights(write(tmp_path, kind, original))
    assert weights.normalisation == KINDS[kind]
    model = ViT(CONFIG).eval()
    report = fit_weights(model, weights)
    grey = torch.rand(2, 1, 64, 64)
    assert (model.encode(model.embed(grey)) - tokens_of_rgb(original, grey, KINDS[kind])).abs().max() <= 1e-5
    assert report.tensors_by_action("folded") == ["patch_embed.proj.weight", "patch_embed.proj.bias"]
    assert report.tensors_by_action("fresh") == ["head.weight", "head.bias"]
    assert not report.tensors_by_action("resized")
    assert ("pre_logits" in " ".join(report.tensors_by_action("dropped"))) == (
        kind in ("jx in21k with pre_logits", "Google .npz")
    )


@pytest.mark.parametrize(
    "prefixed", ["no position (timm)", "position of the class token (Meta)", "positions of all prefix tokens"]
)
@torch.no_grad()
def test_dinov2_with_registers_and_layer_scale(prefixed: str, tmp_path: Path) -> None:
    original = rgb_model(registers=4, layer_scale=0.5)
    state = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    positions = 0.1 * torch.randn(1, {"n": 0, "p": 1}[prefixed[0]] + 4 * ("all" in prefixed), 32)
    state["cls_token"] -= positions[:, :1].sum(dim=1, keepdim=True)
    state["reg_token"] -= positions[:, 1:] if "all" in prefixed else 0.0
    state["pos_embed"] = torch.cat([positions, state["pos_embed"].flatten(1, 2)], dim=1)
    if "Meta" in prefixed:
        state["register_tokens"] = state.pop("reg_token")
    torch.save(state | {"mask_token": torch.zeros(1, 32)}, tmp_path / "dinov2_reg4.pth")
    model = ViT(replace(CONFIG, registers=4, layer_scale=1e-5)).eval()
    fit_weights(model, load_weights(tmp_path / "dinov2_reg4.pth"))
    grey = torch.rand(2, 1, 64, 64)
    assert (model.encode(model.embed(grey)) - tokens_of_rgb(original, grey, IMAGENET_NORMALISATION)).abs().max() <= 1e-5
    with pytest.raises(UsageError, match=r"ls1.gamma.*set layer_scale"):
        fit_weights(ViT(replace(CONFIG, registers=4)), load_weights(tmp_path / "dinov2_reg4.pth"))
    with pytest.raises(UsageError, match="set registers to 4"):
        fit_weights(ViT(replace(CONFIG, layer_scale=1.0)), load_weights(tmp_path / "dinov2_reg4.pth"))


@pytest.mark.parametrize("eps", [1e-6, 1e-12])  # ours, and transformers' own
@torch.no_grad()
def test_weights_saved_by_transformers_load_with_their_stated_normalisation_and_eps(eps: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(  # type: ignore[call-arg]
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=64,
        num_labels=7,
        layer_norm_eps=eps,
    )
    peer = transformers.ViTForImageClassification(config).eval()
    peer.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    weights = load_weights(tmp_path)
    assert weights.normalisation == Normalisation((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert load_weights(tmp_path, HALF_NORMALISATION).normalisation == HALF_NORMALISATION
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(VitmodelError, match=r"preprocessor_config.json: broken"):
        load_weights(tmp_path)
    with pytest.raises(UsageError, match="layer norms"):
        fit_weights(ViT(replace(CONFIG, classes=7, eps=1e-5)), weights)
    model = ViT(replace(CONFIG, classes=7, eps=weights.eps)).eval()
    assert "head.weight" in fit_weights(model, weights).tensors_by_action("loaded")
    grey = torch.rand(2, 1, 64, 64)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in weights.normalisation)
    assert (model(grey) - peer((grey.expand(-1, 3, -1, -1) - mean) / std).logits).abs().max() <= 1e-5


def test_configs_in_the_folder_determine_normalisation_and_compatibility(tmp_path: Path) -> None:
    timm = tmp_path / "dino-vits16"
    timm.mkdir()
    save_file(timm_state(rgb_model()), timm / "model.safetensors")
    assert load_weights(timm).normalisation == IMAGENET_NORMALISATION  # because of the folder's name
    (timm / "config.json").write_text(
        '{"architecture": "vit_small_patch16_224", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}}'
    )
    assert load_weights(timm).normalisation.mean == (0.1, 0.2, 0.3)
    (timm / "config.json").write_text('{"hidden_act": "relu"}')
    with pytest.raises(UsageError, match="relu"):
        load_weights(timm)
    networks = [Network(NetworkConfig(vit=replace(CONFIG, eps=1e-12))) for _ in range(2)]
    save_package(tmp_path / "one", networks[0], {}, "card")
    assert load_weights(tmp_path / "one").eps == 1e-12
    save_package(tmp_path / "folds", networks, {}, "card")
    with pytest.raises(UsageError, match=r"holds 2 models, one per fold.*fold_0"):
        load_weights(tmp_path / "folds")


def test_training_uses_the_layer_norm_eps_of_its_weights(tmp_path: Path) -> None:
    """Otherwise the trained network would not start from the function that the weights define."""
    micro = replace(PRESETS["vit_micro"], image_size=Size(64, 32))
    save_package(tmp_path / "given", Network(NetworkConfig(vit=replace(micro, eps=1e-12))), {}, "card")
    config = TrainConfig(manifest=tmp_path, run=tmp_path, model="vit_micro", weights=tmp_path / "given")
    model, _ = build_model(config, NetworkConfig(vit=micro), pd.DataFrame({"cancer": [0.0, 1.0]}))
    assert model.config.vit.eps == model.trunk.config.eps == 1e-12


def test_published_weights_initialise_the_trunk_and_all_other_parts_are_reported_as_fresh(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = timm_state(ViT(replace(PRESETS["vit_micro"], channels=3)))
    save_file(published, tmp_path / "vit.safetensors")
    config = TrainConfig(manifest=tmp_path, run=tmp_path, model="vit_micro", weights=tmp_path / "vit.safetensors")
    micro = replace(PRESETS["vit_micro"], image_size=Size(64, 64))
    views = Vocabulary("view", ("CC", "MLO"))
    network = NetworkConfig(
        vit=micro,
        exam=ExamConfig(views=views),
        sources=SourcesConfig(columns=(views,)),
        segments=SegmentsConfig(segments=64, segment_overlap=16),
    )
    model, report = build_model(config, network, pd.DataFrame({"cancer": [0.0, 1.0]}))
    assert report
    assert sum(report.to_dict()["tensors"].values()) == len(report.actions)
    for name, tensor in model.tensors().items():
        assert not name.startswith("blocks") or torch.equal(tensor, published[name])
    table = capsys.readouterr().out
    for name in ("sources", "exam", "segments"):
        count = sum(tensor.startswith(f"{name}.") for tensor in model.tensors())
        assert f"  fresh    {name} ({count} tensors)" in table


@torch.no_grad()
def test_positions_are_resized_and_norm_and_head_follow_the_model(tmp_path: Path) -> None:
    original = rgb_model()
    path = write(tmp_path, "jx in21k with pre_logits", original)
    model: Any = ViT(replace(CONFIG, image_size=Size(128, 48), pool="mean", registers=2, layer_scale=1e-5, classes=21))
    report = fit_weights(model, load_weights(path))
    assert torch.allclose(model.pos_embed, resize_positions(original.pos_embed, (8, 3)), atol=1e-6)
    assert torch.equal(model.fc_norm.weight, original.state_dict()["norm.weight"])
    assert report.tensors_by_action("resized") == ["pos_embed"]
    scales = {f"blocks.{block}.ls{branch}.gamma" for block in (0, 1) for branch in (1, 2)}
    assert set(report.tensors_by_action("fresh")) == {"head.weight", "head.bias", "reg_token"} | scales
    assert torch.equal(model.blocks[0].ls1.gamma, torch.ones(32))
    table = str(report)
    assert re.search(r"resized +pos_embed +4x4 -> 8x3", table)
    assert re.search(r"folded +patch_embed.proj.weight +3 channels -> 1.*mean 0.5, std 0.5 \(assumed", table)
    assert re.search(r"loaded +blocks \(24 tensors\)", table)


def test_a_different_stem_stays_fresh_and_the_blocks_load(tmp_path: Path) -> None:
    report = fit_weights(ViT(replace(CONFIG, stem="conv")), load_weights(write(tmp_path, "MAE", rgb_model())))
    assert {"patch_embed.proj.weight", "patch_embed.convs.0.weight"} <= set(report.tensors_by_action("fresh"))
    assert "blocks.1.mlp.fc2.weight" in report.tensors_by_action("loaded")


def test_a_file_without_class_token_leaves_it_fresh(tmp_path: Path) -> None:
    original = rgb_model(pool="mean")
    state = {name: tensor.clone() for name, tensor in original.state_dict().items() if name != "cls_token"}
    torch.save(state | {"pos_embed": state["pos_embed"].flatten(1, 2)}, tmp_path / "gap.pth")
    model = ViT(replace(CONFIG, pool="mean"))
    report = fit_weights(model, load_weights(tmp_path / "gap.pth"))
    assert set(report.tensors_by_action("fresh")) == {"cls_token", "head.weight", "head.bias"}
    assert torch.equal(model.pos_embed, original.pos_embed)


@pytest.mark.parametrize("kind", ["package", "Lightning checkpoint"])
def test_our_own_weights_load_without_folding(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Network(NetworkConfig(vit=replace(CONFIG, image_size=Size(128, 32), stem="conv")))
    trained = network.trunk  # 8x2 positions, as many as a square grid of 4x4
    if kind == "package":
        save_package(
            path := tmp_path / "package", network, {"calibration": {}}, "card"
        )  # calibrated: its head may be kept
    else:
        state = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
        state["loss.weight"] = torch.ones(1)
        checkpoint = {"state_dict": state, "pytorch-lightning_version": "2.6.0", "epoch": 3, "callbacks": {}}
        torch.save(checkpoint, path := tmp_path / "last.ckpt")
    model = ViT(trained.config)
    report = fit_weights(model, load_weights(path))
    for tensor, expected in zip(model.state_dict().values(), trained.state_dict().values(), strict=True):
        assert torch.equal(tensor, expected)
    assert set(report.tensors_by_action("loaded")) == model.state_dict().keys()
    assert report.tensors_by_action("dropped") == ([] if kind == "package" else ["loss.weight"])


class Payload:
    """An object whose pickle creates a folder when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.target),))


@pytest.mark.parametrize("name", ["evil.pth", "evil.ckpt", "legacy.pt", "evil.npz"])
def test_pickled_code_never_runs(name: str, tmp_path: Path) -> None:
    target = tmp_path / "pwned"
    if name == "evil.npz":
        np.savez(tmp_path / name, array=np.array([Payload(target)], dtype=object))
    elif name == "legacy.pt":
        (tmp_path / name).write_bytes(pickle.dumps(Payload(target)))
    else:
        torch.save({"state_dict": timm_state(rgb_model()), "extra": Payload(target)}, tmp_path / name)
    with pytest.raises(VitmodelError, match=name):
        load_weights(tmp_path / name)
    assert not target.exists()


def test_incompatible_weights_are_refused_by_tensor_name_and_change_nothing(tmp_path: Path) -> None:
    state = timm_state(rgb_model())
    misfits: dict[str, tuple[StateDict, str]] = {
        "resnet": (
            {"conv1.weight": torch.zeros(64, 3, 7, 7), "bn1.weight": torch.zeros(64)},
            r"no Vision .*conv1.weight \(64, 3, 7, 7\)",
        ),
        "clip": (state | {"norm_pre.weight": torch.ones(32)}, r"norm_pre.weight \(32,\).*CLIP"),
        "distilled": (state | {"dist_token": torch.ones(1, 1, 32)}, "distillation"),
        "shallow": (
            {name: tensor for name, tensor in state.items() if not name.startswith("blocks.1.")},
            "depth 1.*depth 2.*vit_micro",
        ),
        "gap": ({name: tensor for name, tensor in state.items() if name != "norm.weight"}, "lacks norm.weight"),
        "strange": (state | {"blocks.0.adapter.weight": torch.ones(2)}, r"blocks.0.adapter.weight \(2,\) has no place"),
        "oblong": (state | {"pos_embed": torch.zeros(1, 1 + 12, 32)}, r"pos_embed \(1, 13, 32\) is not a square"),
    }
    for name, (tensors, message) in misfits.items():
        torch.save(tensors, tmp_path / f"{name}.pth")
        model = ViT(CONFIG)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        with pytest.raises(UsageError, match=message):
            fit_weights(model, load_weights(tmp_path / f"{name}.pth"))
        assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    with torch.device("meta"):
        base = ViT(PRESETS["vit_base"])
        small = ViT(PRESETS["vit_small"])
        other_heads = ViT(replace(PRESETS["vit_base"], heads=8))
        large = timm_state(ViT(replace(PRESETS["vit_large"], channels=3)))
        dino = timm_state(ViT(replace(PRESETS["vit_small14"], channels=3)))
    weights = load_weights(write(tmp_path, "MAE", rgb_model()))
    with pytest.raises(UsageError, match=r"dim 1024, depth 24.*patch 16 \(vit_large\).*\(1024, 3, 16, 16\).*vit_base"):
        fit_weights(base, replace(weights, tensors=large))
    with pytest.raises(UsageError, match=r"patch 14 \(vit_small14\).*the model is.*patch 16 \(vit_small\)"):
        fit_weights(small, replace(weights, tensors=dino))
    with pytest.raises(UsageError, match="12 heads, not 8"):
        fit_weights(other_heads, replace(weights, tensors=base.state_dict() | {"pos_embed": torch.zeros(1, 197, 768)}))


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("absent.pth", UsageError),
        ("notes.txt", UsageError),
        ("cut.pth", VitmodelError),
        ("cut.safetensors", VitmodelError),
        ("cut.npz", VitmodelError),
    ],
)
def test_files_without_weights_are_refused_by_name(name: str, error: type[VitmodelError], tmp_path: Path) -> None:
    if name != "absent.pth":
        (tmp_path / name).write_bytes(b"PK\x03\x04 not weights")
    with pytest.raises(error, match=name):
        load_weights(tmp_path / name)


def same(one: Network, other: Network) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return one.config == other.config and all(torch.equal(a, b) for a, b in pairs)


def test_a_package_loads_the_saved_model_and_config(tmp_path: Path) -> None:
    for number, options in enumerate(
        ({"stem": "conv"}, {"pool": "attention", "registers": 2, "layer_scale": 0.1}, {"pool": "mean"})
    ):
        vit = replace(CONFIG, image_size=Size(64, 32), **options)  # type: ignore[arg-type]
        model = Network(NetworkConfig(vit=vit))
        extra = {"threshold": 0.25, "preprocessing": '{"size": "64x32"}', "auroc": float("nan"), "number": number}
        save_package(tmp_path / "package", model, extra, "# Card")
        loaded, config = load_package(tmp_path / "package")
        assert same(model, loaded)
        assert not loaded.training
        assert all(parameter.requires_grad and parameter.device.type == "cpu" for parameter in loaded.parameters())
        assert config == extra | {"auroc": None}
    assert sorted(path.name for path in (tmp_path / "package").iterdir()) == [
        "MODEL_CARD.md",
        "config.json",
        "model.safetensors",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


def test_a_failed_or_killed_replacement_leaves_the_old_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = Network(NetworkConfig(vit=CONFIG)), Network(NetworkConfig(vit=CONFIG))
    folder = tmp_path / "package"
    save_package(folder, old, {"is": "old"}, "card")
    rename = Path.rename

    def fail_to_rename_the_new_package(error: BaseException) -> None:
        def failing(self: Path, target: Path) -> Path:
            if self.parent.parent == tmp_path and self.name == "package":
                raise error
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", failing)

    fail_to_rename_the_new_package(OSError(28, "No space left on device"))
    with pytest.raises(VitmodelError, match="No space left"):
        save_package(folder, new, {"is": "new"}, "card")
    assert [path.name for path in tmp_path.iterdir()] == ["package"]
    assert load_package(folder)[1] == {"is": "old"}
    fail_to_rename_the_new_package(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        save_package(folder, new, {"is": "new"}, "card")
    assert same(old, load_package(folder)[0])
    monkeypatch.undo()
    save_package(folder, new, {"is": "new"}, "card")
    assert [path.name for path in tmp_path.iterdir()] == ["package"]
    assert load_package(folder)[1] == {"is": "new"}


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not lose me")
    with pytest.raises(UsageError, match="not a model package"):
        save_package(tmp_path, Network(NetworkConfig(vit=CONFIG)), {}, "card")
    assert (tmp_path / "thesis.txt").read_text() == "do not lose me"


def test_unusable_packages_are_refused_naming_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "package"
    save_package(folder, Network(NetworkConfig(vit=CONFIG)), {}, "card")
    tensors = (folder / package.TENSORS_FILE).read_bytes()
    text = (folder / package.CONFIG_FILE).read_text()
    document = json.loads(text)

    def check_refused_then_restore(message: str, error: type[VitmodelError] = VitmodelError) -> None:
        with pytest.raises(error, match=message):
            load_package(folder)
        (folder / package.TENSORS_FILE).write_bytes(tensors)
        (folder / package.CONFIG_FILE).write_text(text)
        load_package(folder)

    def change_config(**values: Any) -> None:
        package.seal(folder, document | values)

    change_config(format_version=99)
    check_refused_then_restore("config.json: format_version 99")
    change_config(architecture=document["architecture"] | {"rotary": True})
    check_refused_then_restore("config.json: architecture: .*rotary")
    change_config(architecture=document["architecture"] | {"dim": 64})
    check_refused_then_restore("config.json: architecture: needs .* but model.safetensors has")
    (folder / package.CONFIG_FILE).write_text(text[:-20])
    check_refused_then_restore("config.json: broken")
    old = {key: value for key, value in document.items() if key != "integrity"}  # of a version without digests

    def write_old(content: bytes) -> None:
        (folder / package.CONFIG_FILE).write_text(json.dumps(old))
        (folder / package.TENSORS_FILE).write_bytes(content)

    write_old(tensors[:-100])
    check_refused_then_restore("model.safetensors: broken")
    write_old(b"")
    check_refused_then_restore("model.safetensors: broken")
    write_old(save(dict(list(load_file(folder / package.TENSORS_FILE).items())[1:])))
    check_refused_then_restore("config.json: architecture: needs .* no such tensor")
    (folder / package.TENSORS_FILE).unlink()
    check_refused_then_restore("model.safetensors is missing", UsageError)


def test_weights_in_other_containers_are_read(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.arange(4.0), "b": torch.ones(2, 2)}
    torch.save({"model_state_dict": tensors, "epoch": 3}, tmp_path / "wrapped.pt")
    save_file(tensors, tmp_path / "renamed.safetensors")
    (tmp_path / "renamed.safetensors").rename(tmp_path / "renamed.bin")
    save_file({"a.weight": tensors["a.weight"]}, tmp_path / "1.safetensors")
    save_file({"b": tensors["b"]}, tmp_path / "2.safetensors")
    index = tmp_path / SHARD_INDEX
    index.write_text(json.dumps({"weight_map": {"a.weight": "1.safetensors", "b": "2.safetensors"}}))
    for path in (tmp_path / "wrapped.pt", tmp_path / "renamed.bin", index):
        read = read_tensors(path)
        assert set(read) == set(tensors)
        assert all(read[name].equal(tensors[name]) for name in tensors)
    index.write_text(json.dumps({"weight_map": {"b": "../2.safetensors"}}))
    with pytest.raises(VitmodelError, match="is not a file next to the index"):
        read_tensors(index)


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])}, tmp_path / "w.safetensors")
    with pytest.raises(VitmodelError, match="tensor b has values that are not finite"):
        read_tensors(tmp_path / "w.safetensors")


def test_the_only_dictionary_of_tensors_is_found_under_any_key(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2)}
    state = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}
    torch.save({"backbone_weights": tensors, "optimizer": state, "epoch": 3}, tmp_path / "one.pt")
    assert read_tensors(tmp_path / "one.pt")["a"].equal(tensors["a"])
    torch.save({"student": tensors, "other": tensors}, tmp_path / "two.pt")
    with pytest.raises(VitmodelError, match="student, other"):
        read_tensors(tmp_path / "two.pt")


@pytest.mark.parametrize(
    ("content", "problem"), [("version https://git-lfs.github.com/spec/v1", "Git LFS"), ("<!DOCTYPE html>", "web page")]
)
def test_files_downloaded_instead_of_weights_are_named(content: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text(content)
    with pytest.raises(VitmodelError, match=problem):
        read_tensors(tmp_path / "model.safetensors")


@pytest.mark.parametrize("start", [b"", b"\x80\x02c", b"\x35\0\0\0\0\0\0\0[", b"PK\x03\x04"])
def test_a_file_of_any_other_bytes_is_refused(start: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(start + bytes(range(256)))
    with pytest.raises(VitmodelError, match=r"w\.bin"):
        read_tensors(tmp_path / "w.bin")
