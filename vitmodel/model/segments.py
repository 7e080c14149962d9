"""Large images in parts: overlapping segments where there is tissue, and a downscaled overview of the whole image.

A part is an entry of a pack like any image, so its patches of air are left out. The trunk encodes parts in groups of at
most `segment_budget` tokens. Where gradients are needed, each group is recomputed in the backward pass (Chen et al.
2016, arXiv 1604.06174), so that only the summaries are kept: memory depends on the budget, not on the image size. Each
summary gets an encoding of the part's position (mm from the chest wall and from the top of the crop) and of its scale.
`fusion.Integrator` then computes one summary of the image, in which a part has more weight the higher its own cancer
logit is.

Symbols in shapes: `I` images, `S` segments of one image, `P = 1 + S` parts of one image with the overview first, `N`
kept patches, `D` width of a token, `h` and `w` rows and columns of patches. Boxes of parts are top, left, bottom, right
in patches. Lesion boxes are `(n, 4)`: x0, y0, x1, y1 in pixels.
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
"""A function that encodes a pack of I parts. It returns the summary of each `(I, D)`, the logit that the head computes
from it `(I,)`, and the encoded patches of each, `(N, D)`."""

WAVELENGTHS_MM = (400.0, 200.0, 100.0, 50.0, 25.0, 12.5)
"""Wavelengths of the position encoding in mm. The longest exceeds a breast; the shortest separates neighbouring
segments."""
INTEGRATOR_DEPTH = 2
"""Number of blocks of the transformer that integrates the parts."""
MAX_WEIGHT_LOGIT = 10.0
"""Logit beyond which the weight of a part no longer grows."""
SELECTION_LOSS_WEIGHT = 0.1
"""Weight of the loss of the overview's scores; with 0.5 the trunk stayed on its initial plateau (dev/LOG.md)."""
NOMINAL_HEIGHT_MM = 200.0
"""Assumed height of a crop of unknown pixel spacing in mm: positions are then proportional to this height."""


