"""Tell whether the region that was found in an image can be a breast.

A screening mammogram shows one breast. Its chest wall is a straight vertical line, its skin line is smooth and convex,
dark air lies beyond the skin, and its tissue is neither flat nor noise. Each of these facts is a measure with a usual
range, which holds 98 to 99 % of real mammograms, and an impossible value, which lies at the edge of or beyond what
any of them has. How far a measure is on its way from usual to impossible is its excess; an image whose excesses add up
to 1 is no mammogram. One impossible measure is therefore enough, and so are several unusual ones.

The ranges were set on the real images and on the first seeds of the other pictures of `benchmarks/refusals.py`, which
measures both kinds of error, also on pictures that were not used here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from vitmodel.pixels.crop import BreastRegion

JUDGED_SIZE = 128
"""Long side of the breast, in pixels, at which it is measured; a smaller breast is measured as it is."""
MIN_SIZE_FOR_SHAPE = 24
"""Least long side of the breast, in pixels, for a judgement of its shape."""
MIN_SIZE_FOR_TEXTURE = 96
"""The same for its texture."""
AIR_GAP = 2
"""Distance in pixels from the skin to the band in which the air is measured."""
AIR_BAND = 8
"""Width of that band in pixels."""
OTHER_REGION_WIDTH = 11
"""Least width, in pixels, of another bright region that is not a letter, a marker or a scratch."""


class Range(NamedTuple):
    """A measure's usual end, its impossible value, and the sentence for values beyond the usual end."""

    usual: float
    impossible: float
    finding: str


RANGES: dict[str, tuple[Range, ...]] = {
    "wall": (Range(0.87, 0.79, "no side of the region is a straight vertical chest wall"),),
    "fill": (
        Range(0.60, 0.50, "the region is too hollow"),
        Range(0.945, 0.975, "the region is a rectangle"),
    ),
    "solidity": (Range(0.93, 0.84, "the outline is not convex"),),
    "roughness": (Range(0.011, 0.025, "the outline is ragged"),),
    "aspect": (
        Range(0.34, 0.25, "the region is too narrow"),
        Range(1.10, 1.35, "the region is wider than high"),
    ),
    "air_length": (Range(4.5, 0.5, "there is no air beyond the skin"),),
    "air_tone": (Range(0.35, 0.6, "the surroundings are not dark"),),
    "air_spread": (Range(0.23, 0.4, "the surroundings are not uniform"),),
    "skin_step": (Range(0.14, 0.08, "no skin line separates the region from its surroundings"),),
    "behind": (Range(0.001, 0.02, "there is tissue behind the chest wall, as where two breasts are in one picture"),),
    "other_regions": (Range(0.03, 0.3, "there are other regions like it, as where two breasts are in one picture"),),
    "first_row": (Range(0.24, 0.45, "the region lies at the bottom of the picture"),),
    "fine_texture": (
        Range(0.009, 0.005, "the region has no texture"),
        Range(0.13, 0.2, "the region is noise or print"),
    ),
    "coarse_texture": (
        Range(0.027, 0.012, "the region is flat"),
        Range(0.09, 0.11, "the region is made of patches"),
    ),
    "peakedness": (Range(3.5, 2.8, "the texture is that of noise or a pattern"),),
    "dark_fraction": (Range(0.1, 0.2, "the region has dark parts, as lungs or shadows"),),
    "height_mm": (
        Range(40, 8, "the region is too small"),
        Range(310, 400, "the region is larger than a detector for mammography"),
    ),
}
"""Measure -> its ranges; see `measure_region` for the measures.

Of real mammograms (`rsna_640`, `rsna_crop256`, `mias_512`), 98 to 99 % lie within the usual ends.
"""


@dataclass(frozen=True)
class Implausibility:
    """How little a region is like a breast."""

    excess: float
    """Sum of the excesses; from 1 on, the image is no mammogram."""
    findings: tuple[str, ...]
    """What is unusual, worst first."""


