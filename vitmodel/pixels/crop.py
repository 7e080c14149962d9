"""Find the breast and its chest wall in a low-resolution view of a mammogram.

Air is the darkest peak of the histogram. The breast is the largest connected component above it (markers, scratches and
frames form other components) together with the rim that is brighter than the air next to it. The arm above and the
belly below are cut off where the outline turns concave: the breast ends at its inframammary fold, as in boxes drawn by
radiologists, whereas a skin fold inside the outline is kept. Lengths are fractions of the view, so the result does not
depend on the size of the view.

"Tone" is the square root of the grey value, scaled to 0..255.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import cv2
import numpy as np

from vitmodel.errors import ImageRefusedError
from vitmodel.pixels.verdict import ImageWarning

Side = Literal["left", "right"]

MIN_RANGE = 0.01
"""Least difference between the 0.5 % and 99.5 % quantiles as a fraction of the grey scale; less is a blank image."""
MIN_SIDE = 8
"""Least side of the view in pixels; a breast cannot be recognised in fewer."""
MIN_AREA = 0.01
"""Least area of a breast as a fraction of the view; the smallest of 1,700 RSNA breasts covers 0.02."""
MAX_AIR_LEVEL = 0.006
"""Grey values below this fraction of the view's range are air, regardless of the histogram."""
MAX_AIR_TONE = 255 * MAX_AIR_LEVEL**0.5
"""`MAX_AIR_LEVEL` as a tone."""
FOG_WIDTH = 24
"""Greatest number of tones between the second peak of the air (film fog) and its foot."""
FOG_AREA = 0.05
"""Least fraction of the picture that fog covers."""
FOG_EDGE = 0.2
"""Least fraction of the picture's outer edge that fog covers."""
RIM_WIDTH = 0.08
"""Greatest width of a rim of fat that is hardly brighter than air, as a fraction of the view's long side."""
RIM_AIR = 0.01
"""Least fraction of certain air in the neighbourhood of a rim pixel."""
RIM_STEP = 8
"""Least difference in tones between the rim and the air around it."""
MIN_WIDTH = 11 / 512
"""Least width as a fraction of the view's long side; thinner objects are letters, scratches or frames."""
NIPPLE_RADIUS = 0.1
"""Radius, as a fraction of the breast's rows, of a disc that fits into breast, arm and belly, but not into a nipple."""
MIN_NOTCH = 0.03
"""Least depth of a concavity that ends the breast, as a fraction of its rows."""
MIN_SIDE_DIFFERENCE = 0.1
"""Least difference between the two sides' mean distances from the box, as a fraction of the breast's width."""


class BoundingBox(NamedTuple):
    """A box in whole pixels; x1 and y1 are exclusive."""

    x0: int
    y0: int
    x1: int
    y1: int


@dataclass(frozen=True)
class BreastRegion:
    """The breast in a view of shape `(H, W)`.

    Attributes:
        mask: Breast pixels, bool `(H, W)`. They include skin line, nipple, the adjacent pectoral muscle and a margin of
            one pixel, so that neither the coarse grid of the view nor noise costs tissue.
        box: Bounding box of the mask.
        chest_wall: Side of the view at which the chest wall lies.
        inverted: Whether air is bright in the view. The caller then has to use 1 - grey everywhere, also at full
            resolution, before it applies the mask.
        warnings: Warnings about the region.
    """

    mask: np.ndarray
    box: BoundingBox
    chest_wall: Side
    inverted: bool
    warnings: tuple[ImageWarning, ...] = ()


def find_breast(grey: np.ndarray) -> BreastRegion:
    """Return the breast in a view of the whole image.

    A radiograph of another part of the body that fills its image is not recognised as such and is returned as a breast.

    Args:
        grey: The view, float32 `(H, W)` in [0, 1], brighter = denser, padding = 0, about 512 pixels long.

    Raises:
        ImageRefusedError: The view is blank (`blank`) or shows no breast (`no_breast`).
    """
    height, width = grey.shape
    if min(height, width) < MIN_SIDE:
        raise ImageRefusedError(
            "no_breast",
            f"the image is too narrow: its reduced view has {height} x {width} pixels, "
            f"and each side needs at least {MIN_SIDE}",
        )
    warnings = []
    view = _normalise(grey)
    content = _content_box(view)
    inverted = _is_inverted(view, content)
    if inverted:
        view = 1 - view
        warnings.append(ImageWarning("inverted", "air is brighter than the breast; the image was inverted"))
    tone = np.sqrt(view * 255**2).astype(np.uint8)  # the root spreads the dark tones, where air ends and skin begins
    air_limit = _air_limit(tone[content.y0 : content.y1, content.x0 : content.x1])
    if air_limit is None:
        warnings.append(
            ImageWarning(
                "doubtful_crop", "air and tissue have no distinct grey values; everything but padding was kept"
            )
        )
    masks = _breast_masks(view, tone, content, air_limit or MAX_AIR_TONE)
    mask = masks[-1]
    chest_wall, certainty = _find_chest_wall(mask)
    if certainty < MIN_SIDE_DIFFERENCE:
        warnings.append(
            ImageWarning(
                "doubtful_side",
                f"both sides of the breast have a similar shape; the {chest_wall} side was taken as the chest wall",
            )
        )
    rows = _common_rows(masks, chest_wall)
    if mask[rows].sum() < 0.5 * mask.sum():
        warnings.append(
            ImageWarning("doubtful_crop", "arm or belly would be larger than the breast; nothing was cut off")
        )
    else:
        mask[: rows.start] = False
        mask[rows.stop :] = False
    mask = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    return BreastRegion(mask, _box_around(mask), chest_wall, inverted, tuple(warnings))


