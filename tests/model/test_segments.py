"""Segments: all tissue is read, memory follows the budget and the numbers do not, and the view of the whole learns what is telling."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import segments
import torch
from torch import Tensor

from vitmodel.cli import main
from vitmodel.config import SegmentsConfig, Size
from vitmodel.errors import UsageError
from vitmodel.model.architecture import ExamConfig, NetworkConfig, SourcesConfig, ViTConfig, Vocabulary
from vitmodel.model.explain import explain, method_named
from vitmodel.model.network import Logits, Network
from vitmodel.model.packed_batch import ImageMetadata, PackedBatch, pack_images
from vitmodel.model.segments import SegmentedImage, cut_segments, segment_losses

VIT = ViTConfig(image_size=Size(64, 64), patch=8, dim=32, depth=2, heads=2)
CONFIG = SegmentsConfig(segments=64, segment_overlap=16, segment_context=64, segment_budget=100)


def breast(height: int = 320, width: int = 200, seed: int = 0) -> Tensor:
    """Half an ellipse at the left edge with noise in it, 1 H W; air is 0."""
    rows, columns = np.mgrid[:height, :width]
    inside = ((rows - height / 2) / (0.45 * height)) ** 2 + (columns / (0.9 * width)) ** 2 < 1
    noise = np.random.default_rng(seed).uniform(0.1, 1, (height, width))
    return torch.from_numpy(np.where(inside, noise, 0).astype(np.float32))[None]


def network(config: SegmentsConfig = CONFIG, **changes: object) -> Network:
    torch.manual_seed(0)
    return Network(NetworkConfig(vit=replace(VIT, **changes), segments=config))  # type: ignore[arg-type]


def two() -> PackedBatch:
    return pack_images(
        [breast(seed=1), breast(256, 144, seed=2)], 8, metadata=[ImageMetadata(mm_per_pixel=0.1), ImageMetadata()]
    )


def covered(parts: SegmentedImage) -> Tensor:
    """How many segments show each patch: h w."""
    count = torch.zeros(parts.grid)
    for top, left, bottom, right in parts.boxes_in_patches[1:].tolist():
        count[top:bottom, left:right] += 1
    return count


@pytest.mark.parametrize("size", [(320, 200), (64, 64), (40, 400), (512, 72)])
def test_segments_cover_all_tissue_and_each_shows_some(size: tuple[int, int]) -> None:
    image = pack_images([breast(*size)], 8)
    parts = cut_segments(image, CONFIG)
    assert (covered(parts).flatten()[image.patch_indices[0]] >= 1).all()
    assert min(map(len, parts.pack.patch_indices)) > 0
    for pixels, (top, left, bottom, right) in zip(
        parts.pack.images[1:], parts.boxes_in_patches[1:].tolist(), strict=True
    ):
        assert torch.equal(pixels, image.images[0][:, top * 8 : bottom * 8, left * 8 : right * 8])
    assert max(parts.pack.images[0].shape) <= 64


def test_neighbours_share_the_overlap_and_air_costs_no_segment() -> None:
    full = cut_segments(pack_images([torch.full((1, 320, 320), 0.5)], 8), CONFIG)
    lefts = full.boxes_in_patches[1:, 1].unique()
    assert (lefts.diff() <= (64 - 16) // 8).all()
    assert lefts[-1] + 8 == 40
    corner = torch.zeros(1, 320, 320)
    corner[:, :100, :100] = 0.5
    assert len(cut_segments(pack_images([corner], 8), CONFIG)) < len(full) / 3


def gradients(model: Network, images: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(1)
    features = model.features(images)
    (features * torch.randn(features.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return features.detach(), {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def test_groups_within_the_budget_give_the_gradients_of_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same parts in one batch without recomputation; with stochastic depth, against the same groups without it."""
    small, large = network(), network(replace(CONFIG, segment_budget=10**6))
    dropping = network(drop_path=0.5).train()
    found, dropped = gradients(small, two()), gradients(dropping, two())
    monkeypatch.setattr("vitmodel.model.segments.checkpoint", lambda function, each, use_reentrant: function(each))
    for (features, grads), (expected, wanted) in (
        (found, gradients(large, two())),
        (dropped, gradients(dropping, two())),
    ):
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
        assert grads.keys() == wanted.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, wanted[name], atol=1e-5, rtol=1e-5, msg=name)


