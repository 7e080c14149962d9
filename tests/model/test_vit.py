"""The ViT equals two independent implementations, and stays itself under every way to run it."""

from __future__ import annotations

import functools
import importlib
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torchvision_stub import torchvision_stub

from vitmodel.config import Size
from vitmodel.errors import UsageError
from vitmodel.model import device
from vitmodel.model.architecture import PRESETS, ViTConfig
from vitmodel.model.packed_attention import forward
from vitmodel.model.packed_batch import pack_images
from vitmodel.model.vit import SequenceLayout, ViT, patchify, resize_positions
from vitmodel.model.weight_files import to_timm
from vitmodel.model.weights import HALF_NORMALISATION, PretrainedWeights, fit_weights

SMALL = ViTConfig(image_size=Size(48, 32), dim=32, depth=3, heads=2, classes=3, pool="cls")


def build(config: ViTConfig, seed: int = 0) -> ViT:
    """A model in evaluation mode, perturbed so that no parameter hides behind an initial 0 or 1."""
    torch.manual_seed(seed)
    return perturb(ViT(config))


def perturb(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def adopt(config: ViTConfig, state: dict[str, Tensor]) -> ViT:
    """Our model with a peer's weights; the peer has one channel and no normalisation, so that nothing is folded."""
    with torch.device("meta"):
        model = ViT(config)
    model = model.to_empty(device="cpu")
    tensors, outside = to_timm(state)
    if config.grid[0] != config.grid[1]:  # only we know the grid of a rectangular peer
        tensors["cls_token"] = tensors["cls_token"] + tensors["pos_embed"][:, :1]
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:].unflatten(1, config.grid)
    report = fit_weights(model, PretrainedWeights(Path("peer"), tensors, outside, HALF_NORMALISATION, "test"))
    assert set(report.tensors_by_action("fresh")) <= {"head.weight", "head.bias"}  # which DINOv2 has not
    return model.eval()


def difference(ours: Tensor, peer: Tensor) -> float:
    assert ours.shape == peer.shape
    assert peer.abs().max() > 1e-3
    return (ours - peer).abs().max().item()


@pytest.mark.parametrize(
    ("preset", "patch", "size"),
    [
        ("vit_tiny", 16, (224, 224)),
        ("vit_tiny", 8, (64, 64)),
        ("vit_tiny", 14, (98, 42)),
        ("vit_small", 16, (64, 160)),
        ("vit_base", 16, (96, 96)),
        ("vit_large", 16, (64, 32)),
        ("vit_small", 8, (40, 24)),
        ("vit_base", 14, (56, 56)),
        ("vit_large", 14, (28, 70)),
    ],
)
@torch.no_grad()
def test_all_tokens_and_logits_equal_transformers(preset: str, patch: int, size: tuple[int, int]) -> None:
    depth = min(4, PRESETS[preset].depth)  # all blocks are alike, and the test stays fast
    config = replace(PRESETS[preset], depth=depth, patch=patch, image_size=Size(*size), classes=3, pool="cls")
    with torch.device("meta"):  # initial values are not worth their time
        peer = transformers.ViTForImageClassification(transformers.ViTConfig(  # type: ignore[call-arg]
            hidden_size=config.dim, num_hidden_layers=config.depth, num_attention_heads=config.heads, intermediate_size=config.hidden,
            image_size=size, patch_size=patch, num_channels=1, num_labels=3, layer_norm_eps=config.eps))  # fmt: skip
    peer = peer.to_empty(device="cpu").eval()
    torch.manual_seed(0)
    for name, parameter in peer.named_parameters():
        parameter.uniform_(-0.05, 0.05).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    model = adopt(config, peer.state_dict())
    images = torch.rand(2, 1, *size)
    result = peer(images, output_hidden_states=True)
    tokens = model.embed(images)
    assert difference(tokens, result.hidden_states[0]) <= 1e-5
    assert difference(model.encode(tokens), peer.vit.layernorm(result.hidden_states[-1])) <= 1e-5
    assert difference(model(images), result.logits) <= 1e-5


@torch.no_grad()
def test_registers_and_layer_scale_equal_transformers_dinov2() -> None:
    config = replace(SMALL, image_size=Size(56, 56), patch=14, registers=4, layer_scale=1.0)
    torch.manual_seed(0)
    peer = perturb(transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(
        hidden_size=config.dim, num_hidden_layers=config.depth, num_attention_heads=config.heads, image_size=56, patch_size=14,
        num_channels=1)))  # fmt: skip
    images = torch.rand(2, 1, 56, 56)
    model = adopt(config, peer.state_dict())
    assert difference(model.encode(model.embed(images)), peer(images).last_hidden_state) <= 1e-5


@pytest.fixture(scope="module")
def timm() -> Any:
    """timm, installed by `make` without torchvision. It is required, so that these tests never skip."""
    with torchvision_stub():
        return importlib.import_module("timm")


