"""Large images in parts: overlapping segments where there is tissue, and a small view of the whole. Knows no file and no label.

A part is an entry of a pack like any image, so that its patches of air are left out too. The trunk encodes parts in groups of at most
`segment_budget` tokens; where gradients are wanted, each group as a whole is recomputed in the backward pass (Chen et al. 2016, arXiv
1604.06174), so that only summaries stay and memory follows the budget and not the image. What a part shows is joined by where it lies, in
mm from the chest wall and the top of the crop, and by its scale; `fusion.Integrator` makes one summary of them, in which a part weighs the
more, the more it speaks for cancer by itself.

Parts cut from one image: S segments, P = 1 + S parts, the view of the whole first. Places are top, left, bottom, right in patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitmodel.config import SegmentsConfig, require
from vitmodel.model import packed_batch
from vitmodel.model.architecture import ViTConfig
from vitmodel.model.fusion import Integrator
from vitmodel.model.packed_batch import PackedBatch

PartEncoder = Callable[[PackedBatch], tuple[Tensor, Tensor, list[Tensor]]]
"""What encodes a pack of I parts: the summary of each, I D, the logit that a head reads off it, I, and its encoded patches, N D each."""

WAVELENGTHS_MM = (
    400.0,
    200.0,
    100.0,
    50.0,
    25.0,
    12.5,
)  # the longest exceeds a breast, the shortest tells neighbouring segments apart
INTEGRATOR_DEPTH = 2  # blocks of the transformer that integrates the parts
MAX_WEIGHT_LOGIT = 10.0  # logit beyond which a part weighs no more
SELECTION_LOSS_WEIGHT = (
    0.1  # weight of what the view's scores are taught; with 0.5 the trunk stayed on its plateau (dev/LOG.md)
)
NOMINAL_HEIGHT_MM = 200.0  # height of a crop whose pixel spacing is unknown: positions are then fractions of it


def check_segments(config: SegmentsConfig, patch: int, prefix: int) -> None:
    """Raises UsageError where the sizes do not fit the trunk's `patch`, or a part with its `prefix` exceeds the budget."""
    for name in ("segments", "segment_overlap", "segment_context"):
        side = getattr(config, name)
        near = max(1, round(side / patch)) * patch
        require(side % patch == 0, name, f"{side} is no multiple of the patch, {patch} pixels; take, say, {near}")
    most = prefix + (max(config.segments, config.segment_context) // patch) ** 2
    enough = config.segment_budget >= most
    require(
        enough,
        "segment_budget",
        f"{config.segment_budget} tokens are too few for one part, which may have {most}; raise it",
    )


def window_starts(begin: int, end: int, size: int, overlap: int, limit: int) -> list[int]:
    """Where the fewest windows of `size` begin that cover `begin` to `end`, evenly, sharing `overlap` or more, within 0 and `limit`."""
    count = max(1, math.ceil((end - begin - overlap) / (size - overlap)))
    first = max(0, min(begin, limit - size))
    last = max(first, end - size)
    return [round(first + (last - first) * number / max(1, count - 1)) for number in range(count)]


def place_segments(tissue: Tensor, size: int, overlap: int) -> Tensor:
    """Places of the segments that cover the patches with tissue (h w bool), `size` patches a side: S 4.

    Bands of rows cover all tissue, and segments along each band what lies in it. Those at the ends reach to the last patch of tissue, and
    no further than the image; a segment without tissue is left out.
    """
    h, w = tissue.shape
    found = []
    rows = tissue.any(dim=1).nonzero()
    for top in window_starts(int(rows[0]), int(rows[-1]) + 1, size, overlap, h):
        band = tissue[top : top + size]
        columns = band.any(dim=0).nonzero()
        if len(columns):
            lefts = window_starts(int(columns[0]), int(columns[-1]) + 1, size, overlap, w)
            found += [
                (top, left, min(top + size, h), min(left + size, w))
                for left in lefts
                if band[:, left : left + size].any()
            ]
    return torch.tensor(found)


@dataclass(frozen=True)
class SegmentedImage:
    """One image, cut."""

    pack: PackedBatch
    """P parts."""
    boxes_in_patches: Tensor
    """P 4; the first is the image as a whole."""
    grid: tuple[int, int]
    """Rows and columns of patches in the image."""
    mm_per_patch: float

    def __len__(self) -> int:
        return len(self.boxes_in_patches)

    @property
    def centres_mm(self) -> Tensor:
        """Where the parts' middles are, mm down from the top of the crop and out from the chest wall: P 2."""
        return (self.boxes_in_patches[:, :2] + self.boxes_in_patches[:, 2:]) / 2 * self.mm_per_patch

    def select_segments(self, chosen: Tensor) -> SegmentedImage:
        """The view of the whole and, of the segments, those numbered `chosen`."""
        numbers = [0, *(1 + chosen).tolist()]
        return replace(self, pack=self.pack.select(numbers), boxes_in_patches=self.boxes_in_patches[numbers])

    def contains_lesion(self, boxes: Tensor) -> Tensor:
        """Whether each segment shows one of the boxes (K 4: x0 y0 x1 y1 in pixels): half of it, or is half full of it; S, 0 or 1."""
        segments, boxes = (
            self.boxes_in_patches[1:, None] * self.pack.patch,
            boxes[None, :, [1, 0, 3, 2]],
        )  # top, left, bottom, right
        shared = (
            (torch.minimum(segments[..., 2:], boxes[..., 2:]) - torch.maximum(segments[..., :2], boxes[..., :2]))
            .clamp(min=0)
            .prod(-1)
        )
        areas = [(each[..., 2:] - each[..., :2]).prod(-1) for each in (segments, boxes)]
        return (shared >= torch.minimum(*areas) / 2).any(dim=1).float()

    def stitch_maps(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps of the segments (one value per patch, NaN = air) as one of the image: h w, NaN where no segment shows tissue.

        Where segments overlap it is their mean, in which each weighs less towards its edge, so that no seam shows.
        """
        total, weights = torch.zeros(self.grid), torch.zeros(self.grid)
        for (top, left, bottom, right), values in zip(self.boxes_in_patches[1:].tolist(), maps, strict=True):
            weight = triangular_window(bottom - top)[:, None] * triangular_window(right - left) * ~values.isnan()
            total[top:bottom, left:right] += weight * values.nan_to_num()
            weights[top:bottom, left:right] += weight
        return total / weights

    def coverage(self, cells: tuple[int, int]) -> Tensor:
        """How much each part covers of each cell, where `cells` (rows, columns) divide the image evenly: P rows columns, in cells."""

        def along(axis: int) -> Tensor:
            begin, end = (
                self.boxes_in_patches[:, side, None] * cells[axis] / self.grid[axis] for side in (axis, axis + 2)
            )
            cell = torch.arange(cells[axis])
            return (torch.minimum(end, cell + 1) - torch.maximum(begin, cell)).clamp(0, 1)

        return along(0)[:, :, None] * along(1)[:, None, :]


def triangular_window(length: int) -> Tensor:
    """1, 2, 3 ... 2, 1."""
    return torch.minimum(torch.arange(length) + 1, length - torch.arange(length)).float()


def cut_segments(image: PackedBatch, config: SegmentsConfig) -> SegmentedImage:
    """The one image of `image` in parts; segments are views of its pixels. Only its kept patches are looked at."""
    (pixels,), (kept,), (grid,), patch = image.images, image.patch_indices, image.grids, image.patch
    tissue = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    tissue[kept.cpu()] = True
    tissue = tissue.unflatten(0, grid)
    segments = place_segments(tissue, config.segments // patch, config.segment_overlap // patch)
    images, inside = [], []
    for top, left, bottom, right in segments.tolist():
        images.append(pixels[:, top * patch : bottom * patch, left * patch : right * patch])
        inside.append(tissue[top:bottom, left:right].flatten().nonzero().squeeze(1).to(kept.device))
    count = len(images)
    parts = PackedBatch(image.names * count, tuple(images), tuple(inside), patch, image.metadata * count)
    millimetres = image.metadata[0].mm_per_pixel
    mm_per_patch = patch * (NOMINAL_HEIGHT_MM / pixels.shape[-2] if math.isnan(millimetres) else millimetres)
    placed = torch.cat([torch.tensor([[0, 0, *grid]]), segments])
    return SegmentedImage(
        packed_batch.concat_separate_packs([downscaled_overview(image, config.segment_context), parts]),
        placed,
        grid,
        mm_per_patch,
    )


def downscaled_overview(image: PackedBatch, side: int) -> PackedBatch:
    """The one image of `image` as a small one, its longer side at most `side` pixels."""
    (pixels,) = image.images
    scale = min(1.0, side / max(pixels.shape[-2:]))
    height, width = (max(image.patch, round(length * scale)) for length in pixels.shape[-2:])
    small = F.interpolate(pixels[None], size=(height, width), mode="area")[0]
    everything = len(image.patch_indices[0]) == math.prod(image.grids[0])  # whoever looks at air looks at it here, too
    return packed_batch.pack_images([small], image.patch, image.names, everything, image.metadata)


@dataclass(frozen=True)
class SegmentsOutput:
    """What was seen of the images of a pack."""

    features: Tensor
    """I D, what the head reads of each image."""
    parts: tuple[SegmentedImage, ...]
    """What was read of each image."""
    logits: tuple[Tensor, ...]
    """P, what the head says of each part by itself."""
    scores: tuple[Tensor, ...]
    """S, how telling the view of the whole found each segment that was read."""
    attention: tuple[Tensor, ...]
    """P, how much the image's summary attended to each part; sums to 1."""


class SegmentAggregator(nn.Module):
    """What makes one summary of an image's parts, and knows which are worth reading."""

    def __init__(self, config: SegmentsConfig, vit: ViTConfig) -> None:
        """Raises UsageError where the sizes do not fit the trunk."""
        super().__init__()
        check_segments(config, vit.patch, vit.num_prefix_tokens)
        self.config = config
        self.patch, self.prefix = vit.patch, vit.num_prefix_tokens
        self.place = nn.Linear(4 * len(WAVELENGTHS_MM), vit.dim)
        self.scales = nn.Parameter(torch.empty(2, vit.dim))  # the whole, a segment
        self.scorer = nn.Linear(vit.dim, 1)
        self.integrator = Integrator(replace(vit, layer_scale=None), INTEGRATOR_DEPTH)
        for token in (self.place.weight, self.scales, self.scorer.weight):
            nn.init.trunc_normal_(token, std=0.02)

    def set_token_budget(self, budget: int) -> None:
        """Encode at most `budget` tokens at once, which changes no number. Raises UsageError where that is too few for a part."""
        self.config = replace(self.config, segment_budget=budget)
        check_segments(self.config, self.patch, self.prefix)

    def encode_and_aggregate(
        self, trunk: PartEncoder, pack: PackedBatch, lesions: Sequence[Tensor] = ()
    ) -> SegmentsOutput:
        """Cut, choose, encode and integrate. While it trains, segments that show one of an image's `lesions` (K 4, pixels) are chosen."""
        every = [cut_segments(image, self.config) for image in pack]
        whole, view_logits, patches = self.encode(
            trunk, packed_batch.concat_separate_packs([each.pack.select([0]) for each in every])
        )
        found = [self.score_segments(*each) for each in zip(every, patches, strict=True)]
        known = lesions or [torch.empty(0, 4)] * len(pack)
        chosen = [self.choose_segments(*each) for each in zip(every, found, known, strict=True)]
        parts = [each.select_segments(numbers) for each, numbers in zip(every, chosen, strict=True)]
        counts = [len(each) - 1 for each in parts]
        segments, segment_logits, _ = self.encode(
            trunk, packed_batch.concat_separate_packs([each.pack.select(range(1, len(each))) for each in parts])
        )
        summaries, logits = (
            [torch.cat(pair) for pair in zip(of_wholes.split(1), of_segments.split(counts), strict=True)]
            for of_wholes, of_segments in ((whole, segments), (view_logits, segment_logits))
        )
        placed = torch.cat(
            [self.add_position_encoding(*each) for each in zip(summaries, parts, strict=True)]
        )  # all P D
        # detached: a segment's logit is taught what it shows, not how much its part of the image should weigh
        told = torch.cat(logits).detach().float().clamp(-MAX_WEIGHT_LOGIT, MAX_WEIGHT_LOGIT).exp()
        lengths = [1 + count for count in counts]
        features = self.integrator(placed, lengths, told)
        with torch.no_grad():
            attention = self.integrator.attention(placed, lengths, told)
        scores = [score[numbers] for score, numbers in zip(found, chosen, strict=True)]
        return SegmentsOutput(features, tuple(parts), tuple(logits), tuple(scores), tuple(attention))

    def encode(self, trunk: PartEncoder, parts: PackedBatch) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Summaries, logits and patch scores of parts, in groups that fit the budget; recomputed where gradients are wanted."""

        def group(some: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
            summaries, logits, patches = trunk(some)
            return summaries, logits, self.scorer(torch.cat(patches)).squeeze(-1)

        wanted = torch.is_grad_enabled()
        done = [
            checkpoint(group, each, use_reentrant=False) if wanted else group(each)
            for each in self.token_budget_groups(parts)
        ]
        summaries, logits, scores = (torch.cat(each) for each in zip(*done, strict=True))
        return summaries, logits, list(scores.split(parts.sequence_lengths(0)))

    def token_budget_groups(self, parts: PackedBatch) -> Iterator[PackedBatch]:
        """Consecutive parts of at most `segment_budget` tokens."""
        return packed_batch.split_by_token_budget(parts, self.config.segment_budget, self.prefix)

    def score_segments(self, parts: SegmentedImage, seen: Tensor) -> Tensor:
        """How telling each segment is: the mean of the scores of the view's patches (N) that it covers; S."""
        view = parts.pack.select([0])
        (grid,) = view.scatter_to_grid([seen])
        kept = ~grid.isnan()
        cover = parts.coverage((grid.shape[0], grid.shape[1]))[1:].to(seen) * kept
        return (cover * grid.nan_to_num()).sum((1, 2)) / cover.sum((1, 2)).clamp(min=1e-6)

    def choose_segments(self, parts: SegmentedImage, scores: Tensor, lesions: Tensor) -> Tensor:
        """Numbers of the segments to read, ascending. In training with `segment_samples` those with a lesion first, then by chance."""
        config, count = self.config, len(parts) - 1
        if self.training and config.segment_samples:
            order = torch.randperm(count)
            first = parts.contains_lesion(lesions.cpu())[order]
            return order[first.argsort(descending=True, stable=True)][: config.segment_samples].sort().values
        if config.segment_top:
            return scores.detach().cpu().topk(min(config.segment_top, count)).indices.sort().values
        return torch.arange(count)

    def add_position_encoding(self, summaries: Tensor, parts: SegmentedImage) -> Tensor:
        """Summaries with where each part lies and at which scale: P D."""
        angles = parts.centres_mm[:, :, None] * (2 * math.pi / torch.tensor(WAVELENGTHS_MM))  # P 2 F
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1).to(summaries)
        scales = self.scales[[0] + [1] * (len(parts) - 1)]
        return summaries + self.place(waves).to(summaries.dtype) + scales.to(summaries.dtype)


def segment_losses(reading: SegmentsOutput, labels: Tensor, lesions: Sequence[Tensor]) -> Tensor:
    """What the parts are taught, one loss per image: I.

    A segment's own logit is taught whether it shows a lesion (K 4, pixels); in an image without cancer none does, and where the cancer's
    place is not known, nothing is taught. The scores are taught what the summary attends to (as Katharopoulos and Fleuret 2019, arXiv
    1905.03711, sample by attention) or, where they are known, the segments with a lesion.
    """
    found = []
    read = zip(reading.parts, reading.logits, reading.scores, reading.attention, strict=True)
    for (parts, logits, scores, attention), label, boxes in zip(read, labels, lesions, strict=True):
        own = logits[1:]
        shown = (parts.contains_lesion(boxes.cpu()) * float(label == 1)).to(own)
        certain = label == 0 or (label == 1 and bool(shown.any()))
        weights = shown / (2 * shown.sum()).clamp(min=1) + (1 - shown) / (2 * (1 - shown).sum()).clamp(
            min=1
        )  # both kinds weigh alike
        taught = (
            F.binary_cross_entropy_with_logits(own.float(), shown, weights, reduction="sum")
            if certain
            else own.new_zeros(())
        )
        wanted = shown if shown.any() else attention[1:].to(own)
        wanted = wanted / wanted.sum().clamp(min=1e-6)
        found.append(taught - SELECTION_LOSS_WEIGHT * (wanted * scores.float().log_softmax(dim=0)).sum())
    return torch.stack(found)