def test_no_group_exceeds_the_budget_and_an_image_is_read_as_if_alone() -> None:
    model, images, seen = network().eval(), two(), []
    trunk = model.encode
    model.encode = lambda each: (seen.append(sum(each.sequence_lengths(VIT.num_prefix_tokens))), trunk(each))[1]  # type: ignore[method-assign, func-returns-value]
    with torch.no_grad():
        together = model.features(images)
        alone = torch.cat([model.features(image) for image in images])
    assert max(seen) <= CONFIG.segment_budget
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_top_k_of_all_is_the_reference_and_fewer_are_the_best() -> None:
    images = next(iter(two()))
    whole = network().eval()
    with torch.no_grad():
        every = whole.encode_segments(images)
        (scores,) = every.scores
        for top in (3, len(scores), 10**6):
            some = network(replace(CONFIG, segment_top=top)).eval().encode_segments(images)
            best = scores.topk(min(top, len(scores))).indices.sort().values
            assert torch.equal(some.parts[0].boxes_in_patches[1:], every.parts[0].boxes_in_patches[1:][best])
        torch.testing.assert_close(some.features, every.features)


def test_training_reads_a_sample_and_always_the_lesion() -> None:
    model, images = network(replace(CONFIG, segment_samples=3)).train(), two()
    lesions = [torch.tensor([[60.0, 150.0, 76.0, 166.0]]), torch.empty(0, 4)]
    drawn = set()
    for seed in range(8):
        torch.manual_seed(seed)
        reading = model.encode_segments(images, lesions)
        assert [len(parts) for parts in reading.parts] == [4, 4]
        assert reading.parts[0].contains_lesion(lesions[0]).any()
        drawn.add(tuple(reading.parts[1].boxes_in_patches.flatten().tolist()))
    assert len(drawn) > 4


def test_the_view_learns_which_segment_is_telling_and_the_segments_what_they_show() -> None:
    """A bright disc is the lesion: after some steps on segments drawn by chance the view ranks first one that shows it."""
    model = network(replace(CONFIG, segment_samples=4))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    rng, y, x = np.random.default_rng(0), *np.mgrid[:320, :200]

    def draw(sick: bool) -> tuple[Tensor, Tensor]:
        top, left = rng.integers(80, 220), rng.integers(10, 90)
        disc = torch.from_numpy((y - top) ** 2 + (x - left) ** 2 < 12**2)
        image = breast(seed=int(rng.integers(10**6))) * 0.4
        return torch.where(disc & sick, 1.0, image), torch.tensor([[left - 12.0, top - 12, left + 12, top + 12]])[
            : int(sick)
        ]

    for _ in range(35):
        images, boxes = zip(*(draw(sick) for sick in (True, False, True, False)), strict=True)
        reading = model.encode_segments(pack_images(images, 8), boxes)
        loss = segment_losses(reading, torch.tensor([1.0, 0, 1, 0]), boxes).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    hits, model = [], model.eval()
    with torch.no_grad():
        for _ in range(10):
            image, box = draw(True)
            reading = model.encode_segments(pack_images([image], 8))
            shown = reading.parts[0].contains_lesion(box)
            hits.append((shown[reading.scores[0].argmax()] + shown[reading.logits[0][1:].argmax()]).item())
    assert sum(hits) >= 15, hits


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"segments": 60}, "multiple"),
        ({"segment_overlap": 12}, "multiple"),
        ({"segment_budget": 60}, "too few"),
    ],
)
def test_segments_that_do_not_fit_the_trunk_are_refused(changes: dict[str, int], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        network(replace(CONFIG, **changes))


def test_parts_keep_their_image_s_source_and_images_in_segments_join_an_exam() -> None:
    torch.manual_seed(0)
    machines, views = (Vocabulary(column, ("a", "b")) for column in ("machine_id", "view"))
    config = NetworkConfig(
        vit=VIT, segments=CONFIG, sources=SourcesConfig(columns=(machines,)), exam=ExamConfig(views=views)
    )
    model = Network(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))

    def say(*sources: int) -> Logits:
        metadata = [
            ImageMetadata(sources=(source,), view=1, breast=number, exam=0) for number, source in enumerate(sources)
        ]
        with torch.no_grad():
            return model(pack_images([breast(seed=1), breast(256, 144, seed=2)], 8, metadata=metadata))

    first, second = say(1, 1), say(1, 2)
    assert first.breasts is not None
    assert first.breasts.shape == (2,)
    assert first.images[0] == pytest.approx(second.images[0], abs=1e-5)
    assert abs(first.images[1] - second.images[1]) > 1e-3, (
        "the other machine's part of the trunk encodes all parts of its image"
    )


