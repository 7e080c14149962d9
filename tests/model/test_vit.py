"""The ViT equals two independent implementations, and every execution mode gives the same results."""

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
    """Return a ViT in evaluation mode whose parameters all differ from their initial 0 or 1."""
    torch.manual_seed(seed)
    return perturb(ViT(config))


def perturb(model: Any) -> Any:
    """Add noise to all parameters and return the model in evaluation mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def with_weights_of(config: ViTConfig, state: dict[str, Tensor]) -> ViT:
    """Return our ViT with the weights of a peer, which has one channel and no input normalisation to fold."""
    with torch.device("meta"):
        model = ViT(config)
    model = model.to_empty(device="cpu")
    tensors, unused_names = to_timm(state)
    if config.grid[0] != config.grid[1]:  # the grid of a rectangular peer cannot be read from its weights
        tensors["cls_token"] = tensors["cls_token"] + tensors["pos_embed"][:, :1]
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:].unflatten(1, config.grid)
    report = fit_weights(model, PretrainedWeights(Path("peer"), tensors, unused_names, HALF_NORMALISATION, "test"))
    assert set(report.tensors_by_action("fresh")) <= {"head.weight", "head.bias"}  # DINOv2 has no head
    return model.eval()


def difference(ours: Tensor, peer: Tensor) -> float:
    """Return the largest absolute difference; the reference must not be all zeros."""
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
    depth = min(4, PRESETS[preset].depth)  # all blocks are alike, and fewer keep the test fast
    config = replace(PRESETS[preset], depth=depth, patch=patch, image_size=Size(*size), classes=3, pool="cls")
    with torch.device("meta"):  # initial values would be overwritten
        peer = transformers.ViTForImageClassification(transformers.ViTConfig(  # type: ignore[call-arg]
            hidden_size=config.dim, num_hidden_layers=config.depth, num_attention_heads=config.heads,
            intermediate_size=config.hidden, image_size=size, patch_size=patch, num_channels=1, num_labels=3,
            layer_norm_eps=config.eps))  # fmt: skip
    peer = peer.to_empty(device="cpu").eval()
    torch.manual_seed(0)
    for name, parameter in peer.named_parameters():
        parameter.uniform_(-0.05, 0.05).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    model = with_weights_of(config, peer.state_dict())
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
        hidden_size=config.dim, num_hidden_layers=config.depth, num_attention_heads=config.heads, image_size=56,
        patch_size=14, num_channels=1)))  # fmt: skip
    images = torch.rand(2, 1, 56, 56)
    model = with_weights_of(config, peer.state_dict())
    assert difference(model.encode(model.embed(images)), peer(images).last_hidden_state) <= 1e-5


@pytest.fixture(scope="module")
def timm() -> Any:
    """Import timm, which `make` installs without torchvision. It is required, so that these tests are never skipped."""
    with torchvision_stub():
        return importlib.import_module("timm")


@pytest.mark.parametrize(
    ("preset", "patch", "size", "pool", "timm_pool"),
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
    timm: Any, preset: str, patch: int, size: tuple[int, int], pool: Any, timm_pool: str
) -> None:
    depth = min(4, PRESETS[preset].depth)  # all blocks are alike, and fewer keep the test fast
    config = replace(PRESETS[preset], depth=depth, patch=patch, image_size=Size(*size), classes=3, pool=pool)
    torch.manual_seed(0)
    peer = perturb(timm.models.vision_transformer.VisionTransformer(
        img_size=config.image_size, patch_size=patch, in_chans=1, num_classes=3, embed_dim=config.dim,
        depth=config.depth, num_heads=config.heads, global_pool=timm_pool))  # fmt: skip
    model = with_weights_of(config, peer.state_dict())
    assert model.state_dict().keys() == peer.state_dict().keys()
    images = torch.rand(2, 1, *size)
    assert difference(model.encode(model.embed(images)), peer.forward_features(images)) <= 1e-5
    assert difference(model(images), peer(images)) <= 1e-5


@pytest.mark.parametrize("grid", [(14, 14), (64, 32), (7, 20), (3, 2)])
def test_positions_are_resized_as_in_timm(timm: Any, grid: tuple[int, int]) -> None:
    positions = torch.randn(1, 14, 14, 8)
    expected = timm.layers.resample_abs_pos_embed(positions.flatten(1, 2), list(grid), [14, 14], num_prefix_tokens=0)
    assert torch.equal(resize_positions(positions, grid).flatten(1, 2), expected)


def test_resizing_positions_preserves_planes_and_avoids_aliasing() -> None:
    """Enlarging reproduces a plane away from the edges, and shrinking averages a checkerboard; independent of timm."""
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    plane = torch.stack([rows, columns, rows + columns], dim=-1)[None]
    enlarged = resize_positions(plane, (32, 48))
    source_rows = (torch.arange(32) + 0.5) / 2 - 0.5
    source_columns = (torch.arange(48) + 0.5) / 3 - 0.5
    expected = torch.stack(torch.meshgrid(source_rows, source_columns, indexing="ij"), dim=-1)
    assert torch.allclose(enlarged[0, 6:-6, 8:-8, :2], expected[6:-6, 8:-8], atol=1e-4)
    checkerboard = ((rows + columns) % 2)[None, ..., None]
    assert (resize_positions(checkerboard, (4, 4)) - 0.5).abs().max() < 0.05


@torch.no_grad()
def test_other_image_sizes_use_resized_positions() -> None:
    model = build(SMALL)
    other = ViT(replace(SMALL, image_size=Size(80, 64))).eval()
    other.load_state_dict(model.state_dict() | {"pos_embed": resize_positions(model.pos_embed, (5, 4))})
    images = torch.rand(2, 1, 80, 64)
    assert torch.equal(model(images), other(images))


@torch.no_grad()
def test_projecting_patches_equals_the_convolution() -> None:
    model = build(SMALL)
    images = torch.rand(2, 1, 48, 32)
    stem: Any = model.patch_embed
    convolved = stem.proj(images).flatten(2).transpose(1, 2)
    subset = torch.tensor([4, 1])
    assert torch.allclose(model.patch_embed(images), convolved, atol=1e-6)
    assert torch.allclose(stem.project(patchify(images, 16)[:, subset]), convolved[:, subset], atol=1e-6)


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
def test_images_of_a_batch_are_independent() -> None:
    for config in (replace(SMALL, stem="conv"), replace(SMALL, pool="attention")):
        model = build(config)
        images = torch.rand(3, 1, 48, 32)
        assert torch.allclose(model(images)[1:2], model(images[1:2]), atol=1e-6)


@torch.no_grad()
def test_stochastic_depth_skips_whole_branches_and_keeps_the_mean() -> None:
    block: Any = build(replace(SMALL, drop_path=0.5)).blocks[-1]
    x = torch.randn(1, 1, 32).expand(2000, -1, -1)
    distinct_outputs = block.train()(x, SequenceLayout()).flatten(1).unique(dim=0)
    assert len(distinct_outputs) == 4  # attention kept or not, times MLP kept or not
    block.mlp.fc2.weight.zero_()
    block.mlp.fc2.bias.zero_()
    expected = block.eval()(x, SequenceLayout())[0]
    mean = block.train()(x, SequenceLayout()).mean(dim=0)
    assert torch.allclose(mean, expected, atol=0.1 * (expected - x[0]).abs().max().item())


@torch.no_grad()
def test_attention_weights_reproduce_the_attention_output() -> None:
    attention: Any = build(SMALL).blocks[0].attn
    x = torch.randn(2, 7, 32)
    weights = attention.attention_weights(x)
    assert torch.allclose(weights.sum(dim=-1), torch.ones(2, 2, 7))
    values = attention.project_qkv(x)[2]
    output = attention.proj((weights @ values).transpose(1, 2).flatten(2))
    assert torch.allclose(output, attention(x, SequenceLayout()), atol=1e-6)


class OneRowLayout(SequenceLayout):
    """Images in one row of tokens."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = lengths

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slices = zip(*(x.split(self.lengths, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*qkv) for qkv in slices], dim=2)


