"""Turn an image file into the input of a model: decode, find the breast, crop, orient, resize.

Training and prediction both use this module, so their crops cannot differ. In a crop the chest wall is at the left, and
the breast is as large as the canvas allows at its own aspect ratio (with `mm_per_pixel`, the canvas is as large as the
breast). Brighter is denser. Only air is 0, so the breast mask is `crop > 0`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from vitmodel.config import Preprocessing, Size
from vitmodel.errors import ImageRefusedError
from vitmodel.pixels.breast_view import PLAUSIBLE_HEIGHT_MM, check_plausible, view_breast
from vitmodel.pixels.crop import BreastRegion
from vitmodel.pixels.header import ImageHeader
from vitmodel.pixels.open import open_image
from vitmodel.pixels.verdict import ImageWarning

MIN_CANVAS_SIDE = 16
"""Shortest side of a canvas in pixels: one patch of a ViT."""
OVERSAMPLING = 1.09
"""Least ratio of the size of the box at a reduced level to its size on the canvas.

It gives 45 dB against a full decode on real images (42 dB on white noise).
"""
SUPERSAMPLE_TO_CANVAS = np.array([[0.5, 0, -0.25], [0, 0.5, -0.25], [0, 0, 1]])
"""Affine map from a canvas of twice the size to the canvas, see `resample_to_canvas`."""


@dataclass(frozen=True)
class CropGeometry:
    """The position of a crop in its source image; box, flip and canvas define the map and fit into a table row."""

    box: tuple[int, int, int, int]
    """x0, y0, x1, y1 in source pixels; x1 and y1 are exclusive."""
    flipped: bool
    """Whether the crop is mirrored left to right relative to its source."""
    canvas: Size

    @property
    def scale(self) -> float:
        """Canvas pixels per source pixel."""
        x0, y0, x1, y1 = self.box
        return min(self.canvas.height / (y1 - y0), self.canvas.width / (x1 - x0))

    @property
    def content(self) -> tuple[int, int, int]:
        """Top row, height and width of the box on the canvas; it starts at column 0 and is centred vertically."""
        x0, y0, x1, y1 = self.box
        height = min(self.canvas.height, max(1, round((y1 - y0) * self.scale)))
        width = min(self.canvas.width, max(1, round((x1 - x0) * self.scale)))
        return (self.canvas.height - height) // 2, height, width

    def to_source(self) -> np.ndarray:
        """Return the affine map `(2, 3)` from canvas to source coordinates, x before y, pixel centres at integers."""
        x0, y0, x1, y1 = self.box
        top, height, width = self.content
        step_y = (y1 - y0) / height
        step_x = (x1 - x0) / width
        start_x, sign = (x1, -1) if self.flipped else (x0, 1)
        return np.array([
            [sign * step_x, 0, start_x + sign * step_x / 2 - 0.5],
            [0, step_y, y0 + (0.5 - top) * step_y - 0.5],
        ])  # fmt: skip


@dataclass(frozen=True)
class PreprocessedImage:
    """A crop and its provenance.

    Attributes:
        crop: uint8 or uint16 `(H, W)`, 0 = air.
        geometry: Position of the crop in the source image.
        header: Header of the source image.
        breast: The breast in the low-resolution view.
        decoder: Name of the decoder that gave the pixels.
        decode_level: Number of resolution levels that were skipped.
        warnings: Warnings of the header, the breast and the geometry.
    """

    crop: np.ndarray
    geometry: CropGeometry
    header: ImageHeader
    breast: BreastRegion
    decoder: str
    decode_level: int
    warnings: tuple[ImageWarning, ...]


def preprocess(
    path: Path | str, config: Preprocessing, laterality: str = "", picture_range: str = ""
) -> PreprocessedImage:
    """Return the crop of the breast in an image file.

    Args:
        path: The image file.
        config: The preprocessing options.
        laterality: Stated laterality, L, R or '' (unknown). It is only compared with the pixels and never used.
        picture_range: LOW:HIGH for a picture that is one of several with the same range, used if `config` says auto;
            '' = decide from this image alone.

    Raises:
        ImageRefusedError: The image cannot be read, is not a mammogram, or shows no breast.
    """
    shared = picture_range if config.picture_range == "auto" else ""
    file = open_image(path, config.voi, config.for_processing, shared or config.picture_range)
    shape = (file.header.rows, file.header.columns)
    view = view_breast(file)
    breast, stored, level = view.breast, view.stored, view.level
    doubts = check_plausible(view.overview, breast, file.header, config.implausible)

    box = _source_box(breast, breast.mask.shape, shape)
    geometry = CropGeometry(box, flipped=breast.chest_wall == "right", canvas=_canvas(box, file.header, config))
    crop_level = 0 if config.exact else min(file.levels, max(0, int(np.floor(-np.log2(OVERSAMPLING * geometry.scale)))))
    if crop_level != level:
        stored = file.read_stored(crop_level)
    grey = file.to_grey(resample_to_canvas(stored, geometry, crop_level))
    if breast.inverted:
        grey = 1 - grey
    mask = _resample_mask(breast.mask, geometry, shape)
    crop = quantise(grey, mask, config.bits)
    warnings = (
        *file.header.warnings,
        *view.warnings,
        *breast.warnings,
        *doubts,
        *_geometry_warnings(geometry, breast, laterality),
    )
    return PreprocessedImage(crop, geometry, file.header, breast, file.decoder, crop_level, warnings)


def _source_box(breast: BreastRegion, view: tuple[int, ...], source: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the breast box, given in pixels of the view of shape `view`, in source pixels, rounded outwards."""
    scale_y = source[0] / view[0]
    scale_x = source[1] / view[1]
    x0, y0, x1, y1 = breast.box
    return int(x0 * scale_x), int(y0 * scale_y), int(np.ceil(x1 * scale_x)), int(np.ceil(y1 * scale_y))