def test_stitched_segments_show_no_seam() -> None:
    """A map that is linear over the image comes back as it is; a segment that disagrees with its neighbours fades towards its edge."""
    image = pack_images([torch.full((1, 320, 320), 0.5)], 8)
    parts = cut_segments(image, CONFIG)
    plane = torch.arange(40.0)[:, None] + 3 * torch.arange(40.0)
    maps = [plane[top:bottom, left:right] for top, left, bottom, right in parts.boxes_in_patches[1:].tolist()]
    torch.testing.assert_close(parts.stitch_maps(maps), plane)
    odd = [torch.full_like(each, float(number == len(maps) // 2)) for number, each in enumerate(maps)]
    found = parts.stitch_maps(odd)
    assert found.max() == 1
    assert max(found.diff(dim=0).abs().max(), found.diff(dim=1).abs().max()) <= 0.75  # the overlap is 2 patches


@pytest.mark.parametrize("method", ["rollout", "gradient"])
def test_a_heat_map_covers_what_was_read_and_weighs_by_attention(method: str) -> None:
    model, image = network().eval(), next(iter(two()))
    found = explain(model, image, method)
    assert found.shape == image.grids[0]
    assert torch.equal(found.isfinite().flatten().nonzero().squeeze(1), image.patch_indices[0])
    assert found[found.isfinite()].mean().item() == pytest.approx(1, abs=1e-4)
    alone = network(replace(CONFIG, segments=320, segment_overlap=0, segment_budget=2000, segment_context=8)).eval()
    weights = alone.encode_segments(image).attention[0]
    (part, *_) = cut_segments(image, alone.config.segments).pack.select([1])  # type: ignore[arg-type]
    plain = method_named(method)(alone, part)
    correlation = np.corrcoef(explain(alone, image, method)[found.isfinite()], plain[found.isfinite()])[0, 1]
    assert weights[1] > 0
    assert correlation > 0.999, "with one segment it is that segment's map"


def test_an_overlap_as_large_as_the_segment_is_refused() -> None:
    with pytest.raises(UsageError, match="segment_overlap"):
        replace(CONFIG, segment_overlap=64)


def test_the_command_line_trains_predicts_and_explains_in_segments(
    crops: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The package remembers the segments; another budget changes no score, and one that is too small is refused."""
    flags = [
        "--segments",
        "32",
        "--segment-overlap",
        "16",
        "--segment-context",
        "32",
        "--segment-budget",
        "20",
        "--segment-samples",
        "2",
    ]
    training = [
        "--model",
        "vit_micro",
        "--epochs",
        "1",
        "--workers",
        "0",
        "--wandb",
        "off",
        "--val",
        "0.4",
        "--test",
        "0",
    ]
    manifest, run = str(crops / "manifest.csv"), tmp_path / "run"
    assert main(["train", manifest, str(run), *flags, "--segment-budget", "4", *training]) == 2
    assert "segment_budget" in capsys.readouterr().err
    assert main(["train", manifest, str(run), *flags, *training]) == 0
    package = str(run / "package")
    found = []
    for budget in ("0", "5"):
        out = tmp_path / budget
        assert main(["predict", package, manifest, str(out), "--explain", "gradient", "--segment-budget", budget]) in (
            0,
            1,
        )
        found.append(pd.read_csv(out / "scores.csv"))
        assert len(list((out / "overlays").iterdir())) == found[-1].score.notna().sum() > 0
    np.testing.assert_allclose(found[0].score, found[1].score, atol=1e-5)
    assert main(["predict", package, manifest, str(tmp_path / "none"), "--segment-budget", "4"]) == 2


@pytest.mark.parametrize("way", segments.WAYS)
def test_the_benchmark_builds_every_variant(way: str) -> None:
    _, logits = segments.build(way, "vit_micro", Size(512, 256))
    assert logits(pack_images([breast(512, 256)], 16)).shape == (1, 1)