@torch.no_grad()
def test_a_layout_is_enough_to_encode_many_images_in_one_row() -> None:
    model = build(replace(SMALL, registers=1))
    first = model.embed(torch.rand(1, 1, 48, 32))
    second = model.embed(torch.rand(1, 1, 16, 80))
    packed = model.encode(torch.cat([first, second], dim=1), OneRowLayout(first.shape[1], second.shape[1]))
    separate = torch.cat([model.encode(first), model.encode(second)], dim=1)
    assert difference(packed, separate) <= 1e-5


def gradients(model: ViT, images: Tensor) -> list[Tensor]:
    """Return the gradients of a fixed loss; the random numbers are the same in every call."""
    model.zero_grad()
    torch.manual_seed(1)
    model(images).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_checkpointing_changes_no_gradient_even_with_stochastic_depth() -> None:
    model = build(replace(SMALL, drop_path=0.5)).train()
    images = torch.rand(4, 1, 48, 32)
    expected = gradients(model, images)
    model.gradient_checkpointing = True
    assert all(torch.equal(a, b) for a, b in zip(expected, gradients(model, images), strict=True))


@pytest.mark.parametrize("options", [{}, {"pool": "attention", "layer_scale": 1.0}], ids=str)
def test_onednn_and_mkl_differ_only_by_rounding(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(replace(SMALL, dim=96, **options))
    images = torch.rand(2, 1, 48, 32)
    results = []
    for mkl_is_slow in (True, False):
        monkeypatch.setattr(device, "mkl_is_slow", functools.partial(bool, mkl_is_slow))
        results.append([model(images).detach(), *gradients(model, images)])
    for onednn, mkl in zip(*results, strict=True):
        assert (onednn - mkl).abs().max() <= 1e-5 * max(1, mkl.abs().max().item())


@torch.no_grad()
def test_bfloat16_autocast_is_close_to_float32() -> None:
    model = build(replace(SMALL, registers=2))
    images = torch.rand(2, 1, 48, 32)
    exact = model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        approximate = model(images)
    assert 0 < difference(approximate.float(), exact) <= 0.02 * exact.abs().max().item()


@pytest.mark.nightly
def test_compiled_equals_eager() -> None:
    model = build(replace(SMALL, depth=1))
    images = torch.rand(2, 1, 48, 32)
    try:
        with torch.no_grad():
            compiled = torch.compile(model, fullgraph=True)(images)
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"torch.compile needs a C++ compiler here: {error}")
    eager = forward(model, pack_images(list(images), 16))
    assert difference(compiled, eager) <= 1e-5
    parameters = list(model.parameters())
    expected_gradients = torch.autograd.grad(eager.sum(), parameters)
    for block in model.blocks:
        block.compile(dynamic=True)  # as `--compile` does
    packed = forward(model, pack_images(list(images), 16))
    assert difference(packed, eager) <= 1e-5
    for gradient, expected in zip(torch.autograd.grad(packed.sum(), parameters), expected_gradients, strict=True):
        assert (gradient - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the benchmark runs for minutes")
def test_the_cuda_benchmark_reports_a_missing_device(
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
        ((1, 3, 48, 32), r"\(B, 1, H, W\)"),
        ((1, 48, 32), r"\(B, 1, H, W\)"),
    ],
)
def test_images_of_a_wrong_shape_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ViT(SMALL)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("heads", 3),
        ("depth", 0),
        ("pool", "max"),
        ("stem", "hybrid"),
        ("registers", -1),
        ("drop_path", 1.0),
        ("mlp_ratio", 0.0),
        ("image_size", Size(10, 100)),
    ],
)
def test_impossible_architectures_are_refused_and_the_field_is_named(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=field):
        replace(SMALL, **{field: value})
    with pytest.raises(UsageError, match="stem"):
        replace(SMALL, stem="conv", patch=14, image_size=Size(28, 28))


def test_a_config_is_restored_from_its_plain_values() -> None:
    config = replace(SMALL, stem="conv", layer_scale=1e-5)
    assert ViTConfig.from_dict(config.to_dict()) == config
    with pytest.raises(UsageError, match="widht"):
        ViTConfig.from_dict(config.to_dict() | {"widht": 3})
