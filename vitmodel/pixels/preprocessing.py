"""From an image file to a model's input: decode, find the breast, crop, orient, resize. Knows no table, no label, no network.

The one road from a file to a crop, so that training and prediction cannot differ. A crop has the chest wall at the left, the breast
as large as the canvas allows at its own aspect (or, with `mm_per_pixel`, a canvas as large as the breast), brighter = denser; 0 is air
and nothing else, so the breast's mask is `crop > 0`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from vitmodel.config import Preprocessing, Size
from vitmodel.errors import ImageRefusedError
from vitmodel.pixels.crop import BreastRegion, find_breast
from vitmodel.pixels.header import ImageFile, ImageHeader
from vitmodel.pixels.open import open_image
from vitmodel.pixels.verdict import ImageWarning

OVERVIEW_SIZE = 512  # longest side in pixels of the view in which the breast is looked for
MIN_CANVAS_SIDE = 16  # pixels along a side of a canvas: one patch of a ViT
PLAUSIBLE_HEIGHT_MM = (
    20,
    500,
)  # length of a breast's box along the chest wall; the largest detectors and films measure 300 mm
OVERSAMPLING = 1.09  # a level must show the box this much larger than the canvas: 45 dB against a full decode on real images (white noise 42)
SUPERSAMPLE_TO_CANVAS = np.array(
    [[0.5, 0, -0.25], [0, 0.5, -0.25], [0, 0, 1]]
)  # from a canvas of twice the size to the canvas


@dataclass(frozen=True)
class CropGeometry:
    """Where a crop's pixels lie in its source image; the whole map is box + flip + canvas, so it fits in a table's row."""

    box: tuple[int, int, int, int]
    """x0, y0, x1, y1 in source pixels, the end exclusive."""
    flipped: bool
    """Whether the crop is mirrored left to right against its source."""
    canvas: Size

    @property
    def scale(self) -> float:
        """Canvas pixels per source pixel."""
        x0, y0, x1, y1 = self.box
        return min(self.canvas.height / (y1 - y0), self.canvas.width / (x1 - x0))

    @property
    def content(self) -> tuple[int, int, int]:
        """Top row, height and width of the breast box on the canvas; it begins at column 0 and is centred in height."""
        x0, y0, x1, y1 = self.box
        height = min(self.canvas.height, max(1, round((y1 - y0) * self.scale)))
        width = min(self.canvas.width, max(1, round((x1 - x0) * self.scale)))
        return (self.canvas.height - height) // 2, height, width

    def to_source(self) -> np.ndarray:
        """The 2 x 3 affine map from canvas to source coordinates, both with pixel centres at whole numbers, x before y."""
        x0, y0, x1, y1 = self.box
        top, height, width = self.content
        step_y, step_x = (y1 - y0) / height, (x1 - x0) / width
        begin_x, sign = (x1, -1) if self.flipped else (x0, 1)
        return np.array([
            [sign * step_x, 0, begin_x + sign * step_x / 2 - 0.5],
            [0, step_y, y0 + (0.5 - top) * step_y - 0.5],
        ])  # fmt: skip


@dataclass(frozen=True)
class PreprocessedImage:
    """A crop and how it came to be."""

    crop: np.ndarray
    """H W, uint8 or uint16, 0 = air."""
    geometry: CropGeometry
    header: ImageHeader
    breast: BreastRegion
    decoder: str
    decode_level: int
    warnings: tuple[ImageWarning, ...]


def preprocess(path: Path | str, config: Preprocessing, laterality: str = "") -> PreprocessedImage:
    """The crop of the breast in the image at `path`; `laterality` (L, R or '' = unknown) is only compared with the pixels.

    Raises ImageRefusedError.
    """
    file = open_image(path, config.voi, config.for_processing)
    shape = (file.header.rows, file.header.columns)
    level = min(file.levels, max(0, int(np.ceil(np.log2(max(shape) / OVERVIEW_SIZE)))))
    stored = file.read_stored(level)
    overview = _grey_overview(file, stored)
    breast = find_breast(overview)

    box = _source_box(breast, overview.shape, shape)
    geometry = CropGeometry(box, flipped=breast.chest_wall == "right", canvas=_canvas(box, file.header, config))
    wanted = 0 if config.exact else min(file.levels, max(0, int(np.floor(-np.log2(OVERSAMPLING * geometry.scale)))))
    if wanted != level:
        stored = file.read_stored(wanted)
    grey = file.to_grey(resample_to_canvas(stored, geometry, wanted))
    if breast.inverted:
        grey = 1 - grey
    mask = _resample_mask(breast.mask, geometry, shape)
    crop = quantise(grey, mask, config.bits)
    warnings = (*file.header.warnings, *breast.warnings, *_geometry_warnings(geometry, breast, laterality))
    return PreprocessedImage(crop, geometry, file.header, breast, file.decoder, wanted, warnings)


def _grey_overview(file: ImageFile, stored: np.ndarray) -> np.ndarray:
    """The whole image, grey, at most OVERVIEW pixels long."""
    factor = max(1.0, max(stored.shape) / OVERVIEW_SIZE)
    if factor > 1:
        size = (max(1, round(stored.shape[1] / factor)), max(1, round(stored.shape[0] / factor)))
        stored = cv2.resize(stored, size, interpolation=cv2.INTER_AREA)
    return file.to_grey(stored)


def _source_box(breast: BreastRegion, view: tuple[int, ...], source: tuple[int, int]) -> tuple[int, int, int, int]:
    """The breast's box, which is in pixels of the view, in source pixels, rounded outwards."""
    scale_y, scale_x = source[0] / view[0], source[1] / view[1]
    x0, y0, x1, y1 = breast.box
    return int(x0 * scale_x), int(y0 * scale_y), int(np.ceil(x1 * scale_x)), int(np.ceil(y1 * scale_y))