@pytest.mark.parametrize(
    ("preset", "patch", "size", "pool", "theirs"),
    [
        ("vit_tiny", 16, (96, 64), "cls", "token"),
        ("vit_tiny", 8, (64, 64), "mean", "avg"),
        ("vit_small", 14, (70, 98), "attention", "map"),
        ("vit_base", 16, (64, 64), "cls", "token"),
        ("vit_large", 14, (56, 28), "cls", "token"),
    ],
)
@torch.no_grad()
def test_all_tokens_and_logits_equal_timm(
    timm: Any, preset: str, patch: int, size: tuple[int, int], pool: Any, theirs: str
) -> None:
    depth = min(4, PRESETS[preset].depth)  # all blocks are alike, and the test stays fast
    config = replace(PRESETS[preset], depth=depth, patch=patch, image_size=Size(*size), classes=3, pool=pool)
    torch.manual_seed(0)
    peer = perturb(timm.models.vision_transformer.VisionTransformer(
        img_size=config.image_size, patch_size=patch, in_chans=1, num_classes=3, embed_dim=config.dim, depth=config.depth,
        num_heads=config.heads, global_pool=theirs))  # fmt: skip
    model = adopt(config, peer.state_dict())
    assert model.state_dict().keys() == peer.state_dict().keys()
    images = torch.rand(2, 1, *size)
    assert difference(model.encode(model.embed(images)), peer.forward_features(images)) <= 1e-5
    assert difference(model(images), peer(images)) <= 1e-5


@pytest.mark.parametrize("grid", [(14, 14), (64, 32), (7, 20), (3, 2)])
def test_positions_resize_as_timms(timm: Any, grid: tuple[int, int]) -> None:
    positions = torch.randn(1, 14, 14, 8)
    theirs = timm.layers.resample_abs_pos_embed(positions.flatten(1, 2), list(grid), [14, 14], num_prefix_tokens=0)
    assert torch.equal(resize_positions(positions, grid).flatten(1, 2), theirs)


def test_positions_resize_separably_and_without_aliasing() -> None:
    """Independent of timm: bicubic resizing reproduces a plane away from the edges, and shrinking averages a checkerboard away."""
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    plane = torch.stack([rows, columns, rows + columns], dim=-1)[None]
    twice = resize_positions(plane, (32, 48))
    expected = torch.stack(
        torch.meshgrid((torch.arange(32) + 0.5) / 2 - 0.5, (torch.arange(48) + 0.5) / 3 - 0.5, indexing="ij"), dim=-1
    )
    assert torch.allclose(twice[0, 6:-6, 8:-8, :2], expected[6:-6, 8:-8], atol=1e-4)
    checkerboard = ((rows + columns) % 2)[None, ..., None]
    assert (resize_positions(checkerboard, (4, 4)) - 0.5).abs().max() < 0.05


@torch.no_grad()
def test_other_image_sizes_take_resized_positions() -> None:
    model = build(SMALL)
    other = ViT(replace(SMALL, image_size=Size(80, 64))).eval()
    other.load_state_dict(model.state_dict() | {"pos_embed": resize_positions(model.pos_embed, (5, 4))})
    images = torch.rand(2, 1, 80, 64)
    assert torch.equal(model(images), other(images))


