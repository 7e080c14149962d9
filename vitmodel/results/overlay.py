"""A heat map laid over its mammogram, for the eye: beside the plain picture, with a colour bar and what it means. Knows no model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from vitmodel.config import Preprocessing
from vitmodel.pixels.open import open_image
from vitmodel.results.heatmap import HeatMap
from vitmodel.utils import NOT_A_MEDICAL_DEVICE

BREAST_LENGTH = 1200  # longest side in pixels of the breast
CONTEXT_MARGIN = 24  # pixels shown around it
MARGIN = 150  # width of the colour bar's column
LINE = 34  # height of a line of text
MIN_TISSUE_VALUE = 20  # grey below which colour fades
STRONGEST = 0.55  # most that a colour covers of the picture below it
FONT, SIZE, INK = cv2.FONT_HERSHEY_SIMPLEX, 0.7, (235, 235, 235)


@dataclass(frozen=True, kw_only=True)
class Caption:
    """What must stand beside the picture."""

    title: str
    """Whose and which image, such as 'R MLO'."""
    score: str
    """What the model says, with the threshold."""
    unit: str
    """What the colours stand for."""
    low: float
    """Value at which colour begins."""
    high: float
    """Value of the strongest colour."""


@dataclass(frozen=True, eq=False)
class DisplayImage:
    """A source image as a viewer shows it."""

    grey: np.ndarray
    """H W uint8."""
    scale: float
    """Its pixels per source pixel."""


def read_display_image(path: Path | str, heat: HeatMap, preprocessing: Preprocessing, inverted: bool) -> DisplayImage:
    """Return the image at `path`, scaled down so that its breast is at most SIDE pixels long.

    Raises ImageRefusedError if the image cannot be read.
    """
    file = open_image(path, preprocessing.voi, preprocessing.for_processing)
    x0, y0, x1, y1 = heat.geometry.box
    scale = min(1.0, BREAST_LENGTH / max(y1 - y0, x1 - x0))
    stored = file.read_stored(min(file.levels, int(-np.log2(scale))))
    size = (max(1, round(file.header.columns * scale)), max(1, round(file.header.rows * scale)))
    grey = file.to_grey(cv2.resize(stored, size, interpolation=cv2.INTER_AREA))
    return DisplayImage(np.rint(255 * (1 - grey if inverted else grey)).astype(np.uint8), scale)


def draw_overlay(picture: DisplayImage, heat: HeatMap, caption: Caption, breast_only: bool = False) -> np.ndarray:
    """The breast, plain and with the map over it, beside a colour bar and above its caption: H W 3, uint8, RGB.

    The colour's strength grows with the value, so that tissue of which nothing is said stays as it was. `breast_only` blackens all else,
    where a name may stand.
    """
    found = heat.to_source_image(picture.scale)
    grey = np.where(np.isnan(found), 0, picture.grey).astype(np.uint8) if breast_only else picture.grey
    window = _window(heat.geometry.box, picture)
    share = np.nan_to_num(np.clip((found - caption.low) / (caption.high - caption.low), 0, 1))[window]
    share *= np.minimum(
        1, grey[window] / MIN_TISSUE_VALUE
    )  # the crop's mask is coarser than the picture, and air stays black
    plain = cv2.cvtColor(grey[window], cv2.COLOR_GRAY2RGB)
    page = np.hstack(
        [plain, np.zeros((len(plain), 8, 3), np.uint8), blend_heat_map(plain, share), colour_bar(len(plain), caption)]
    )
    lines = [caption.title, caption.score, f"Colour: {caption.unit}. It outlines no lesion.", NOT_A_MEDICAL_DEVICE]
    foot = np.zeros((LINE * len(lines) + LINE // 2, page.shape[1], 3), np.uint8)
    size = min(fit_font_size(line, foot.shape[1] - LINE) for line in lines)
    for number, line in enumerate(lines, start=1):
        draw_text(foot, line, (LINE // 2, LINE * number), size)
    return np.vstack([page, foot])


def _window(box: tuple[int, int, int, int], picture: DisplayImage) -> tuple[slice, slice]:
    """The rows and columns of a picture that show the breast and AROUND pixels around it."""
    x0, y0, x1, y1 = (round(edge * picture.scale) for edge in box)
    return slice(max(0, y0 - CONTEXT_MARGIN), y1 + CONTEXT_MARGIN), slice(
        max(0, x0 - CONTEXT_MARGIN), x1 + CONTEXT_MARGIN
    )


def blend_heat_map(picture: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Colours for `share` (H W in [0, 1]) over an RGB picture (H W 3)."""
    colour = cv2.cvtColor(
        cv2.applyColorMap(np.rint(95 + 130 * share).astype(np.uint8), cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB
    )
    strength = (STRONGEST * np.sqrt(share))[..., None]
    return np.rint(picture * (1 - strength) + colour * strength).astype(np.uint8)


def colour_bar(height: int, caption: Caption) -> np.ndarray:
    """The column that tells which colour is which value, over a middling grey: height MARGIN 3."""
    column = np.zeros((height, MARGIN, 3), np.uint8)
    top, length = height // 4, height // 2
    share = np.linspace(1, 0, length)[:, None].repeat(28, axis=1)
    column[top : top + length, 24:52] = blend_heat_map(np.full((*share.shape, 3), 110, np.uint8), share)
    for part in (0, 0.5, 1):
        value = caption.low + (caption.high - caption.low) * (1 - part)
        text = f"{value:.3g}"
        draw_text(column, text, (62, round(top + part * length) + 8), fit_font_size(text, MARGIN - 66))
    return column


def fit_font_size(text: str, width: int) -> float:
    """The size, at most SIZE, at which `text` is at most `width` pixels wide."""
    return SIZE * min(1, width / cv2.getTextSize(text, FONT, SIZE, 1)[0][0])


def draw_text(canvas: np.ndarray, text: str, place: tuple[int, int], size: float) -> None:
    """`text` on `canvas`, its first letter's foot at `place` (x, y)."""
    cv2.putText(canvas, text, place, FONT, size, INK, 1, cv2.LINE_AA)
