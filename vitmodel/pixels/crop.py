"""Where the breast lies in a low-resolution view of a mammogram, and at which side its chest wall is. Knows no file and no laterality.

Air is the lowest peak of the histogram; the breast is the largest connected component above it (markers, scratches and frames are
others) and the rim that stands out from the air beside it, without the arm above and the belly below, which begin where its outline
turns concave: a breast ends at its inframammary fold, as radiologists' boxes do, while a fold of skin within the outline stays. Lengths
are fractions of the view, so that views of any size give the same breast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import cv2
import numpy as np

from vitmodel.errors import ImageRefusedError
from vitmodel.pixels.verdict import ImageWarning

Side = Literal["left", "right"]

MIN_RANGE = 0.01  # of the grey scale, between the darkest and the brightest half per cent: less is a blank image
MIN_SIDE = 8  # pixels of the view: no breast can be told in fewer
MIN_AREA = 0.01  # of the view; the smallest of 1,700 RSNA breasts covers 0.02
MAX_AIR_LEVEL = 0.006  # of the view's range: what is darker is air, whatever the histogram says
FOG_WIDTH, FOG_AREA, FOG_EDGE = (
    24,
    0.05,
    0.2,
)  # of a second peak of air: tones to its foot, part of the picture, part of its outer edge
RIM, RIM_AIR, RIM_STEP = (
    0.08,
    0.01,
    8,
)  # of fat hardly brighter than air: its width, as LEAST_WIDTH; the air around; tones above air
MIN_WIDTH = 11 / 512  # of the view's long side: what is thinner is a letter, a scratch or a frame
NIPPLE = (
    0.1  # of the breast's rows: a disc of this radius fits into a breast, an arm and a belly, but not into a nipple
)
MIN_NOTCH = 0.03  # depth of a concavity that ends the breast, as a fraction of its rows
MIN_SIDE_DIFFERENCE = 0.1  # of the breast's width: the two sides must differ by as much in their distance from the box


class BoundingBox(NamedTuple):
    """Whole pixels; x1 and y1 are excluded."""

    x0: int
    y0: int
    x1: int
    y1: int


@dataclass(frozen=True)
class BreastRegion:
    """The breast in a view of H W pixels.

    `mask` (bool, H W) is true on the breast with skin line, nipple and the pectoral muscle beside it, and on one pixel around, so that
    neither the view's coarse grid nor noise costs tissue; `box` holds the mask. `chest_wall` is the side of the view on which the
    breast rests. Where `inverted`, the view was bright in the air: the caller takes 1 - grey everywhere, also at
    full resolution, before it puts the mask to use.
    """

    mask: np.ndarray
    box: BoundingBox
    chest_wall: Side
    inverted: bool
    warnings: tuple[ImageWarning, ...] = ()


def find_breast(grey: np.ndarray) -> BreastRegion:
    """The breast in `grey` (H W, float32 in [0, 1], brighter = denser, padding = 0), a view of the whole image about 512 pixels long.

    Raises ImageRefusedError: `blank` or `no_breast`. A radiograph of another part of the body that fills its image passes for a breast.
    """
    if min(grey.shape) < MIN_SIDE:
        raise ImageRefusedError(
            "no_breast", f"the image is a strip or a speck: its view has {grey.shape[0]} x {grey.shape[1]} pixels"
        )
    warnings = []
    view = _normalised(grey)
    content = _content(view)
    inverted = _is_inverted(view, content)
    if inverted:
        view = 1 - view
        warnings.append(ImageWarning("inverted", "the air is brighter than the breast; the picture was inverted"))
    x0, y0, x1, y1 = content
    tone = np.sqrt(view * 255**2).astype(np.uint8)  # the root spreads the dark tones, where air ends and skin begins
    limit = _air_limit(tone[y0:y1, x0:x1])
    if limit is None:
        warnings.append(
            ImageWarning("doubtful_crop", "no air can be told from tissue by its grey; what is not padding was kept")
        )
    bright = tone > (limit or 255 * MAX_AIR_LEVEL**0.5)
    border = view > 0.95  # white outside the content: of a film or of collimation
    border[y0:y1, x0:x1] = False
    found = [_largest_component(bright & ~border)]
    rim = _rim(tone, ~bright, content, found[0])
    if rim.any():
        found.append(_largest_component(found[0] | rim))
    mask = found[-1]
    chest_wall, certainty = _chest_wall(mask)
    if certainty < MIN_SIDE_DIFFERENCE:
        warnings.append(
            ImageWarning(
                "doubtful_side",
                f"both sides of the breast are alike; the {chest_wall} one was taken for the chest wall",
            )
        )
    ends = [
        _rows_of_breast(each, chest_wall) for each in found
    ]  # a rim found in part must not turn the rest into an arm or a belly
    rows = slice(min(end.start for end in ends), max(end.stop for end in ends))
    if mask[rows].sum() < 0.5 * mask.sum():
        warnings.append(
            ImageWarning("doubtful_crop", "arm or belly would be larger than the breast; nothing was cut off")
        )
    else:
        mask[: rows.start] = mask[rows.stop :] = False
    mask = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    return BreastRegion(mask, _box_around(mask), chest_wall, inverted, tuple(warnings))


def _normalised(grey: np.ndarray) -> np.ndarray:
    """The view stretched to [0, 1] and smoothed, so that neither a pedestal nor the brightness matters. Raises ImageRefusedError."""
    low, high = np.quantile(grey[::4, ::4], (0.005, 0.995))
    if high - low < MIN_RANGE:
        raise ImageRefusedError("blank", f"99 % of the pixels differ by less than {MIN_RANGE:.0%} of the grey scale")
    return cv2.GaussianBlur(np.clip((grey - low) / (high - low), 0, 1).astype(np.float32), (3, 3), 0)


def _is_inverted(view: np.ndarray, content: BoundingBox) -> bool:
    """Whether the air is white: it lies along the edges of the picture, where a white implant or muscle has but a small part.

    It does so further inside, too, where the white border of a film has ended.
    """
    x0, y0, x1, y1 = content
    inside = min(round(MIN_WIDTH * max(view.shape)), (x1 - x0) // 4, (y1 - y0) // 4)
    return all(_is_white_around(view[y0 + margin : y1 - margin, x0 + margin : x1 - margin]) for margin in (0, inside))


def _is_white_around(part: np.ndarray) -> bool:
    edges = np.concatenate([part[0], part[-1], part[:, 0], part[:, -1]])
    white, black = float(np.mean(edges > 0.98)), float(np.mean(edges < 0.1))
    return white > max(0.1, black)


def _content(view: np.ndarray) -> BoundingBox:
    """The view without the lines of one tone at its edges: padding, film borders, white collimation and empty air."""
    step = max(1, max(view.shape) // 128)
    sample = view[step // 2 :: step, step // 2 :: step]
    x0, y0, y1, x1 = 0, 0, *sample.shape
    while True:
        part = sample[y0:y1, x0:x1]
        rows, columns = (
            np.flatnonzero(np.mean(np.abs(part - np.median(part, axis, keepdims=True)) > 0.05, axis) > 0.02)
            for axis in (1, 0)
        )
        if not len(rows) or not len(columns):
            return BoundingBox(0, 0, view.shape[1], view.shape[0])
        if rows[0] == columns[0] == 0 and (rows[-1] + 1, columns[-1] + 1) == part.shape:
            return BoundingBox(x0 * step, y0 * step, min(x1 * step, view.shape[1]), min(y1 * step, view.shape[0]))
        y0, y1, x0, x1 = y0 + rows[0], y0 + rows[-1] + 1, x0 + columns[0], x0 + columns[-1] + 1


def _air_limit(tone: np.ndarray) -> int | None:
    """The tone at which the peak of the air, the darkest one, has fallen into the valley before the tissue; None without a valley.

    Otsu's threshold (1979) parts air and tissue, but well inside the skin; the foot of the air's peak keeps fat and skin. A film may have
    been fogged in one part: the next peak is air as well where it is narrow, large and lies along the edge on the side of the air.
    """
    otsu = int(cv2.threshold(np.ascontiguousarray(tone), 0, 255, cv2.THRESH_OTSU)[0])
    counts = np.bincount(tone.ravel(), minlength=256).astype(float)
    darkest = np.searchsorted(np.cumsum(counts), 0.02 * tone.size)  # scratches and the film's holes are darker than air
    counts = np.convolve(np.pad(counts, 6, mode="edge"), np.full(13, 1 / 13), mode="valid")  # 8-bit sources leave gaps
    peaks = counts == cv2.dilate(counts[:, None], np.ones((25, 1), np.uint8))[:, 0]
    limit = _foot(counts[: otsu + 1], int(darkest + np.argmax(peaks[darkest:])))
    if limit is None:
        return None
    peak = limit + int(np.argmax(peaks[limit:]))
    fogged = _foot(counts[: otsu + 1], peak)
    if fogged is None or fogged - peak > FOG_WIDTH:
        return limit
    fog = (tone > limit) & (tone <= fogged)
    inset = -(-tone.shape[1] // 50)  # the outermost columns are the film's border
    outer = min((inset, -1 - inset), key=lambda column: tone[:, column].mean())
    return fogged if fog.mean() > FOG_AREA and fog[:, outer].mean() > FOG_EDGE else limit


def _foot(counts: np.ndarray, peak: int) -> int | None:
    """The tone at which the peak has fallen into the valley before the end of `counts`; None where there is no valley."""
    start = max(peak, int(255 * MAX_AIR_LEVEL**0.5))
    slope = counts[start:]
    if not len(slope) or slope.min() > 0.5 * counts[peak]:
        return None
    return start + int(np.argmax(slope <= 1.5 * slope.min() + 1))


def _rim(tone: np.ndarray, dim: np.ndarray, content: BoundingBox, mask: np.ndarray) -> np.ndarray:
    """Fat and skin beside the breast (bool, H W) among `dim` (bool, H W), the tones that pass for air.

    Beside the glands of a dense breast on film they are hardly brighter than air, whose own tone drifts over the film. So each place is
    compared with the mean and the standard deviation of what is surely air around it: dim and far from `mask`.
    """
    x0, y0, x1, y1 = content
    reach = round(RIM * max(tone.shape))
    distance = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 3)
    least = np.quantile(tone[y0:y1:4, x0:x1:4], 0.02) / 2  # darker is the padding beside a film
    some, tones = (
        (dim & (distance > reach) & (tone >= least))[::4, ::4].astype(np.float32),
        tone[::4, ::4].astype(np.float32),
    )
    sums = cv2.merge([some, some * tones, some * tones**2])
    share, total, squares = cv2.split(cv2.blur(sums, (2 * reach + 1, 2 * reach + 1), borderType=cv2.BORDER_CONSTANT))
    known = share > RIM_AIR
    share[~known] = 1
    mean = total / share
    deviation = np.sqrt(np.maximum(squares / share - mean**2, 0))
    limit = np.where(
        known, np.maximum(mean + np.maximum(3 * deviation, RIM_STEP), 255 * MAX_AIR_LEVEL**0.5), 255
    ).astype(np.float32)
    rim = dim & (distance <= reach) & (tone > cv2.resize(limit, tone.shape[::-1]))
    return cv2.morphologyEx(rim.astype(np.uint8), cv2.MORPH_OPEN, np.ones((5, 5), np.uint8)).astype(
        bool
    )  # a thinner one is a halo


def _largest_component(tissue: np.ndarray) -> np.ndarray:
    """The largest connected piece of `tissue` (bool, H W), holes filled. Thin bridges to letters and frames do not connect.

    Raises ImageRefusedError.
    """
    width = 2 * round(max(tissue.shape) * MIN_WIDTH / 2) + 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))
    whole = tissue.astype(np.uint8)
    core = cv2.morphologyEx(whole, cv2.MORPH_OPEN, disc)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(core, connectivity=8)
    areas = stats[1:, cv2.CC_STAT_AREA]
    if not len(areas) or areas.max() < MIN_AREA * core.size:
        raise ImageRefusedError(
            "no_breast", f"no connected region brighter than air covers {MIN_AREA:.0%} of the image"
        )
    largest = (labels == 1 + np.argmax(areas)).astype(np.uint8)
    grown = cv2.bitwise_and(
        cv2.dilate(largest, disc), whole
    )  # gives back the nipple and the corners that the opening took
    outlines, _ = cv2.findContours(grown, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.zeros_like(grown), [max(outlines, key=cv2.contourArea)], -1, 1, cv2.FILLED).astype(bool)


def _chest_wall(mask: np.ndarray) -> tuple[Side, float]:
    """The straighter side of the breast, the one that stays nearer to the box, and by how much, as a fraction of the width."""
    columns = np.flatnonzero(mask.any(0))
    rows = mask[mask.any(1), columns[0] : columns[-1] + 1]
    difference = float(np.mean(rows[:, ::-1].argmax(1) - rows.argmax(1))) / rows.shape[1]
    return ("left" if difference >= 0 else "right"), abs(difference)


def _rows_of_breast(mask: np.ndarray, chest_wall: Side) -> slice:
    """The rows of the breast without the arm above and the belly below it."""
    x, first, width, count = cv2.boundingRect(mask.astype(np.uint8))
    upright = mask[first : first + count, x : x + width]
    if chest_wall == "right":
        upright = upright[:, ::-1]
    rounded = _reach(_opened(upright, NIPPLE * count))
    reach = np.maximum(
        rounded, np.minimum(_reach(upright), 0.6 * rounded.max())
    )  # without the nipple, but with the thin ends
    quarter = count // 4
    peak = quarter + int(np.argmax(reach[quarter : count - quarter]))
    above, below = (_end_of_breast(part, MIN_NOTCH * count) for part in (reach[peak::-1], reach[peak:]))
    return slice(first + peak - above, first + peak + below + 1)


def _reach(mask: np.ndarray) -> np.ndarray:
    """How far `mask` reaches from its left edge in each row, in pixels; 0 in empty rows."""
    return np.where(mask.any(1), mask.shape[1] - mask[:, ::-1].argmax(1), 0).astype(float)


def _opened(mask: np.ndarray, radius: float) -> np.ndarray:
    """`mask` (bool, H W) opened by a disc; what lies beyond its edges counts as inside."""
    kept = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 3) > radius
    return cv2.distanceTransform((~kept).astype(np.uint8), cv2.DIST_L2, 3) <= radius


def _end_of_breast(reach: np.ndarray, least_notch: float) -> int:
    """The last row of the breast, where `reach` runs from its widest row (0) upwards or downwards.

    The outline of a breast is convex; where it turns concave, arm, axilla or belly begins. The row taken is the outermost of those
    that lack at least 70 % of the greatest lack to the convex hull: at a skin fold the fold itself, in a shallow concavity, where
    hand-drawn boxes and axillary tails end, some way outwards. Lacks below `least_notch` pixels are none.
    """
    widest = reach[0]
    lowest = np.minimum.accumulate(reach)
    other = (reach > 1.1 * widest) | ((lowest < 0.85 * widest) & (reach > lowest + 0.08 * widest))  # it widens again
    last = int(np.argmax(other)) - 1 if other.any() else len(reach) - 1
    lack = _hull(reach[: last + 1]) - reach[: last + 1]
    if lack.max() < least_notch or reach[np.argmax(lack)] > 0.85 * widest:
        return last
    return int(np.flatnonzero(lack >= 0.7 * lack.max())[-1])


def _hull(values: np.ndarray) -> np.ndarray:
    """The upper convex hull of `values` over their index (Andrew's monotone chain, 1979)."""
    kept: list[int] = []
    heights = values.tolist()  # floats of Python's own are faster, one by one
    for i, height in enumerate(heights):
        while len(kept) > 1:
            a, b = kept[-2:]
            if (heights[b] - heights[a]) * (i - a) > (height - heights[a]) * (b - a):
                break
            kept.pop()
        kept.append(i)
    return np.interp(np.arange(len(values)), kept, values[kept])


def _box_around(mask: np.ndarray) -> BoundingBox:
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    return BoundingBox(x, y, x + width, y + height)
