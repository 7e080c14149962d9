"""Packed images equal single images up to rounding, groups keep their token budget, unusable images are named."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
import torch.nn.functional as F
from fixture_types import MakeOnce
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitmodel.cli import main
from vitmodel.commands.etl import etl
from vitmodel.config import AugmentConfig, ETLConfig, PredictorConfig, Preprocessing, Size, TrainConfig
from vitmodel.data.dataset import CropDataset, crop_size
from vitmodel.data.manifest import read_manifest, usable_rows
from vitmodel.data.samplers import EpochSampler
from vitmodel.errors import ImageRefusedError, UsageError
from vitmodel.model.architecture import ViTConfig
from vitmodel.model.packed_attention import PackedLayout, attention, attention_maps, compile_blocks, forward
from vitmodel.model.packed_batch import PackedBatch, best_fit_groups, pack_images
from vitmodel.model.vit import DENSE_LAYOUT, ViT
from vitmodel.pixels.preprocessing import preprocess
from vitmodel.scoring.predictor import Predictor
from vitmodel.training.batching import BatchLoader

SMALL = ViTConfig(image_size=Size(48, 32), dim=32, depth=3, heads=2, classes=3)
VARIANTS: list[dict[str, Any]] = [
    {"pool": "cls"},
    {"pool": "mean", "registers": 2},
    {"pool": "attention", "layer_scale": 0.1},
    {"pool": "mean", "stem": "conv"},
]


def build(**options: Any) -> ViT:
    """Return a ViT in evaluation mode whose parameters all differ from their initial 0 or 1."""
    torch.manual_seed(0)
    model = ViT(replace(SMALL, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def breasts(*sizes: tuple[int, int]) -> list[Tensor]:
    """Return images with half a disc of noise at the left edge and air around it."""
    images = []
    for number, (height, width) in enumerate(sizes):
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(0, 1, width), indexing="ij")
        noise = torch.rand(height, width, generator=torch.Generator().manual_seed(number))
        images.append(((rows**2 + 2 * columns**2 < 0.3) * noise.clamp(min=0.01))[None])
    return images


SCALE = 2.0  # mm per pixel; the breasts are then about 100 pixels high
SIZES = (48, 32), (96, 48), (48, 32), (33, 70)


def reference_logits(model: ViT, image: Tensor) -> Tensor:
    """Return the logits of one image by an ordinary ViT on the padded image, without the tokens of air."""
    image = F.pad(image, (0, -image.shape[2] % 16, 0, -image.shape[1] % 16))
    tissue = image.unflatten(2, (-1, 16)).unflatten(1, (-1, 16)).amax(dim=(0, 2, 4)).flatten() > 0
    assert 0 < tissue.sum() < len(tissue)
    tokens = model.embed(image[None])
    kept = torch.cat([torch.ones(model.config.num_prefix_tokens, dtype=torch.bool), tissue])
    return model.head(model.pool(model.encode(tokens[:, kept])))


def gradients(model: ViT, logits: Tensor) -> list[Tensor]:
    """Return the gradients of a fixed loss of the logits."""
    model.zero_grad()
    logits.square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_pack_gives_the_values_and_gradients_of_single_images(options: dict[str, Any]) -> None:
    model = build(**options)
    images = breasts(*SIZES)
    packed = forward(model, pack_images(images, 16))
    single = torch.cat([reference_logits(model, image) for image in images])
    assert (packed - single).abs().max() <= 1e-5 < 1e-2 < single.abs().max()
    for gradient, reference in zip(gradients(model, packed), gradients(model, single), strict=True):
        assert (gradient - reference).abs().max() <= 1e-5 * max(1, reference.abs().max())


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@torch.no_grad()
def test_a_pack_with_all_patches_equals_the_dense_vit(options: dict[str, Any]) -> None:
    model = build(**options)
    full = torch.rand(3, 1, 64, 48).clamp(min=0.01)
    half = torch.stack(breasts((64, 48), (64, 48)))
    assert (forward(model, pack_images(list(full), 16)) - model(full)).abs().max() <= 1e-5
    assert (forward(model, pack_images(list(half), 16, air=True)) - model(half)).abs().max() <= 1e-5
    assert (forward(model, pack_images(list(half), 16)) - model(half)).abs().max() > 1e-3


@torch.no_grad()
def test_an_image_s_result_does_not_depend_on_the_other_images_of_the_pack() -> None:
    model = build()
    images = breasts(*SIZES)
    before = forward(model, pack_images(images, 16))
    after = forward(model, pack_images([*images[:2], images[2] / 2, *images[3:]], 16))
    assert torch.equal(before[[0, 1, 3]], after[[0, 1, 3]])
    assert (before[2] - after[2]).abs().max() > 1e-3


def test_checkpointing_changes_no_gradient_of_a_pack_even_with_stochastic_depth() -> None:
    model = build(drop_path=0.5).train()
    images = pack_images(breasts(*SIZES), 16)
    results = []
    for model.gradient_checkpointing in (False, True):
        torch.manual_seed(1)
        results.append(gradients(model, forward(model, images)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@torch.no_grad()
def test_stochastic_depth_draws_once_per_image() -> None:
    lengths = [3, 1, 5] * 100
    layout = PackedLayout(lengths, torch.device("cpu"))
    drawn = layout.sample_per_image(torch.empty(1, sum(lengths), 4))
    assert drawn.shape == (1, sum(lengths), 1)
    per_image = [image.unique() for image in drawn[0, :, 0].split(lengths)]
    assert all(len(values) == 1 for values in per_image)
    assert len(torch.cat(per_image).unique()) == len(lengths)
    assert abs(torch.cat(per_image).mean() - 0.5) < 0.1


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@torch.no_grad()
def test_attention_maps_have_the_grid_of_each_image(options: dict[str, Any]) -> None:
    model = build(**options)
    images = pack_images(breasts(*SIZES), 16)
    prefix = model.config.num_prefix_tokens
    for weights, maps, image in zip(attention(model, images), attention_maps(model, images), images, strict=True):
        (grid,) = image.grids
        (length,) = image.sequence_lengths(prefix)
        assert weights.shape == (2, length, length)
        assert torch.allclose(weights.sum(dim=-1), torch.ones(2, length))
        assert torch.allclose(weights, attention(model, image)[0], atol=1e-6)
        assert maps.shape == (*grid, 2)
        assert torch.equal(maps.isfinite().all(dim=-1).flatten().nonzero().squeeze(1), image.patch_indices[0])
        readers = weights[:, :1] if model.config.pool == "cls" else weights[:, prefix:]
        assert torch.allclose(maps.nansum(dim=(0, 1)), readers[..., prefix:].sum(dim=-1).mean(dim=-1), atol=1e-6)


@torch.no_grad()
def test_attention_with_all_patches_equals_that_of_the_dense_vit() -> None:
    model = build(registers=2)
    images = torch.stack(breasts((48, 32), (48, 32)))
    x = model.embed(images)
    for block in model.blocks[:-1]:
        x = block(x, DENSE_LAYOUT)
    dense = model.blocks[-1].attn.attention_weights(model.blocks[-1].norm1(x))  # (B, A, T, T)
    full = pack_images(list(images), 16, air=True)
    assert torch.allclose(torch.stack(attention(model, full)), dense, atol=1e-6)
    # the head reads the mean of the patches, so the map is the mean attention of all patches: (B, A, h, w)
    expected = dense[:, :, 3:, 3:].mean(dim=2).unflatten(-1, (3, 2))
    assert torch.allclose(torch.stack(attention_maps(model, full)).permute(0, 3, 1, 2), expected, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_the_16_bit_kernel_is_close_to_float32_on_cuda() -> None:
    model = build(dim=128).cuda()
    images = pack_images(breasts(*SIZES), 16).to("cuda")
    exact = forward(model, images)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        approximate = forward(model, images)
    assert 0 < (approximate - exact).abs().max() <= 0.03 * exact.abs().max()


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        (torch.zeros(1, 32, 32), "only air"),
        (torch.full((1, 32, 32), torch.nan), "NaN"),
        (torch.ones(1, 32, 32) / 0, "infinite"),
        (torch.ones(1, 8, 32), "8x32 is smaller than a patch"),
    ],
)
def test_an_unusable_image_is_refused_and_named(image: Tensor, problem: str) -> None:
    with pytest.raises(UsageError, match=f"left CC: .*{problem}"):
        pack_images([torch.ones(1, 16, 16), image], 16, ["right CC", "left CC"])


class Item(NamedTuple):
    """An item of a stream, with its index."""

    number: int
    pack: PackedBatch


def items(lengths: list[int]) -> Iterator[Item]:
    """Yield images with the given numbers of patches."""
    for number, length in enumerate(lengths):
        pack = PackedBatch((f"image {number}",), (torch.empty(1, 0, 0),), (torch.empty(length),), 16)
        yield Item(number, pack)


def total_tokens(group: list[Item]) -> int:
    return sum(sum(item.pack.sequence_lengths(1)) for item in group)


@given(st.lists(st.integers(1, 99), max_size=60))
def test_groups_keep_the_budget_and_contain_every_image_once(lengths: list[int]) -> None:
    groups = list(best_fit_groups(items(lengths), tokens=100, prefix=1))
    assert sorted(item.number for group in groups for item in group) == list(range(len(lengths)))
    assert all(0 < total_tokens(group) <= 100 for group in groups)


@pytest.mark.parametrize(("tokens", "spread"), [(8192, 250), (16384, 250), (32768, 250), (32768, 500)])
def test_at_most_a_twentieth_of_the_budget_is_wasted(tokens: int, spread: int) -> None:
    """Lengths are distributed as in real crops of 1024x512 (mean 1250, standard deviation 250), or twice as wide."""
    lengths = np.random.default_rng(0).normal(1250, spread, 2000).clip(100, 2048).astype(int).tolist()
    groups = list(best_fit_groups(items(lengths), tokens, prefix=1))
    assert sum(map(total_tokens, groups)) >= 0.95 * tokens * len(groups)


def test_an_image_over_the_budget_is_named() -> None:
    with pytest.raises(UsageError, match="image 2 has 101 tokens, more than --tokens 100"):
        list(best_fit_groups(items([50, 50, 100]), tokens=100, prefix=1))


def test_batches_depend_only_on_seed_and_epoch(crops: Path) -> None:
    """They depend neither on the workers nor on earlier epochs, so a resumed run gets the batches it would have had."""
    rows = usable_rows(read_manifest(crops / "manifest.csv")).dropna(subset=["cancer"])
    config = TrainConfig(manifest=Path(), run=Path(), tokens=30, workers=0)

    def run_epoch(number: int, workers: int, earlier: int) -> list[tuple[list[int], Tensor]]:
        """Return the rows and pixels of the batches of an epoch, after running `earlier` epochs."""
        sampler = EpochSampler(rows["cancer"].tolist(), 0, "balanced", epoch=number - earlier)
        images = CropDataset(rows["path"].tolist(), rows["cancer"].tolist(), AugmentConfig())
        batches = BatchLoader(images, sampler, replace(config, workers=workers))
        for _ in range(earlier):
            assert sum(len(batch.pack) for batch in batches) == len(rows)
        return [(batch.row.tolist(), torch.cat([image.flatten() for image in batch.pack.images])) for batch in batches]

    continuous = run_epoch(1, workers=0, earlier=1)
    resumed = run_epoch(1, workers=2, earlier=0)
    assert len(continuous) > 5
    for (expected_rows, expected_pixels), (resumed_rows, resumed_pixels) in zip(continuous, resumed, strict=True):
        assert expected_rows == resumed_rows
        assert torch.equal(expected_pixels, resumed_pixels)


def test_training_refuses_a_budget_that_a_crop_may_exceed_before_it_starts(
    crops: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    assert main(["train", str(crops / "manifest.csv"), str(tmp_path / "run"), *flags, "--tokens", "8"]) == 2
    message = capsys.readouterr().err
    assert ".png has 9 tokens, more than --tokens 8" in message
    assert not (tmp_path / "run").exists()


@torch.no_grad()
def test_a_package_predicts_with_or_without_air_as_it_was_trained(run: Path, crops: Path) -> None:
    predictor = Predictor(PredictorConfig(package=run / "package"))
    table = usable_rows(read_manifest(crops / "manifest.csv")).head(1)
    image = torch.from_numpy(cv2.imread(table["path"].item(), cv2.IMREAD_UNCHANGED) / np.float32(255))[None]
    assert predictor.ensemble.packed
    for packed, expected in (
        (True, forward(predictor.ensemble.model.trunk, pack_images([image], 16))),
        (False, predictor.ensemble.model.trunk(image[None])),
    ):
        predictor.ensemble.packed = packed
        assert predictor.score_images(table)["score"].item() == pytest.approx(expected.sigmoid().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("shape", "value", "problem"),
    [((64, 32), 0, "only air"), ((8, 32), 9, "smaller than a patch"), ((512, 512), 9, "more than --tokens 512")],
)
def test_an_unusable_crop_is_refused_and_the_others_are_scored(
    shape: tuple[int, int], value: int, problem: str, run: Path, crops: Path, tmp_path: Path
) -> None:
    table = usable_rows(read_manifest(crops / "manifest.csv")).head(3).reset_index(drop=True)
    table.loc[1, "path"] = str(tmp_path / "unfit.png")
    cv2.imwrite(table["path"][1], np.full(shape, value, np.uint8))
    scores = Predictor(PredictorConfig(package=run / "package", tokens=512)).score_images(table)
    assert scores["score"].isna().tolist() == [False, True, False]
    assert scores["reason"][1] == "unfit"
    assert problem in scores["remark"][1]


def test_compiled_blocks_are_not_recompiled_for_other_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are compiled for the first two packs only, in training and with stochastic depth."""
    from torch._dynamo.testing import CompileCounter

    torch.manual_seed(0)
    model = ViT(ViTConfig(image_size=Size(64, 64), dim=32, depth=3, heads=2, drop_path=0.2)).train()
    images = [torch.rand(1, 16 * (1 + number % 3), 16 * (1 + number)) for number in range(8)]
    counter = CompileCounter()
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend=counter))
    compile_blocks(model)
    frame_counts = []
    for count in (2, 3, 1, 8, 5):
        torch.manual_seed(count)
        logits = forward(model, pack_images(images[:count], 16))
        logits.sum().backward()
        frame_counts.append(counter.frame_count)
    assert frame_counts[1:] == [frame_counts[1]] * 4


