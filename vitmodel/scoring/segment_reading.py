"""What a network that reads large images in segments read of one image, and how much it attended to each part."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from vitmodel.errors import UsageError
from vitmodel.model.network import Network
from vitmodel.model.packed_batch import PackedBatch
from vitmodel.pixels.preprocessing import CropGeometry
from vitmodel.scoring.explanation import score_image
from vitmodel.scoring.predictor import Predictor

Box = tuple[int, int, int, int]
"""Top, left, bottom, right in patches of the crop."""


@dataclass(frozen=True, eq=False)
class ReadSegment:
    """A segment that a network read."""

    corners: np.ndarray
    """Its corners in pixels of the source image, `(4, 2)` as (x, y)."""
    attention: float
    """Share of the attention of the image's summary. Those of all segments and of the overview add up to 1."""
    score: float
    """Raw score of the segment alone, 0 to 1, which is not calibrated."""


@dataclass(frozen=True, eq=False)
class SegmentReading:
    """The segments that were read of an image; the means over all models."""

    segments: tuple[ReadSegment, ...]
    """Those with the most attention first."""
    overview_attention: float
    """Share of the attention that the downscaled overview of the whole image has."""
    probability: float
    """Calibrated probability of the image."""


def read_segments(table: pd.DataFrame, predictor: Predictor) -> SegmentReading:
    """Score the only image of a manifest, and return the segments that were read of it.

    Args:
        table: A manifest of one row.
        predictor: The loaded packages, which read images in segments.

    Raises:
        UsageError: The packages read whole images, or `scoring.explanation.score_image` refuses the image.
    """
    ensemble = predictor.ensemble
    if ensemble.model.segments is None:
        raise UsageError(f"segments: {ensemble.packages[0].folder} reads whole images; train with --segments")
    _, scored = score_image(table, predictor)
    pack, geometry = scored.loaded.pack, scored.loaded.cropped.geometry
    assert pack is not None
    assert geometry is not None
    image = next(iter(pack)).to(ensemble.device)
    models = [model for package in ensemble.packages for model in package.models]
    readings = [_read(model, image) for model in models]
    boxes = sorted({box for parts, _ in readings for box in parts})
    segments = []
    for box in boxes:
        found = [parts[box] for parts, _ in readings if box in parts]
        attention = sum(weight for weight, _ in found) / len(models)  # a model that did not read it did not attend
        score = float(np.mean([score for _, score in found]))
        segments.append(ReadSegment(_corners(box, pack.patch, geometry), attention, score))
    return SegmentReading(
        segments=tuple(sorted(segments, key=lambda segment: -segment.attention)),
        overview_attention=float(np.mean([overview for _, overview in readings])),
        probability=float(ensemble.probability(scored.logits[:1])[0]),
    )


def _read(model: Network, image: PackedBatch) -> tuple[dict[Box, tuple[float, float]], float]:
    """Return attention and raw score of each segment that a model reads, and the attention of the overview."""
    with torch.inference_mode():
        reading = model.encode_segments(image)
    (parts,), (attention,), (logits,) = reading.parts, reading.attention, reading.logits
    overview, *weights = attention.float().cpu().tolist()
    scores = logits.float().sigmoid().cpu().tolist()[1:]
    boxes = [tuple(box) for box in parts.boxes_in_patches[1:].tolist()]
    return dict(zip(boxes, zip(weights, scores, strict=True), strict=True)), overview


def _corners(box: Box, patch: int, geometry: CropGeometry) -> np.ndarray:
    """Return the corners of a box of patches in pixels of the source image, `(4, 2)` as (x, y)."""
    # Pixel centres have integer coordinates, so the edge of the first pixel is at -0.5.
    top, left, bottom, right = (patch * edge - 0.5 for edge in box)
    corners = np.array([[left, top, 1], [right, top, 1], [right, bottom, 1], [left, bottom, 1]])
    return np.asarray(corners @ geometry.to_source().T)
