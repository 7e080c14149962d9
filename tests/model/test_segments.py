"""Segments cover all tissue, results do not depend on the token budget, and the overview learns to rank segments."""

from __future__ import annotations

import shlex
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
    """Return an image `(1, H, W)` with half an ellipse of noise at the left edge; air is 0."""
    rows, columns = np.mgrid[:height, :width]
    inside = ((rows - height / 2) / (0.45 * height)) ** 2 + (columns / (0.9 * width)) ** 2 < 1
    noise = np.random.default_rng(seed).uniform(0.1, 1, (height, width))
    return torch.from_numpy(np.where(inside, noise, 0).astype(np.float32))[None]


def network(config: SegmentsConfig = CONFIG, **changes: object) -> Network:
    torch.manual_seed(0)
    return Network(NetworkConfig(vit=replace(VIT, **changes), segments=config))  # type: ignore[arg-type]


def two_images() -> PackedBatch:
    """Return a pack of an image with and an image without a known pixel spacing."""
    metadata = [ImageMetadata(mm_per_pixel=0.1), ImageMetadata()]
    return pack_images([breast(seed=1), breast(256, 144, seed=2)], 8, metadata=metadata)


def segments_per_patch(parts: SegmentedImage) -> Tensor:
    """Return the number of segments that show each patch, `(h, w)`."""
    count = torch.zeros(parts.grid)
    for top, left, bottom, right in parts.boxes_in_patches[1:].tolist():
        count[top:bottom, left:right] += 1
    return count


@pytest.mark.parametrize("size", [(320, 200), (64, 64), (40, 400), (512, 72)])
def test_segments_cover_all_tissue_and_none_is_empty(size: tuple[int, int]) -> None:
    image = pack_images([breast(*size)], 8)
    parts = cut_segments(image, CONFIG)
    assert (segments_per_patch(parts).flatten()[image.patch_indices[0]] >= 1).all()
    assert min(map(len, parts.pack.patch_indices)) > 0
    segments = zip(parts.pack.images[1:], parts.boxes_in_patches[1:].tolist(), strict=True)
    for pixels, (top, left, bottom, right) in segments:
        assert torch.equal(pixels, image.images[0][:, top * 8 : bottom * 8, left * 8 : right * 8])
    assert max(parts.pack.images[0].shape) <= 64