@pytest.fixture(scope="module")
def scaled(release: Path, make_once: MakeOnce) -> Path:
    """Return the folder of the release cropped at SCALE."""

    def make(folder: Path) -> None:
        assert etl(ETLConfig(source=release, out=folder, size=Size(32, 16), mm_per_pixel=SCALE, jobs=2)) == 0

    return make_once("scaled", make)


def test_crops_have_the_requested_scale_in_mm_per_pixel(scaled: Path) -> None:
    table = usable_rows(read_manifest(scaled / "manifest.csv"))
    sizes = [crop_size(path) for path in table["path"]]
    assert len(set(sizes)) > 5
    for low, high, spacing, side in (
        ("box_y0", "box_y1", "spacing_row", [size.height for size in sizes]),
        ("box_x0", "box_x1", "spacing_column", [size.width for size in sizes]),
    ):
        millimetres = (table[high] - table[low]) * table[spacing]
        np.testing.assert_allclose(side, (millimetres / SCALE).clip(lower=16), atol=0.5)


def test_crops_of_many_sizes_train_evaluate_and_predict(
    scaled: Path, release: Path, tmp_path: Path, flags: list[str]
) -> None:
    run = tmp_path / "run"
    package = run / "package"
    assert main(["train", str(scaled / "manifest.csv"), str(run), *flags, "--epochs", "1"]) == 0
    arguments = [str(package), str(run / "manifest.csv"), str(tmp_path / "e")]
    assert main(["evaluate", *arguments, "--replicates", "100", "--no-audit"]) == 0
    assert main(["predict", str(package), str(release / "test.csv"), str(tmp_path / "p")]) == 0
    if not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))):
        return
    assert main(["export", str(package), str(package / "model.fp32.onnx")]) == 0
    assert main(["predict", str(package), str(release / "test.csv"), str(tmp_path / "onnx"), "--runtime", "onnx"]) == 0
    torch_scores, onnx_scores = (pd.read_csv(tmp_path / name / "scores.csv")["score"] for name in ("p", "onnx"))
    np.testing.assert_allclose(torch_scores, onnx_scores, atol=1e-5)
    assert torch_scores.notna().all()


@pytest.mark.parametrize("spacing", [None, [0.0, 0.0], [1.0, 2.0], [50.0, 50.0], [0.001, 0.001]])
def test_a_scale_needs_a_plausible_pixel_spacing(spacing: list[float] | None, crops: Path, tmp_path: Path) -> None:
    dataset = pydicom.dcmread(usable_rows(read_manifest(crops / "manifest.csv"))["source_path"].iloc[0])
    for name in ("PixelSpacing", "ImagerPixelSpacing"):
        dataset.pop(name, None)
    if spacing:
        dataset.PixelSpacing = spacing
    dataset.save_as(tmp_path / "image.dcm")
    with pytest.raises(ImageRefusedError, match="no_spacing"):
        preprocess(tmp_path / "image.dcm", Preprocessing(mm_per_pixel=0.1))
    with pytest.raises(UsageError, match="mm_per_pixel"):
        Preprocessing(mm_per_pixel=0.0)