def judge_region(grey: np.ndarray, breast: BreastRegion, mm_per_pixel: float | None = None) -> Implausibility:
    """Return how implausible a region is as a breast.

    Args:
        grey: The view `(H, W)` in [0, 1] that was given to `crop.find_breast`.
        breast: The region that it returned.
        mm_per_pixel: Distance of the rows of the view, if known.
    """
    x0, y0, x1, y1 = breast.box
    if max(x1 - x0, y1 - y0) < MIN_SIZE_FOR_SHAPE:
        return Implausibility(1, (f"the region is smaller than {MIN_SIZE_FOR_SHAPE} pixels, too small to be judged",))
    measures = measure_region(grey, breast)
    if mm_per_pixel is not None:
        measures["height_mm"] = (breast.box.y1 - breast.box.y0) * mm_per_pixel
    excesses = []
    for name, value in measures.items():
        for limits in RANGES[name]:
            excess = (value - limits.usual) / (limits.impossible - limits.usual)
            if excess > 0:
                excesses.append((excess, limits.finding))
    excesses.sort(reverse=True)
    return Implausibility(math.fsum(excess for excess, _ in excesses), tuple(finding for _, finding in excesses))


def measure_region(grey: np.ndarray, breast: BreastRegion) -> dict[str, float]:
    """Return the measures of a region; those that its size does not allow are left out.

    Lengths and areas are relative to the region, grey values are tones (square roots) relative to the median of the
    region. All measures but `height_mm` are therefore independent of the scale and the brightness of the image.
    """
    tone, mask = _reduced(grey, breast)
    x, y, width, height = cv2.boundingRect(mask)
    if max(width, height) < MIN_SIZE_FOR_SHAPE:
        return {}
    shape = mask[y : y + height, x : x + width]
    inside = cv2.erode(shape, np.ones((5, 5), np.uint8)) > 0
    tissue = tone[y : y + height, x : x + width]
    level = max(float(np.median(tissue[inside])), 1e-3) if inside.any() else 1.0
    measures = _measure_shape(shape) | {"first_row": y / mask.shape[0]}
    measures |= _measure_surroundings(tone, mask, level)
    if max(width, height) >= MIN_SIZE_FOR_TEXTURE:
        measures |= _measure_texture(np.ascontiguousarray(tissue), inside, level)
    return measures


def _reduced(grey: np.ndarray, breast: BreastRegion) -> tuple[np.ndarray, np.ndarray]:
    """Return the tones and the mask (uint8) of the view, chest wall at the left, breast `JUDGED_SIZE` pixels long."""
    mask = breast.mask.astype(np.uint8)
    x0, y0, x1, y1 = breast.box
    scale = JUDGED_SIZE / max(x1 - x0, y1 - y0)
    if scale < 1:
        size = (max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale)))
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
        mask = (cv2.resize(mask * 255, size, interpolation=cv2.INTER_AREA) >= 128).astype(np.uint8)
    if breast.inverted:
        grey = 1 - grey
    if breast.chest_wall == "right":
        grey, mask = (np.ascontiguousarray(picture[:, ::-1]) for picture in (grey, mask))
    low, high = np.quantile(grey, (0.005, 0.995))
    return np.sqrt(np.clip((grey - low) / max(float(high - low), 1e-6), 0, 1)), mask