def _canvas(box: tuple[int, int, int, int], header: ImageHeader, config: Preprocessing) -> Size:
    """Return the requested size or, if a scale was requested, the size of the box at that scale; callers pad it to whole patches.

    Raises ImageRefusedError if the pixel spacing is unknown or the result is too large.
    """
    if config.mm_per_pixel is None:
        return config.size
    if header.spacing is None:
        raise ImageRefusedError("no_spacing", "the file states no pixel spacing, which a scale in mm needs")
    (row, column), (x0, y0, x1, y1) = header.spacing, box
    height = row * (y1 - y0)
    if not (0.99 < row / column < 1.01 and PLAUSIBLE_HEIGHT_MM[0] <= height <= PLAUSIBLE_HEIGHT_MM[1]):
        raise ImageRefusedError(
            "no_spacing", f"pixels of {row:g} x {column:g} mm are not square or make a breast of {height:.0f} mm"
        )
    scale = row / config.mm_per_pixel
    return Size(max(MIN_CANVAS_SIDE, round((y1 - y0) * scale)), max(MIN_CANVAS_SIDE, round((x1 - x0) * scale)))


def quantise(grey: np.ndarray, mask: np.ndarray, bits: int) -> np.ndarray:
    """Greys in [0, 1] (H W) as whole numbers of 8 or 16 bits: at least 1 within `mask` (H W), 0 without."""
    return np.where(mask, np.maximum(np.rint(grey * (2**bits - 1)), 1), 0).astype(np.uint8 if bits == 8 else np.uint16)


def resample_to_canvas(stored: np.ndarray, geometry: CropGeometry, level: int) -> np.ndarray:
    """The box of `stored` (H W at `level`) on the canvas, mirrored where the geometry says so; still in stored values."""
    canvas = geometry.canvas
    top, height, width = geometry.content
    if level == 0:
        x0, y0, x1, y1 = geometry.box
        kernel = cv2.INTER_AREA if geometry.scale < 1 else cv2.INTER_LINEAR
        content = cv2.resize(stored[y0:y1, x0:x1], (width, height), interpolation=kernel)
        placed = np.zeros(canvas, content.dtype)
        placed[top : top + height, :width] = content[:, ::-1] if geometry.flipped else content
        return placed
    # A JPEG 2000 sample at level r stands at full-size index 2^r * i (ISO 15444-1 B.5), not at the middle of the 2^r pixels. Twice as
    # many samples as canvas pixels, then averaged, stand for INTER_AREA, which knows no shift: 46 to 54 dB against a full decode.
    matrix = geometry.to_source() / 2**level @ SUPERSAMPLE_TO_CANVAS
    finer = (canvas.width * 2, canvas.height * 2)
    sampled = cv2.warpAffine(
        stored, matrix, finer, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE
    )
    return cv2.resize(sampled, (canvas.width, canvas.height), interpolation=cv2.INTER_AREA)


def _resample_mask(mask: np.ndarray, geometry: CropGeometry, source: tuple[int, int]) -> np.ndarray:
    """The overview's breast mask on the canvas."""
    scale = np.array([mask.shape[1] / source[1], mask.shape[0] / source[0]])
    matrix = geometry.to_source()
    matrix[:, 2] += 0.5
    matrix *= scale[:, None]
    matrix[:, 2] -= 0.5
    canvas = geometry.canvas
    flags, size = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, (canvas.width, canvas.height)
    placed = cv2.warpAffine(mask.astype(np.float32), matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    top, height, width = geometry.content
    inside = np.zeros(canvas, bool)
    inside[top : top + height, :width] = True
    return (placed > 0.5) & inside


def _geometry_warnings(geometry: CropGeometry, breast: BreastRegion, laterality: str) -> list[ImageWarning]:
    """Remarks that need the crop's geometry or the stated side."""
    warnings = []
    expected = {"L": "left", "R": "right"}.get(laterality)
    if expected and expected != breast.chest_wall:
        warnings.append(
            ImageWarning(
                "laterality_mismatch",
                f"the chest wall is at the {breast.chest_wall} edge, but the stated laterality is {laterality}",
            )
        )
    if geometry.scale > 1:
        warnings.append(
            ImageWarning("low_resolution", f"the breast was enlarged {geometry.scale:.2f} times to fill the canvas")
        )
    return warnings