def _canvas(box: tuple[int, int, int, int], header: ImageHeader, config: Preprocessing) -> Size:
    """Return the requested size or, if a scale was requested, the size of the box at that scale.

    Callers pad the size to whole patches.

    Raises:
        ImageRefusedError: A scale was requested and the pixel spacing is unknown or implausible.
    """
    if config.mm_per_pixel is None:
        return config.size
    if header.spacing is None:
        raise ImageRefusedError(
            "no_spacing",
            "the file states no pixel spacing, which --mm-per-pixel needs; add the spacing or use --size instead",
        )
    row, column = header.spacing
    x0, y0, x1, y1 = box
    height = row * (y1 - y0)
    if not (0.99 < row / column < 1.01 and PLAUSIBLE_HEIGHT_MM[0] <= height <= PLAUSIBLE_HEIGHT_MM[1]):
        raise ImageRefusedError(
            "no_spacing",
            f"the pixel spacing {row:g} x {column:g} mm is implausible: the pixels are not square, or the breast would "
            f"be {height:.0f} mm high; correct the spacing or use --size instead of --mm-per-pixel",
        )
    scale = row / config.mm_per_pixel
    return Size(max(MIN_CANVAS_SIDE, round((y1 - y0) * scale)), max(MIN_CANVAS_SIDE, round((x1 - x0) * scale)))


def quantise(grey: np.ndarray, mask: np.ndarray, bits: int) -> np.ndarray:
    """Return grey values as integers.

    Args:
        grey: Grey values `(H, W)` in [0, 1].
        mask: Breast pixels, bool `(H, W)`.
        bits: 8 or 16.

    Returns:
        uint8 or uint16 `(H, W)`: at least 1 inside `mask`, 0 outside.
    """
    return np.where(mask, np.maximum(np.rint(grey * (2**bits - 1)), 1), 0).astype(np.uint8 if bits == 8 else np.uint16)


def resample_to_canvas(stored: np.ndarray, geometry: CropGeometry, level: int) -> np.ndarray:
    """Return the breast box on the canvas, mirrored if the geometry says so, still in stored values.

    Args:
        stored: The image `(H, W)` at `level`.
        geometry: Position of the crop in the full-size image.
        level: Number of resolution levels that were skipped.
    """
    canvas = geometry.canvas
    top, height, width = geometry.content
    if level == 0:
        x0, y0, x1, y1 = geometry.box
        kernel = cv2.INTER_AREA if geometry.scale < 1 else cv2.INTER_LINEAR
        content = cv2.resize(stored[y0:y1, x0:x1], (width, height), interpolation=kernel)
        placed = np.zeros(canvas, content.dtype)
        placed[top : top + height, :width] = content[:, ::-1] if geometry.flipped else content
        return placed
    # A JPEG 2000 sample at level r lies at full-size index 2^r * i (ISO 15444-1 B.5), not in the middle of the 2^r
    # pixels, and INTER_AREA cannot apply this shift. Sampling twice as many pixels as the canvas
    # has and averaging them replaces it: 46 to 54 dB against a full decode.
    matrix = geometry.to_source() / 2**level @ SUPERSAMPLE_TO_CANVAS
    finer = (canvas.width * 2, canvas.height * 2)
    sampled = cv2.warpAffine(
        stored, matrix, finer, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE
    )
    return cv2.resize(sampled, (canvas.width, canvas.height), interpolation=cv2.INTER_AREA)


def _resample_mask(mask: np.ndarray, geometry: CropGeometry, source: tuple[int, int]) -> np.ndarray:
    """Return the breast mask of the overview on the canvas; `source` is the shape of the full-size image."""
    scale = np.array([mask.shape[1] / source[1], mask.shape[0] / source[0]])
    matrix = geometry.to_source()
    matrix[:, 2] += 0.5
    matrix *= scale[:, None]
    matrix[:, 2] -= 0.5
    canvas = geometry.canvas
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    size = (canvas.width, canvas.height)
    placed = cv2.warpAffine(mask.astype(np.float32), matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    top, height, width = geometry.content
    inside = np.zeros(canvas, bool)
    inside[top : top + height, :width] = True
    return (placed > 0.5) & inside


def _geometry_warnings(geometry: CropGeometry, breast: BreastRegion, laterality: str) -> list[ImageWarning]:
    """Return the warnings that depend on the geometry of the crop or on the stated laterality."""
    warnings = []
    expected = {"L": "left", "R": "right"}.get(laterality)
    if expected and expected != breast.chest_wall:
        warnings.append(
            ImageWarning(
                "laterality_mismatch",
                f"the chest wall is at the {breast.chest_wall} edge, which contradicts the stated laterality "
                f"{laterality}; check the laterality",
            )
        )
    if geometry.scale > 1:
        warnings.append(
            ImageWarning(
                "low_resolution",
                f"the breast was enlarged {geometry.scale:.2f} times to fill the canvas; use a smaller --size",
            )
        )
    return warnings