@torch.no_grad()
def test_patches_alone_project_as_the_convolution_does() -> None:
    model = build(SMALL)
    images = torch.rand(2, 1, 48, 32)
    stem: Any = model.patch_embed
    embed_conv_stem = stem.proj(images).flatten(2).transpose(1, 2)
    some = torch.tensor([4, 1])
    assert torch.allclose(model.patch_embed(images), embed_conv_stem, atol=1e-6)
    assert torch.allclose(stem.project(patchify(images, 16)[:, some]), embed_conv_stem[:, some], atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"stem": "conv"}, {"pool": "mean", "registers": 2}, {"pool": "attention", "layer_scale": 0.1}],
    ids=str,
)
def test_every_parameter_has_a_finite_gradient(options: dict[str, Any]) -> None:
    model = build(replace(SMALL, **options)).train()
    F.cross_entropy(model(torch.rand(4, 1, 48, 32)), torch.tensor([0, 1, 2, 0])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert 0 < parameter.grad.abs().max() < float("inf"), name


@torch.no_grad()
def test_images_do_not_influence_each_other() -> None:
    for config in (replace(SMALL, stem="conv"), replace(SMALL, pool="attention")):
        model = build(config)
        images = torch.rand(3, 1, 48, 32)
        assert torch.allclose(model(images)[1:2], model(images[1:2]), atol=1e-6)


@torch.no_grad()
def test_stochastic_depth_skips_whole_branches_and_keeps_the_mean() -> None:
    block: Any = build(replace(SMALL, drop_path=0.5)).blocks[-1]
    x = torch.randn(1, 1, 32).expand(2000, -1, -1)
    assert (
        len(block.train()(x, SequenceLayout()).flatten(1).unique(dim=0)) == 4
    )  # attention kept or not x MLP kept or not
    block.mlp.fc2.weight.zero_()
    block.mlp.fc2.bias.zero_()
    kept = block.eval()(x, SequenceLayout())[0]
    assert torch.allclose(
        block.train()(x, SequenceLayout()).mean(dim=0), kept, atol=0.1 * (kept - x[0]).abs().max().item()
    )


@torch.no_grad()
def test_attention_weights_are_those_that_attention_uses() -> None:
    attention: Any = build(SMALL).blocks[0].attn
    x = torch.randn(2, 7, 32)
    weights = attention.attention_weights(x)
    assert torch.allclose(weights.sum(dim=-1), torch.ones(2, 2, 7))
    values = attention.project_qkv(x)[2]
    assert torch.allclose(
        attention.proj((weights @ values).transpose(1, 2).flatten(2)), attention(x, SequenceLayout()), atol=1e-6
    )


class Pack(SequenceLayout):
    """Two images in one row."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = lengths

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        each = zip(*(x.split(self.lengths, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*qkv) for qkv in each], dim=2)


@torch.no_grad()
def test_many_images_in_one_row_need_only_another_layout() -> None:
    model = build(replace(SMALL, registers=1))
    one, other = model.embed(torch.rand(1, 1, 48, 32)), model.embed(torch.rand(1, 1, 16, 80))
    packed = model.encode(torch.cat([one, other], dim=1), Pack(one.shape[1], other.shape[1]))
    alone = torch.cat([model.encode(one), model.encode(other)], dim=1)
    assert difference(packed, alone) <= 1e-5


def gradients(model: ViT, images: Tensor) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    model(images).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_checkpointing_changes_no_gradient_even_with_stochastic_depth() -> None:
    model = build(replace(SMALL, drop_path=0.5)).train()
    images = torch.rand(4, 1, 48, 32)
    plain = gradients(model, images)
    model.gradient_checkpointing = True
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(model, images), strict=True))


@pytest.mark.parametrize("options", [{}, {"pool": "attention", "layer_scale": 1.0}], ids=str)
def test_whose_matrix_products_run_changes_nothing_but_rounding(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = build(replace(SMALL, dim=96, **options)), torch.rand(2, 1, 48, 32)
    found = []
    for mkl_is_slow in (True, False):
        monkeypatch.setattr(device, "mkl_is_slow", functools.partial(bool, mkl_is_slow))
        found.append([model(images).detach(), *gradients(model, images)])
    for here, there in zip(*found, strict=True):
        assert (here - there).abs().max() <= 1e-5 * max(1, there.abs().max().item())


@torch.no_grad()
def test_bfloat16_autocast_stays_close() -> None:
    model = build(replace(SMALL, registers=2))
    images = torch.rand(2, 1, 48, 32)
    exact = model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(images)
    assert 0 < difference(rough.float(), exact) <= 0.02 * exact.abs().max().item()


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    model = build(replace(SMALL, depth=2))
    images = torch.rand(2, 1, 48, 32)
    try:
        with torch.no_grad():
            compiled = torch.compile(model, fullgraph=True)(images)
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"torch.compile needs a C++ compiler here: {error}")
    exact = forward(model, pack_images(list(images), 16))
    assert difference(compiled, exact) <= 1e-5
    gradients = torch.autograd.grad(exact.sum(), list(model.parameters()))
    for block in model.blocks:
        block.compile(dynamic=True)  # as `--compile` does
    again = forward(model, pack_images(list(images), 16))
    assert difference(again, exact) <= 1e-5
    for mine, exactly in zip(torch.autograd.grad(again.sum(), list(model.parameters())), gradients, strict=True):
        assert (mine - exactly).abs().max() <= 1e-5 * max(1, exactly.abs().max())


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure for minutes")
def test_the_benchmark_of_cuda_says_that_there_is_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = Path(__file__).parents[2] / "benchmarks" / "vit.py"
    monkeypatch.setattr("sys.argv", [str(benchmark), "cuda", "--threads", str(torch.get_num_threads())])
    runpy.run_path(str(benchmark), run_name="__main__")
    assert "no CUDA device here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 8, 32), "smaller than a patch"),
        ((1, 1, 50, 32), "48x32"),
        ((1, 3, 48, 32), "B x 1 x H x W"),
        ((1, 48, 32), "B x 1 x H x W"),
    ],
)
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ViT(SMALL)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("field", "value"),
    [("heads", 3), ("depth", 0), ("pool", "max"), ("stem", "hybrid"), ("registers", -1), ("drop_path", 1.0), ("mlp_ratio", 0.0),
     ("image_size", Size(10, 100))],
)  # fmt: skip
def test_impossible_architectures_are_refused_by_field(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=field):
        replace(SMALL, **{field: value})
    with pytest.raises(UsageError, match="stem"):
        replace(SMALL, stem="conv", patch=14, image_size=Size(28, 28))


def test_config_survives_plain_values() -> None:
    config = replace(SMALL, stem="conv", layer_scale=1e-5)
    assert ViTConfig.from_dict(config.to_dict()) == config
    with pytest.raises(UsageError, match="widht"):
        ViTConfig.from_dict(config.to_dict() | {"widht": 3})