def check_segments(config: SegmentsConfig, patch: int, prefix: int) -> None:
    """Check that segments fit the trunk.

    Args:
        config: Sizes in pixels and the token budget.
        patch: Side of a patch in pixels.
        prefix: Number of tokens before the patches of each part.

    Raises:
        UsageError: A size is not a multiple of the patch size, or a part may exceed the token budget.
    """
    for name in ("segments", "segment_overlap", "segment_context"):
        side = getattr(config, name)
        suggestion = max(1, round(side / patch)) * patch
        require(
            side % patch == 0,
            name,
            f"{side} is not a multiple of the patch size of {patch} pixels; use for example {suggestion}",
        )
    largest = prefix + (max(config.segments, config.segment_context) // patch) ** 2
    require(
        config.segment_budget >= largest,
        "segment_budget",
        f"{config.segment_budget} tokens are too few for one part, which may have {largest}; "
        f"increase the budget to at least {largest}",
    )


def window_starts(begin: int, end: int, size: int, overlap: int, limit: int) -> list[int]:
    """Return the starts of the fewest evenly spaced windows that cover `begin` to `end`.

    Args:
        begin: First position to cover.
        end: Position after the last one to cover.
        size: Length of a window.
        overlap: Smallest overlap of neighbouring windows.
        limit: Length of the axis; windows lie within 0 and `limit` if they are not longer than it.
    """
    count = max(1, math.ceil((end - begin - overlap) / (size - overlap)))
    first = max(0, min(begin, limit - size))
    last = max(first, end - size)
    return [round(first + (last - first) * number / max(1, count - 1)) for number in range(count)]


def place_segments(tissue: Tensor, size: int, overlap: int) -> Tensor:
    """Return the boxes of segments that cover all patches with tissue.

    Horizontal bands cover the rows with tissue; along each band, segments cover the tissue in it. The outermost
    segments end at the last patch of tissue and never exceed the image. Segments without tissue are left out.

    Args:
        tissue: Whether each patch shows tissue, `(h, w)` bool.
        size: Side of a segment in patches.
        overlap: Smallest overlap of neighbouring segments in patches.

    Returns:
        Boxes `(S, 4)`: top, left, bottom, right in patches.
    """
    h, w = tissue.shape
    boxes = []
    rows = tissue.any(dim=1).nonzero()
    for top in window_starts(int(rows[0]), int(rows[-1]) + 1, size, overlap, h):
        band = tissue[top : top + size]
        columns = band.any(dim=0).nonzero()
        if not len(columns):
            continue
        for left in window_starts(int(columns[0]), int(columns[-1]) + 1, size, overlap, w):
            if band[:, left : left + size].any():
                boxes.append((top, left, min(top + size, h), min(left + size, w)))
    return torch.tensor(boxes)


@dataclass(frozen=True)
class SegmentedImage:
    """One image cut into an overview and segments."""

    pack: PackedBatch
    """The P parts."""
    boxes_in_patches: Tensor
    """Boxes of the parts `(P, 4)`: top, left, bottom, right. The first is the whole image."""
    grid: tuple[int, int]
    """Rows and columns of patches in the image."""
    mm_per_patch: float
    """Side of a patch in mm."""

    def __len__(self) -> int:
        return len(self.boxes_in_patches)

    @property
    def centres_mm(self) -> Tensor:
        """Return the centre of each part, `(P, 2)`: mm down from the top of the crop and mm from the chest wall."""
        return (self.boxes_in_patches[:, :2] + self.boxes_in_patches[:, 2:]) / 2 * self.mm_per_patch

    def select_segments(self, chosen: Tensor) -> SegmentedImage:
        """Return the overview and the segments with the indices `chosen`, counted from 0 without the overview."""
        part_indices = [0, *(1 + chosen).tolist()]
        return replace(self, pack=self.pack.select(part_indices), boxes_in_patches=self.boxes_in_patches[part_indices])

    def contains_lesion(self, boxes: Tensor) -> Tensor:
        """Return whether each segment shows a lesion: 0 or 1, `(S,)`.

        It does if it contains at least half of a lesion box, or if a lesion box covers at least half of the segment.

        Args:
            boxes: Lesion boxes `(n, 4)`: x0, y0, x1, y1 in pixels.
        """
        segments = self.boxes_in_patches[1:, None] * self.pack.patch
        lesions = boxes[None, :, [1, 0, 3, 2]]  # top, left, bottom, right
        top_left = torch.maximum(segments[..., :2], lesions[..., :2])
        bottom_right = torch.minimum(segments[..., 2:], lesions[..., 2:])
        intersection = (bottom_right - top_left).clamp(min=0).prod(-1)
        smaller_area = torch.minimum(_box_areas(segments), _box_areas(lesions))
        return (intersection >= smaller_area / 2).any(dim=1).float()

    def stitch_maps(self, maps: Sequence[Tensor]) -> Tensor:
        """Combine the maps of the segments into one map of the image.

        Overlapping segments are averaged with weights that decrease towards the edge of each segment, so that no seam
        is visible.

        Args:
            maps: One value per patch of each segment, NaN for air.

        Returns:
            A map `(h, w)`, NaN where no segment shows tissue.
        """
        total = torch.zeros(self.grid)
        weights = torch.zeros(self.grid)
        for (top, left, bottom, right), values in zip(self.boxes_in_patches[1:].tolist(), maps, strict=True):
            weight = triangular_window(bottom - top)[:, None] * triangular_window(right - left) * ~values.isnan()
            total[top:bottom, left:right] += weight * values.nan_to_num()
            weights[top:bottom, left:right] += weight
        return total / weights

    def coverage(self, cells: tuple[int, int]) -> Tensor:
        """Return the share of each cell that each part covers, `(P, rows, columns)`.

        Args:
            cells: Rows and columns of cells that divide the image evenly.
        """
        return self._axis_coverage(0, cells[0])[:, :, None] * self._axis_coverage(1, cells[1])[:, None, :]

    def _axis_coverage(self, axis: int, count: int) -> Tensor:
        """Return the share of each of `count` intervals along `axis` that each part covers, `(P, count)`."""
        begin = self.boxes_in_patches[:, axis, None] * count / self.grid[axis]
        end = self.boxes_in_patches[:, axis + 2, None] * count / self.grid[axis]
        cell = torch.arange(count)
        return (torch.minimum(end, cell + 1) - torch.maximum(begin, cell)).clamp(0, 1)


def _box_areas(boxes: Tensor) -> Tensor:
    """Return the areas of boxes `(..., 4)`: top, left, bottom, right."""
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def triangular_window(length: int) -> Tensor:
    """Return the weights 1, 2, 3, ..., 3, 2, 1 of the given length."""
    return torch.minimum(torch.arange(length) + 1, length - torch.arange(length)).float()


def cut_segments(image: PackedBatch, config: SegmentsConfig) -> SegmentedImage:
    """Cut an image into an overview and segments that cover its kept patches.

    Args:
        image: A pack of one image. The pixels of the segments are views of its pixels.
        config: Sizes in pixels.
    """
    (pixels,) = image.images
    (kept,) = image.patch_indices
    (grid,) = image.grids
    patch = image.patch
    tissue = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    tissue[kept.cpu()] = True
    tissue = tissue.unflatten(0, grid)
    boxes = place_segments(tissue, config.segments // patch, config.segment_overlap // patch)
    segment_images = []
    segment_patches = []
    for top, left, bottom, right in boxes.tolist():
        segment_images.append(pixels[:, top * patch : bottom * patch, left * patch : right * patch])
        segment_patches.append(tissue[top:bottom, left:right].flatten().nonzero().squeeze(1).to(kept.device))
    count = len(segment_images)
    segments = PackedBatch(
        image.names * count, tuple(segment_images), tuple(segment_patches), patch, image.metadata * count
    )
    overview = downscaled_overview(image, config.segment_context)
    mm_per_pixel = image.metadata[0].mm_per_pixel
    if math.isnan(mm_per_pixel):
        mm_per_pixel = NOMINAL_HEIGHT_MM / pixels.shape[-2]
    return SegmentedImage(
        pack=packed_batch.concat_separate_packs([overview, segments]),
        boxes_in_patches=torch.cat([torch.tensor([[0, 0, *grid]]), boxes]),
        grid=grid,
        mm_per_patch=patch * mm_per_pixel,
    )


def downscaled_overview(image: PackedBatch, side: int) -> PackedBatch:
    """Return a smaller copy of the image whose longer side has at most `side` pixels.

    If the image keeps all its patches, air included, the copy keeps them too.
    """
    (pixels,) = image.images
    scale = min(1.0, side / max(pixels.shape[-2:]))
    height, width = (max(image.patch, round(length * scale)) for length in pixels.shape[-2:])
    small = F.interpolate(pixels[None], size=(height, width), mode="area")[0]
    keeps_air = len(image.patch_indices[0]) == math.prod(image.grids[0])
    return packed_batch.pack_images([small], image.patch, image.names, keeps_air, image.metadata)


@dataclass(frozen=True)
class SegmentsOutput:
    """Results for the images of a pack."""

    features: Tensor
    """Input of the head for each image, `(I, D)`."""
    parts: tuple[SegmentedImage, ...]
    """The parts that were read of each image."""
    logits: tuple[Tensor, ...]
    """For each image the logit of each part alone, `(P,)`."""
    scores: tuple[Tensor, ...]
    """For each image the overview's score of each segment that was read, `(S,)`; the higher, the more informative."""
    attention: tuple[Tensor, ...]
    """For each image the attention of its summary to each part, `(P,)`; sums to 1."""


@dataclass(frozen=True)
class _EncodedParts:
    """Results of the trunk for parts."""

    summaries: Tensor
    """`(I, D)`"""
    logits: Tensor
    """`(I,)`"""
    patch_scores: list[Tensor]
    """For each part the score of each kept patch, `(N,)`."""


class SegmentAggregator(nn.Module):
    """Selection of segments and aggregation of an image's parts into one summary.

    Args:
        config: Sizes in pixels, the token budget and the number of segments to read.
        vit: The trunk.

    Raises:
        UsageError: The sizes do not fit the trunk.
    """

    def __init__(self, config: SegmentsConfig, vit: ViTConfig) -> None:
        super().__init__()
        check_segments(config, vit.patch, vit.num_prefix_tokens)
        self.config = config
        self.patch = vit.patch
        self.prefix = vit.num_prefix_tokens
        self.place = nn.Linear(4 * len(WAVELENGTHS_MM), vit.dim)
        self.scales = nn.Parameter(torch.empty(2, vit.dim))  # overview, segment
        self.scorer = nn.Linear(vit.dim, 1)
        self.integrator = Integrator(replace(vit, layer_scale=None), INTEGRATOR_DEPTH)
        for token in (self.place.weight, self.scales, self.scorer.weight):
            nn.init.trunc_normal_(token, std=0.02)

    def set_token_budget(self, budget: int) -> None:
        """Encode at most `budget` tokens at once; the results do not depend on it.

        Raises:
            UsageError: The budget is too small for one part.
        """
        self.config = replace(self.config, segment_budget=budget)
        check_segments(self.config, self.patch, self.prefix)

    def encode_and_aggregate(
        self, trunk: PartEncoder, pack: PackedBatch, lesions: Sequence[Tensor] = ()
    ) -> SegmentsOutput:
        """Cut each image, select segments, encode the parts and aggregate them.

        Args:
            trunk: The encoder of parts.
            pack: The images.
            lesions: For each image its lesion boxes `(n, 4)`: x0, y0, x1, y1 in pixels; empty = none. In training with
                `segment_samples`, segments that show one are selected first.
        """
        images = [cut_segments(image, self.config) for image in pack]
        overviews = self.encode(trunk, _concat_parts([image.pack.select([0]) for image in images]))
        all_scores = [
            self.score_segments(image, scores) for image, scores in zip(images, overviews.patch_scores, strict=True)
        ]
        lesion_boxes = lesions or [torch.empty(0, 4)] * len(pack)
        selected = [
            self.choose_segments(image, scores, boxes)
            for image, scores, boxes in zip(images, all_scores, lesion_boxes, strict=True)
        ]
        parts = [image.select_segments(indices) for image, indices in zip(images, selected, strict=True)]
        counts = [len(image) - 1 for image in parts]
        segments = self.encode(trunk, _concat_parts([image.pack.select(range(1, len(image))) for image in parts]))
        summaries = _interleave(overviews.summaries, segments.summaries, counts)
        logits = _interleave(overviews.logits, segments.logits, counts)
        encoded = [self.add_position_encoding(*pair) for pair in zip(summaries, parts, strict=True)]
        tokens = torch.cat(encoded)  # (P of all images, D)
        # detached: a segment's logit learns what the segment shows, not how much weight it should have in the image
        weights = torch.cat(logits).detach().float().clamp(-MAX_WEIGHT_LOGIT, MAX_WEIGHT_LOGIT).exp()
        lengths = [1 + count for count in counts]
        features = self.integrator(tokens, lengths, weights)
        with torch.no_grad():
            attention = self.integrator.attention(tokens, lengths, weights)
        scores = [image_scores[indices] for image_scores, indices in zip(all_scores, selected, strict=True)]
        return SegmentsOutput(features, tuple(parts), tuple(logits), tuple(scores), tuple(attention))

    def encode(self, trunk: PartEncoder, parts: PackedBatch) -> _EncodedParts:
        """Encode parts in groups within the token budget; groups are recomputed in the backward pass."""

        def encode_group(group: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
            summaries, logits, patches = trunk(group)
            return summaries, logits, self.scorer(torch.cat(patches)).squeeze(-1)

        needs_gradients = torch.is_grad_enabled()
        results = []
        for group in self.token_budget_groups(parts):
            results.append(
                checkpoint(encode_group, group, use_reentrant=False) if needs_gradients else encode_group(group)
            )
        summaries, logits, scores = (torch.cat(tensors) for tensors in zip(*results, strict=True))
        return _EncodedParts(summaries, logits, list(scores.split(parts.sequence_lengths(0))))

    def token_budget_groups(self, parts: PackedBatch) -> Iterator[PackedBatch]:
        """Yield packs of consecutive parts with at most `segment_budget` tokens."""
        return packed_batch.split_by_token_budget(parts, self.config.segment_budget, self.prefix)

    def score_segments(self, parts: SegmentedImage, patch_scores: Tensor) -> Tensor:
        """Return the score of each segment, `(S,)`: the mean score of the overview's patches that it covers.

        Args:
            parts: The image with all its segments.
            patch_scores: Score of each kept patch of the overview, `(N,)`.
        """
        overview = parts.pack.select([0])
        (grid,) = overview.scatter_to_grid([patch_scores])
        kept = ~grid.isnan()
        coverage = parts.coverage((grid.shape[0], grid.shape[1]))[1:].to(patch_scores) * kept
        return (coverage * grid.nan_to_num()).sum((1, 2)) / coverage.sum((1, 2)).clamp(min=1e-6)

    def choose_segments(self, parts: SegmentedImage, scores: Tensor, lesions: Tensor) -> Tensor:
        """Return the indices of the segments to read, ascending.

        In training with `segment_samples`, those with a lesion come first and the others at random. Otherwise the
        `segment_top` best by score are read, or all of them.

        Args:
            parts: The image with all its segments.
            scores: Score of each segment, `(S,)`.
            lesions: Lesion boxes `(n, 4)`: x0, y0, x1, y1 in pixels.
        """
        config = self.config
        count = len(parts) - 1
        if self.training and config.segment_samples:
            order = torch.randperm(count)
            has_lesion = parts.contains_lesion(lesions.cpu())[order]
            lesions_first = order[has_lesion.argsort(descending=True, stable=True)]
            return lesions_first[: config.segment_samples].sort().values
        if config.segment_top:
            return scores.detach().cpu().topk(min(config.segment_top, count)).indices.sort().values
        return torch.arange(count)

    def add_position_encoding(self, summaries: Tensor, parts: SegmentedImage) -> Tensor:
        """Add encodings of each part's position and scale to its summary, `(P, D)`."""
        angles = parts.centres_mm[:, :, None] * (2 * math.pi / torch.tensor(WAVELENGTHS_MM))  # (P, 2, wavelengths)
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1).to(summaries)
        scales = self.scales[[0] + [1] * (len(parts) - 1)]
        return summaries + self.place(waves).to(summaries.dtype) + scales.to(summaries.dtype)


def _concat_parts(packs: Sequence[PackedBatch]) -> PackedBatch:
    return packed_batch.concat_separate_packs(packs)


def _interleave(overviews: Tensor, segments: Tensor, counts: list[int]) -> list[Tensor]:
    """Return for each image the rows of its overview and of its segments, of which it has `counts`."""
    pairs = zip(overviews.split(1), segments.split(counts), strict=True)
    return [torch.cat([overview, own_segments]) for overview, own_segments in pairs]


def segment_losses(reading: SegmentsOutput, labels: Tensor, lesions: Sequence[Tensor]) -> Tensor:
    """Return the loss of the parts for each image, `(I,)`.

    It is the sum of two terms:

    - The logit of each segment alone learns whether the segment shows a lesion. In an image without cancer no segment
      does; in an image with cancer of unknown location the term is 0.
    - The overview's scores learn the segments with a lesion or, where the location is unknown, the attention of the
      image's summary (Katharopoulos and Fleuret 2019, arXiv 1905.03711, sample by attention likewise).

    Args:
        reading: Results for the images.
        labels: 1 = cancer, 0 = no cancer for each image, `(I,)`.
        lesions: For each image its lesion boxes `(n, 4)`: x0, y0, x1, y1 in pixels.
    """
    losses = []
    images = zip(reading.parts, reading.logits, reading.scores, reading.attention, labels, lesions, strict=True)
    for parts, logits, scores, attention, label, boxes in images:
        segment_logits = logits[1:]
        shown = (parts.contains_lesion(boxes.cpu()) * float(label == 1)).to(segment_logits)
        location_known = label == 0 or (label == 1 and bool(shown.any()))
        loss = _lesion_loss(segment_logits, shown) if location_known else segment_logits.new_zeros(())
        target = shown if shown.any() else attention[1:].to(segment_logits)
        target = target / target.sum().clamp(min=1e-6)
        losses.append(loss - SELECTION_LOSS_WEIGHT * (target * scores.float().log_softmax(dim=0)).sum())
    return torch.stack(losses)


def _lesion_loss(logits: Tensor, shown: Tensor) -> Tensor:
    """Return the cross-entropy of segments' logits; segments with and without a lesion have equal total weight."""
    with_lesion = shown / (2 * shown.sum()).clamp(min=1)
    without_lesion = (1 - shown) / (2 * (1 - shown).sum()).clamp(min=1)
    return F.binary_cross_entropy_with_logits(logits.float(), shown, with_lesion + without_lesion, reduction="sum")