def _normalise(grey: np.ndarray) -> np.ndarray:
    """Return the view stretched to [0, 1] and smoothed, so that neither a pedestal nor brightness matters.

    Raises:
        ImageRefusedError: The view is blank.
    """
    low, high = np.quantile(grey[::4, ::4], (0.005, 0.995))
    if high - low < MIN_RANGE:
        raise ImageRefusedError(
            "blank", f"the image is blank: 99 % of its pixels differ by less than {MIN_RANGE:.0%} of the grey scale"
        )
    return cv2.GaussianBlur(np.clip((grey - low) / (high - low), 0, 1).astype(np.float32), (3, 3), 0)


def _is_inverted(view: np.ndarray, content: BoundingBox) -> bool:
    """Return whether the air is white.

    Air lies along the edges of the picture, of which a white implant or muscle covers only a small part. The edges are
    tested twice, the second time further inside, where the white border of a film has ended.
    """
    x0, y0, x1, y1 = content
    inset = min(round(MIN_WIDTH * max(view.shape)), (x1 - x0) // 4, (y1 - y0) // 4)
    return all(_has_white_edges(view[y0 + margin : y1 - margin, x0 + margin : x1 - margin]) for margin in (0, inset))


def _has_white_edges(picture: np.ndarray) -> bool:
    """Return whether more than 10 % of the outermost pixels are white, and more of them are white than black."""
    edges = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    white = float(np.mean(edges > 0.98))
    black = float(np.mean(edges < 0.1))
    return white > max(0.1, black)


def _content_box(view: np.ndarray) -> BoundingBox:
    """Return the view's box without uniform lines at the edges: padding, film border, white collimation, empty air."""
    step = max(1, max(view.shape) // 128)
    sample = view[step // 2 :: step, step // 2 :: step]
    x0 = y0 = 0
    y1, x1 = sample.shape
    while True:
        part = sample[y0:y1, x0:x1]
        rows = _varied_lines(part, axis=1)
        columns = _varied_lines(part, axis=0)
        if not len(rows) or not len(columns):
            return BoundingBox(0, 0, view.shape[1], view.shape[0])
        if rows[0] == columns[0] == 0 and (rows[-1] + 1, columns[-1] + 1) == part.shape:
            return BoundingBox(x0 * step, y0 * step, min(x1 * step, view.shape[1]), min(y1 * step, view.shape[0]))
        y0, y1 = y0 + rows[0], y0 + rows[-1] + 1
        x0, x1 = x0 + columns[0], x0 + columns[-1] + 1


def _varied_lines(part: np.ndarray, axis: int) -> np.ndarray:
    """Return the lines along `axis` where more than 2 % of the pixels differ from the line's median."""
    differs = np.abs(part - np.median(part, axis, keepdims=True)) > 0.05
    return np.flatnonzero(np.mean(differs, axis) > 0.02)


def _air_limit(tone: np.ndarray) -> int | None:
    """Return the tone at which the darkest peak, the air, has fallen into the valley before the tissue.

    Return None if there is no valley.

    Otsu's threshold (1979) separates air and tissue, but lies well inside the skin; the foot of the air's peak keeps
    fat and skin. A film may be fogged in one part: the next peak is air as well if it is narrow, covers a large area
    and lies along the edge on the side of the air.
    """
    otsu = int(cv2.threshold(np.ascontiguousarray(tone), 0, 255, cv2.THRESH_OTSU)[0])
    counts = np.bincount(tone.ravel(), minlength=256).astype(float)
    darkest = np.searchsorted(np.cumsum(counts), 0.02 * tone.size)  # scratches and holes in a film are darker than air
    counts = np.convolve(np.pad(counts, 6, mode="edge"), np.full(13, 1 / 13), mode="valid")  # 8-bit sources leave gaps
    peaks = counts == cv2.dilate(counts[:, None], np.ones((25, 1), np.uint8))[:, 0]
    limit = _peak_foot(counts[: otsu + 1], int(darkest + np.argmax(peaks[darkest:])))
    if limit is None:
        return None
    fog_peak = limit + int(np.argmax(peaks[limit:]))
    fog_limit = _peak_foot(counts[: otsu + 1], fog_peak)
    if fog_limit is None or fog_limit - fog_peak > FOG_WIDTH:
        return limit
    fog = (tone > limit) & (tone <= fog_limit)
    inset = -(-tone.shape[1] // 50)  # the outermost columns are the border of the film
    outer = min((inset, -1 - inset), key=lambda column: tone[:, column].mean())
    is_air = fog.mean() > FOG_AREA and fog[:, outer].mean() > FOG_EDGE
    return fog_limit if is_air else limit


def _peak_foot(counts: np.ndarray, peak: int) -> int | None:
    """Return the tone at which `peak` has fallen into the valley before the end of `counts`; None without a valley."""
    start = max(peak, int(MAX_AIR_TONE))
    slope = counts[start:]
    if not len(slope) or slope.min() > 0.5 * counts[peak]:
        return None
    return start + int(np.argmax(slope <= 1.5 * slope.min() + 1))


def _breast_masks(view: np.ndarray, tone: np.ndarray, content: BoundingBox, air_limit: float) -> list[np.ndarray]:
    """Return the mask of the breast, bool `(H, W)`, and, if it has a dim rim, a second mask that includes the rim."""
    bright = tone > air_limit
    border = view > 0.95  # white outside the content: film border or collimation
    border[content.y0 : content.y1, content.x0 : content.x1] = False
    masks = [_largest_component(bright & ~border)]
    rim = _dim_rim(tone, ~bright, content, masks[0])
    if rim.any():
        masks.append(_largest_component(masks[0] | rim))
    return masks


def _dim_rim(tone: np.ndarray, dim: np.ndarray, content: BoundingBox, mask: np.ndarray) -> np.ndarray:
    """Return the fat and skin around the breast, bool `(H, W)`.

    They are searched among `dim`, the pixels with the tones of air, close to `mask`, the breast found so far.
    Next to the glands of a dense breast on film, fat and skin are hardly brighter than air, whose own tone drifts over
    the film. Each pixel is therefore compared with the mean and the standard deviation of the certain air around it,
    which is dim and far from `mask`.
    """
    x0, y0, x1, y1 = content
    reach = round(RIM_WIDTH * max(tone.shape))
    distance = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 3)
    darkest_air = np.quantile(tone[y0:y1:4, x0:x1:4], 0.02) / 2  # the padding around a film is darker
    air = (dim & (distance > reach) & (tone >= darkest_air))[::4, ::4].astype(np.float32)
    tones = tone[::4, ::4].astype(np.float32)
    moments = cv2.merge([air, air * tones, air * tones**2])
    share, total, squares = cv2.split(cv2.blur(moments, (2 * reach + 1, 2 * reach + 1), borderType=cv2.BORDER_CONSTANT))
    has_air = share > RIM_AIR
    share[~has_air] = 1
    mean = total / share
    deviation = np.sqrt(np.maximum(squares / share - mean**2, 0))
    above_air = np.maximum(mean + np.maximum(3 * deviation, RIM_STEP), MAX_AIR_TONE)
    limit = np.where(has_air, above_air, 255).astype(np.float32)
    rim = dim & (distance <= reach) & (tone > cv2.resize(limit, tone.shape[::-1]))
    opened = cv2.morphologyEx(rim.astype(np.uint8), cv2.MORPH_OPEN, np.ones((5, 5), np.uint8))  # thinner rims are halos
    return opened.astype(bool)


def _largest_component(tissue: np.ndarray) -> np.ndarray:
    """Return the largest connected component of `tissue`, bool `(H, W)`, with its holes filled.

    Thin bridges to letters and frames do not connect.

    Raises:
        ImageRefusedError: No component is large enough to be a breast.
    """
    width = 2 * round(max(tissue.shape) * MIN_WIDTH / 2) + 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))
    whole = tissue.astype(np.uint8)
    core = cv2.morphologyEx(whole, cv2.MORPH_OPEN, disc)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(core, connectivity=8)
    areas = stats[1:, cv2.CC_STAT_AREA]
    if not len(areas) or areas.max() < MIN_AREA * core.size:
        raise ImageRefusedError(
            "no_breast",
            f"no breast was found: no connected region brighter than air covers {MIN_AREA:.0%} of the image",
        )
    largest = (labels == 1 + np.argmax(areas)).astype(np.uint8)
    # The dilation restores the nipple and corners that the opening removed.
    grown = cv2.bitwise_and(cv2.dilate(largest, disc), whole)
    outlines, _ = cv2.findContours(grown, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.zeros_like(grown), [max(outlines, key=cv2.contourArea)], -1, 1, cv2.FILLED).astype(bool)


def _find_chest_wall(mask: np.ndarray) -> tuple[Side, float]:
    """Return the straighter side of the breast and the certainty.

    The straighter side is closer to the bounding box. The certainty is the difference between the two sides' mean
    distances from the box, as a fraction of its width.
    """
    columns = np.flatnonzero(mask.any(0))
    rows = mask[mask.any(1), columns[0] : columns[-1] + 1]
    difference = float(np.mean(rows[:, ::-1].argmax(1) - rows.argmax(1))) / rows.shape[1]
    return ("left" if difference >= 0 else "right"), abs(difference)


def _common_rows(masks: list[np.ndarray], chest_wall: Side) -> slice:
    """Return the rows from the first to the last row of the breast in any of the masks.

    A rim that was detected only in part would otherwise make the rest of the breast look like an arm or a belly.
    """
    slices = [_rows_of_breast(mask, chest_wall) for mask in masks]
    return slice(min(rows.start for rows in slices), max(rows.stop for rows in slices))


def _rows_of_breast(mask: np.ndarray, chest_wall: Side) -> slice:
    """Return the rows of the breast without the arm above and the belly below it."""
    x, first, width, count = cv2.boundingRect(mask.astype(np.uint8))
    breast = mask[first : first + count, x : x + width]
    if chest_wall == "right":
        breast = breast[:, ::-1]
    rounded = _reach(_open_with_disc(breast, NIPPLE_RADIUS * count))
    reach = np.maximum(rounded, np.minimum(_reach(breast), 0.6 * rounded.max()))  # no nipple, but the thin ends
    quarter = count // 4
    peak = quarter + int(np.argmax(reach[quarter : count - quarter]))
    above = _end_of_breast(reach[peak::-1], MIN_NOTCH * count)
    below = _end_of_breast(reach[peak:], MIN_NOTCH * count)
    return slice(first + peak - above, first + peak + below + 1)


def _reach(mask: np.ndarray) -> np.ndarray:
    """Return how far each row of `mask` `(H, W)` extends from its left edge, in pixels; 0 for empty rows."""
    return np.where(mask.any(1), mask.shape[1] - mask[:, ::-1].argmax(1), 0).astype(float)


def _open_with_disc(mask: np.ndarray, radius: float) -> np.ndarray:
    """Return `mask`, bool `(H, W)`, opened by a disc; everything beyond the edges counts as inside."""
    eroded = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 3) > radius
    return cv2.distanceTransform((~eroded).astype(np.uint8), cv2.DIST_L2, 3) <= radius