def _measure_shape(shape: np.ndarray) -> dict[str, float]:
    """Return the measures of the region's outline; `shape` is its mask, uint8 `(H, W)`, within its bounding box.

    `wall` is the fraction of rows in which the convex hull reaches the chest wall: dark tissue there may be missing
    from the mask.
    """
    height, width = shape.shape
    outlines, _ = cv2.findContours(shape, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    hull = cv2.fillConvexPoly(np.zeros_like(shape), cv2.convexHull(max(outlines, key=cv2.contourArea)), 1)
    reach = (width - shape[:, ::-1].argmax(1)).astype(np.float32)[:, None]
    deviation = np.abs(reach - cv2.blur(reach, (1, 9)))[5:-5]
    return {
        "wall": float(np.mean(hull.argmax(1) <= 2)),
        "fill": float(hull.mean()) if hull.mean() > 0.9 else float(shape.mean()),
        "solidity": float(shape.sum() / hull.sum()),
        "roughness": float(deviation.sum()) / max(1, deviation.size) / max(height, width),
        "aspect": width / height,
    }


def _measure_surroundings(tone: np.ndarray, mask: np.ndarray, level: float) -> dict[str, float]:
    """Return the measures of the air beyond the skin, of what is behind the chest wall, and of other regions."""
    x, y, width, height = cv2.boundingRect(mask)
    near = cv2.dilate(mask, _square(AIR_GAP))
    band = cv2.dilate(near, _square(AIR_BAND)) - near
    reach = x + width - mask[y : y + height, x : x + width][:, ::-1].argmax(1)
    beyond = np.zeros(mask.shape, bool)
    beyond[y : y + height] = np.arange(mask.shape[1]) >= reach[:, None]
    air = (band > 0) & beyond
    measures = {"air_length": air.sum() / max(width, height)}
    if air.sum() > 10:
        quarters = np.quantile(tone[air], (0.25, 0.5, 0.75)) / level
        skin = tone[(mask > 0) & (cv2.dilate(air.astype(np.uint8), _square(7)) > 0)] / level
        measures["air_tone"] = quarters[1]
        measures["air_spread"] = quarters[2] - quarters[0]
        measures["skin_step"] = float(np.median(skin) - quarters[1]) if skin.size > 10 else 1.0
    bright = tone > level / 2
    behind = bright[y : y + height, : max(0, x - AIR_GAP)]
    ends_before_edge = ~bright[y : y + height, :2].any(axis=1)  # tissue up to the edge belongs to the breast itself
    measures["behind"] = behind[ends_before_edge].sum() / mask.sum()
    measures["other_regions"] = _largest_other(bright & (tone < 0.97), mask) / mask.sum()
    return measures


def _square(distance: int) -> np.ndarray:
    """Return a structuring element that reaches `distance` pixels to each side."""
    return np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)


def _largest_other(bright: np.ndarray, mask: np.ndarray) -> float:
    """Return the area of the largest bright region apart from the breast, without arm and belly.

    Arm and belly lie above and below the breast, and are cut off from it.
    """
    x, y, width, height = cv2.boundingRect(mask)
    apart = (bright & (cv2.dilate(mask, _square(3)) == 0)).astype(np.uint8)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (OTHER_REGION_WIDTH, OTHER_REGION_WIDTH))
    count, _, stats, _ = cv2.connectedComponentsWithStats(cv2.morphologyEx(apart, cv2.MORPH_OPEN, disc))
    largest = 0.0
    for left, top, columns, rows, area in stats[1:count]:
        is_arm_or_belly = (top + rows <= y + 4 or top >= y + height - 4) and left < x + width
        is_narrow = min(columns, rows) < 0.2 * max(width, height)
        if not is_arm_or_belly and not is_narrow:
            largest = max(largest, float(area))
    return largest


def _measure_texture(tissue: np.ndarray, inside: np.ndarray, level: float) -> dict[str, float]:
    """Return the contrast of fine and of coarse detail, the kurtosis of the detail, and the fraction of dark pixels."""
    if inside.sum() < 50:
        return {}
    blurred = [tissue, *(cv2.GaussianBlur(tissue, (0, 0), sigma) for sigma in (1, 2, 4, 8))]
    values = [picture[inside] for picture in blurred]
    mean = max(float(values[0].mean()), 1e-3)
    detail = values[0] - values[2]
    variance = float(detail.var())
    return {
        "fine_texture": float((values[0] - values[1]).std()) / mean,
        "coarse_texture": float((values[3] - values[4]).std()) / mean,
        "peakedness": float(np.mean((detail - detail.mean()) ** 4)) / max(variance**2, 1e-12),
        "dark_fraction": float(np.mean(values[0] < 0.35 * level)),
    }