def test_neighbouring_segments_overlap_and_air_has_no_segments() -> None:
    full = cut_segments(pack_images([torch.full((1, 320, 320), 0.5)], 8), CONFIG)
    lefts = full.boxes_in_patches[1:, 1].unique()
    assert (lefts.diff() <= (64 - 16) // 8).all()
    assert lefts[-1] + 8 == 40
    corner = torch.zeros(1, 320, 320)
    corner[:, :100, :100] = 0.5
    assert len(cut_segments(pack_images([corner], 8), CONFIG)) < len(full) / 3


def gradients(model: Network, images: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the features and the gradients of a fixed loss; the random numbers are the same in every call."""
    model.zero_grad()
    torch.manual_seed(1)
    features = model.features(images)
    (features * torch.randn(features.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return features.detach(), {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def test_groups_within_the_budget_give_the_gradients_of_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference, without recomputation, is one batch or, with stochastic depth, the same groups."""
    grouped = network()
    one_batch = network(replace(CONFIG, segment_budget=10**6))
    dropping = network(drop_path=0.5).train()
    recomputed = gradients(grouped, two_images())
    recomputed_dropping = gradients(dropping, two_images())
    monkeypatch.setattr("vitmodel.model.segments.checkpoint", lambda function, group, use_reentrant: function(group))
    for (features, grads), (expected_features, expected_grads) in (
        (recomputed, gradients(one_batch, two_images())),
        (recomputed_dropping, gradients(dropping, two_images())),
    ):
        torch.testing.assert_close(features, expected_features, atol=1e-5, rtol=1e-5)
        assert grads.keys() == expected_grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected_grads[name], atol=1e-5, rtol=1e-5, msg=name)


def test_no_group_exceeds_the_budget_and_images_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network().eval()
    images = two_images()
    encode = model.encode
    group_tokens = []

    def counting_encode(group: PackedBatch) -> tuple[Tensor, Tensor, list[Tensor]]:
        group_tokens.append(sum(group.sequence_lengths(VIT.num_prefix_tokens)))
        return encode(group)

    monkeypatch.setattr(model, "encode", counting_encode)
    with torch.no_grad():
        together = model.features(images)
        separate = torch.cat([model.features(image) for image in images])
    assert max(group_tokens) <= CONFIG.segment_budget
    torch.testing.assert_close(together, separate, atol=1e-5, rtol=1e-5)


def test_segment_top_reads_the_segments_with_the_highest_scores() -> None:
    image = next(iter(two_images()))
    with torch.no_grad():
        reference = network().eval().encode_segments(image)
        (scores,) = reference.scores
        for top in (3, len(scores), 10**6):
            reading = network(replace(CONFIG, segment_top=top)).eval().encode_segments(image)
            best = scores.topk(min(top, len(scores))).indices.sort().values
            assert torch.equal(reading.parts[0].boxes_in_patches[1:], reference.parts[0].boxes_in_patches[1:][best])
        torch.testing.assert_close(reading.features, reference.features)


def test_training_reads_a_random_sample_that_includes_the_lesion() -> None:
    model = network(replace(CONFIG, segment_samples=3)).train()
    images = two_images()
    lesions = [torch.tensor([[60.0, 150.0, 76.0, 166.0]]), torch.empty(0, 4)]
    drawn = set()
    for seed in range(8):
        torch.manual_seed(seed)
        reading = model.encode_segments(images, lesions)
        assert [len(parts) for parts in reading.parts] == [4, 4]
        assert reading.parts[0].contains_lesion(lesions[0]).any()
        drawn.add(tuple(reading.parts[1].boxes_in_patches.flatten().tolist()))
    assert len(drawn) > 4


def test_the_overview_learns_to_rank_segments_and_the_segments_learn_what_they_show() -> None:
    """After a few steps on random segments, the overview ranks a segment with the lesion, a bright disc, first."""
    model = network(replace(CONFIG, segment_samples=4))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:320, :200]

    def draw(cancer: bool) -> tuple[Tensor, Tensor]:
        """Return an image and its lesion boxes, of which there is one or, without cancer, none."""
        row, column = rng.integers(80, 220), rng.integers(10, 90)
        disc = torch.from_numpy((y - row) ** 2 + (x - column) ** 2 < 12**2)
        tissue = breast(seed=int(rng.integers(10**6))) * 0.4
        boxes = torch.tensor([[column - 12.0, row - 12, column + 12, row + 12]])
        return torch.where(disc & cancer, 1.0, tissue), boxes[: int(cancer)]

    for _ in range(35):
        images, boxes = zip(*(draw(cancer) for cancer in (True, False, True, False)), strict=True)
        reading = model.encode_segments(pack_images(images, 8), boxes)
        loss = segment_losses(reading, torch.tensor([1.0, 0, 1, 0]), boxes).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    hits = []
    with torch.no_grad():
        for _ in range(10):
            image, box = draw(True)
            reading = model.encode_segments(pack_images([image], 8))
            shown = reading.parts[0].contains_lesion(box)
            hits.append((shown[reading.scores[0].argmax()] + shown[reading.logits[0][1:].argmax()]).item())
    assert sum(hits) >= 15, hits


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"segments": 60}, "multiple"),
        ({"segment_overlap": 12}, "multiple"),
        ({"segment_budget": 60}, "too few"),
    ],
)
def test_segments_that_do_not_fit_the_trunk_are_refused(changes: dict[str, int], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        network(replace(CONFIG, **changes))


def test_segments_use_the_source_of_their_image_and_work_with_exam_fusion() -> None:
    torch.manual_seed(0)
    machines, views = (Vocabulary(column, ("a", "b")) for column in ("machine_id", "view"))
    config = NetworkConfig(
        vit=VIT, segments=CONFIG, sources=SourcesConfig(columns=(machines,)), exam=ExamConfig(views=views)
    )
    model = Network(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))

    def predict(*sources: int) -> Logits:
        metadata = [
            ImageMetadata(sources=(source,), view=1, breast=number, exam=0) for number, source in enumerate(sources)
        ]
        with torch.no_grad():
            return model(pack_images([breast(seed=1), breast(256, 144, seed=2)], 8, metadata=metadata))

    first = predict(1, 1)
    second = predict(1, 2)
    assert first.breasts is not None
    assert first.breasts.shape == (2,)
    assert first.images[0] == pytest.approx(second.images[0], abs=1e-5)
    difference = abs(first.images[1] - second.images[1])
    assert difference > 1e-3, "the adapters of the other machine must change the parts of its image"