def _end_of_breast(reach: np.ndarray, min_depth: float) -> int:
    """Return the last row of the breast, where `reach` goes from its widest row (index 0) upwards or downwards.

    The outline of a breast is convex; where it turns concave, arm, axilla or belly begins. The result is the outermost
    row whose depth below the convex hull is at least 70 % of the greatest depth. At a skin fold this is the fold
    itself; in a shallow concavity it lies somewhat further out, where hand-drawn boxes and axillary tails end. Depths
    below `min_depth` pixels are ignored.
    """
    widest = reach[0]
    lowest = np.minimum.accumulate(reach)
    widens_again = (lowest < 0.85 * widest) & (reach > lowest + 0.08 * widest)
    other = (reach > 1.1 * widest) | widens_again
    last = int(np.argmax(other)) - 1 if other.any() else len(reach) - 1
    depth = _upper_hull(reach[: last + 1]) - reach[: last + 1]
    if depth.max() < min_depth or reach[np.argmax(depth)] > 0.85 * widest:
        return last
    return int(np.flatnonzero(depth >= 0.7 * depth.max())[-1])


def _upper_hull(values: np.ndarray) -> np.ndarray:
    """Return the upper convex hull of `values` over their index (Andrew's monotone chain, 1979)."""
    corners: list[int] = []
    heights = values.tolist()  # single Python floats are faster than NumPy scalars
    for i, height in enumerate(heights):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (heights[b] - heights[a]) * (i - a) > (height - heights[a]) * (b - a):
                break
            corners.pop()
        corners.append(i)
    return np.interp(np.arange(len(values)), corners, values[corners])


def _box_around(mask: np.ndarray) -> BoundingBox:
    """Return the bounding box of `mask`."""
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    return BoundingBox(x, y, x + width, y + height)
