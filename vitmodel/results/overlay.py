"""Overlay images: the plain mammogram next to the same one under its heat map, with a colour bar and a caption."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from vitmodel.config import Preprocessing
from vitmodel.pixels.open import open_as_cropped
from vitmodel.results.heatmap import HeatMap
from vitmodel.utils import NOT_A_MEDICAL_DEVICE

BREAST_LENGTH = 1200  # maximum length in pixels of the longer side of the breast
CONTEXT_MARGIN = 24  # pixels shown around the breast
MARGIN = 150  # width in pixels of the column with the colour bar
LINE = 34  # height in pixels of a line of text
MIN_TISSUE_VALUE = 20  # grey value below which the colour fades
STRONGEST = 0.55  # maximum opacity of the colour
FONT = cv2.FONT_HERSHEY_SIMPLEX
SIZE = 0.7  # maximum scale of the font
INK = (235, 235, 235)  # colour of the text


@dataclass(frozen=True, kw_only=True)
class Caption:
    """Text and colour scale of an overlay."""

    title: str
    """Side and view, such as 'R MLO'."""
    score: str
    """The model's probability and the threshold."""
    unit: str
    """Meaning of the colours."""
    low: float
    """Value at which colour begins."""
    high: float
    """Value of the strongest colour."""


@dataclass(frozen=True, eq=False)
class DisplayImage:
    """A source image as a viewer displays it."""

    grey: np.ndarray
    """`(H, W)` uint8."""
    scale: float
    """Pixels of `grey` per source pixel."""


def read_display_image(
    path: Path | str, heat: HeatMap, preprocessing: Preprocessing, inverted: bool, voi: str = ""
) -> DisplayImage:
    """Return an image scaled down such that its breast is at most `BREAST_LENGTH` pixels long.

    Args:
        path: File of the image.
        heat: Heat map of the image, which gives the position of the breast.
        preprocessing: Preprocessing of the crop, whose grey conversion is used.
        inverted: Whether the polarity of the image has to be corrected.
        voi: The grey range that is recorded for the crop; see `open_as_cropped`.

    Raises:
        ImageRefusedError: The image cannot be read.
    """
    file = open_as_cropped(path, preprocessing, voi)
    x0, y0, x1, y1 = heat.geometry.box
    scale = min(1.0, BREAST_LENGTH / max(y1 - y0, x1 - x0))
    stored = file.read_stored(min(file.levels, int(-np.log2(scale))))
    size = (max(1, round(file.header.columns * scale)), max(1, round(file.header.rows * scale)))
    grey = file.to_grey(cv2.resize(stored, size, interpolation=cv2.INTER_AREA))
    return DisplayImage(np.rint(255 * (1 - grey if inverted else grey)).astype(np.uint8), scale)


def draw_overlay(picture: DisplayImage, heat: HeatMap, caption: Caption, breast_only: bool = False) -> np.ndarray:
    """Return the plain breast, the breast under its heat map and a colour bar, above a caption.

    The opacity of the colour grows with the value, so that tissue with low values is displayed unchanged.

    Args:
        picture: The image to display.
        heat: Its heat map.
        caption: Text and colour scale.
        breast_only: Whether to blacken everything outside the breast, which may show the patient's name.

    Returns:
        `(H, W, 3)` uint8, RGB.
    """
    values = heat.to_source_image(picture.scale)
    grey = np.where(np.isnan(values), 0, picture.grey).astype(np.uint8) if breast_only else picture.grey
    window = _window(heat.geometry.box, picture)
    share = np.nan_to_num(np.clip((values - caption.low) / (caption.high - caption.low), 0, 1))[window]
    # The mask of the crop is coarser than the image; this factor keeps air black.
    share *= np.minimum(1, grey[window] / MIN_TISSUE_VALUE)
    plain = cv2.cvtColor(grey[window], cv2.COLOR_GRAY2RGB)
    gap = np.zeros((len(plain), 8, 3), np.uint8)
    page = np.hstack([plain, gap, blend_heat_map(plain, share), colour_bar(len(plain), caption)])
    meaning = f"Colour: {caption.unit}. It does not outline a lesion."
    lines = [caption.title, caption.score, meaning, NOT_A_MEDICAL_DEVICE]
    footer = np.zeros((LINE * len(lines) + LINE // 2, page.shape[1], 3), np.uint8)
    size = min(fit_font_size(line, footer.shape[1] - LINE) for line in lines)
    for number, line in enumerate(lines, start=1):
        draw_text(footer, line, (LINE // 2, LINE * number), size)
    return np.vstack([page, footer])


def _window(box: tuple[int, int, int, int], picture: DisplayImage) -> tuple[slice, slice]:
    """Return the rows and columns of a displayed image that show the breast and `CONTEXT_MARGIN` pixels around it."""
    x0, y0, x1, y1 = (round(edge * picture.scale) for edge in box)
    rows = slice(max(0, y0 - CONTEXT_MARGIN), y1 + CONTEXT_MARGIN)
    columns = slice(max(0, x0 - CONTEXT_MARGIN), x1 + CONTEXT_MARGIN)
    return rows, columns


def blend_heat_map(picture: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Return an RGB image `(H, W, 3)` blended with colours for `share`, `(H, W)` in [0, 1]."""
    inferno = cv2.applyColorMap(np.rint(95 + 130 * share).astype(np.uint8), cv2.COLORMAP_INFERNO)
    colour = cv2.cvtColor(inferno, cv2.COLOR_BGR2RGB)
    strength = (STRONGEST * np.sqrt(share))[..., None]
    return np.rint(picture * (1 - strength) + colour * strength).astype(np.uint8)


def colour_bar(height: int, caption: Caption) -> np.ndarray:
    """Return a column `(height, MARGIN, 3)` with the value of each colour, shown over a medium grey."""
    column = np.zeros((height, MARGIN, 3), np.uint8)
    top = height // 4
    length = height // 2
    share = np.linspace(1, 0, length)[:, None].repeat(28, axis=1)
    column[top : top + length, 24:52] = blend_heat_map(np.full((*share.shape, 3), 110, np.uint8), share)
    for part in (0, 0.5, 1):
        value = caption.low + (caption.high - caption.low) * (1 - part)
        text = f"{value:.3g}"
        draw_text(column, text, (62, round(top + part * length) + 8), fit_font_size(text, MARGIN - 66))
    return column


def fit_font_size(text: str, width: int) -> float:
    """Return the font scale, at most `SIZE`, at which `text` is at most `width` pixels wide."""
    return SIZE * min(1, width / cv2.getTextSize(text, FONT, SIZE, 1)[0][0])


def draw_text(canvas: np.ndarray, text: str, place: tuple[int, int], size: float) -> None:
    """Draw `text` on `canvas`; its baseline begins at `place` (x, y)."""
    cv2.putText(canvas, text, place, FONT, size, INK, 1, cv2.LINE_AA)