def test_stitched_segments_have_no_seam() -> None:
    """A linear map is reproduced, and a segment that differs from its neighbours fades towards its edge."""
    image = pack_images([torch.full((1, 320, 320), 0.5)], 8)
    parts = cut_segments(image, CONFIG)
    plane = torch.arange(40.0)[:, None] + 3 * torch.arange(40.0)
    maps = [plane[top:bottom, left:right] for top, left, bottom, right in parts.boxes_in_patches[1:].tolist()]
    torch.testing.assert_close(parts.stitch_maps(maps), plane)
    outlier = [torch.full_like(values, float(index == len(maps) // 2)) for index, values in enumerate(maps)]
    stitched = parts.stitch_maps(outlier)
    assert stitched.max() == 1
    assert max(stitched.diff(dim=0).abs().max(), stitched.diff(dim=1).abs().max()) <= 0.75  # the overlap is 2 patches


@pytest.mark.parametrize("method", ["rollout", "gradient"])
def test_a_heat_map_covers_the_tissue_and_a_single_segment_determines_it(method: str) -> None:
    model = network().eval()
    image = next(iter(two_images()))
    heat_map = explain(model, image, method)
    tissue = heat_map.isfinite()
    assert heat_map.shape == image.grids[0]
    assert torch.equal(tissue.flatten().nonzero().squeeze(1), image.patch_indices[0])
    assert heat_map[tissue].mean().item() == pytest.approx(1, abs=1e-4)
    config = replace(CONFIG, segments=320, segment_overlap=0, segment_budget=2000, segment_context=8)
    one_segment = network(config).eval()
    attention = one_segment.encode_segments(image).attention[0]
    segment = cut_segments(image, config).pack.select([1])
    segment_map = method_named(method)(one_segment, segment)
    correlation = np.corrcoef(explain(one_segment, image, method)[tissue], segment_map[tissue])[0, 1]
    assert attention[1] > 0
    assert correlation > 0.999


def test_an_overlap_as_large_as_the_segment_is_refused() -> None:
    with pytest.raises(UsageError, match="segment_overlap"):
        replace(CONFIG, segment_overlap=64)


@pytest.mark.slow
def test_the_command_line_trains_predicts_and_explains_in_segments(
    crops: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The package stores the segments; another budget changes no score, and one that is too small is refused."""
    segment_flags = shlex.split(
        "--segments 32 --segment-overlap 16 --segment-context 32 --segment-budget 20 --segment-samples 2"
    )
    training_flags = shlex.split("--model vit_micro --epochs 1 --workers 0 --wandb off --val 0.4 --test 0")
    manifest = str(crops / "manifest.csv")
    run = tmp_path / "run"
    assert main(["train", manifest, str(run), *segment_flags, "--segment-budget", "4", *training_flags]) == 2
    assert "segment_budget" in capsys.readouterr().err
    assert main(["train", manifest, str(run), *segment_flags, *training_flags]) == 0
    package = str(run / "package")
    tables = []
    for budget in ("0", "5"):
        out = tmp_path / budget
        status = main(["predict", package, manifest, str(out), "--explain", "gradient", "--segment-budget", budget])
        assert status in (0, 1)
        tables.append(pd.read_csv(out / "scores.csv"))
        assert len(list((out / "overlays").iterdir())) == tables[-1].score.notna().sum() > 0
    np.testing.assert_allclose(tables[0].score, tables[1].score, atol=1e-5)
    assert main(["predict", package, manifest, str(tmp_path / "none"), "--segment-budget", "4"]) == 2


@pytest.mark.parametrize("variant", segments.WAYS)
def test_the_benchmark_builds_every_variant(variant: str) -> None:
    _, logits = segments.build(variant, "vit_micro", Size(512, 256))
    assert logits(pack_images([breast(512, 256)], 16)).shape == (1, 1)
