"""A heat map laid over its mammogram, for the eye: beside the plain picture, with a colour bar and what it means. Knows no model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from vitmodel.config import Preprocessing
from vitmodel.pixels.image import open_image
from vitmodel.results.heatmap import HeatMap
from vitmodel.utils import NOT_A_MEDICAL_DEVICE

SIDE = 1200  # longest side in pixels of each of the two pictures
MARGIN = 150  # width of the colour bar's column
LINE = 34  # height of a line of text
STRONGEST = 0.65  # most that a colour covers of the picture below it
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


def picture_of(path: Path | str, preprocessing: Preprocessing, inverted: bool) -> np.ndarray:
    """The image at `path` as a viewer shows it, H W uint8, at most SIDE pixels long. Raises ImageRefused."""
    file = open_image(path, preprocessing.voi, preprocessing.for_processing)
    longest = max(file.header.rows, file.header.columns)
    stored = file.stored(min(file.levels, max(0, int(np.log2(longest / SIDE)))))
    factor = min(1.0, SIDE / longest)
    size = (max(1, round(file.header.columns * factor)), max(1, round(file.header.rows * factor)))
    grey = file.grey(cv2.resize(stored, size, interpolation=cv2.INTER_AREA))
    return np.rint(255 * (1 - grey if inverted else grey)).astype(np.uint8)


def draw_overlay(picture: np.ndarray, heat: HeatMap, caption: Caption) -> np.ndarray:
    """The picture, plain and with the map over it, beside a colour bar and above its caption: H W 3, uint8, RGB.

    The colour's strength grows with the value, so that tissue of which nothing is said stays as it was.
    """
    found = heat.on_source(picture.shape[0] / heat.source[0])[: picture.shape[0], : picture.shape[1]]
    share = np.nan_to_num(np.clip((found - caption.low) / (caption.high - caption.low), 0, 1))
    plain = cv2.cvtColor(picture, cv2.COLOR_GRAY2RGB)
    both = np.hstack([plain, np.zeros((len(plain), 8, 3), np.uint8), blend(plain, share)])
    page = np.hstack([both, colour_bar(len(both), caption)])
    lines = [f"{caption.title}    {caption.score}", f"Colour: {caption.unit}. It is no outline of a lesion.", NOT_A_MEDICAL_DEVICE]
    foot = np.zeros((LINE * len(lines) + LINE // 2, page.shape[1], 3), np.uint8)
    for number, line in enumerate(lines, start=1):
        write(foot, line, (LINE // 2, LINE * number))
    return np.vstack([page, foot])


def blend(picture: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Colours for `share` (H W in [0, 1]) over an RGB picture (H W 3)."""
    colour = cv2.cvtColor(cv2.applyColorMap(np.rint(95 + 160 * share).astype(np.uint8), cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    strength = (STRONGEST * np.sqrt(share))[..., None]
    return np.rint(picture * (1 - strength) + colour * strength).astype(np.uint8)


def colour_bar(height: int, caption: Caption) -> np.ndarray:
    """The column that tells which colour is which value, over a middling grey: height MARGIN 3."""
    column = np.zeros((height, MARGIN, 3), np.uint8)
    top, length = height // 4, height // 2
    share = np.linspace(1, 0, length)[:, None].repeat(28, axis=1)
    column[top : top + length, 24:52] = blend(np.full((*share.shape, 3), 110, np.uint8), share)
    for part in (0, 0.5, 1):
        value = caption.low + (caption.high - caption.low) * (1 - part)
        write(column, f"{value:.3g}", (62, round(top + part * length) + 8))
    return column


def write(canvas: np.ndarray, text: str, place: tuple[int, int]) -> None:
    """`text` on `canvas`, its first letter's foot at `place` (x, y); smaller where it would not fit."""
    (width, _), _ = cv2.getTextSize(text, FONT, SIZE, 1)
    size = SIZE * min(1, (canvas.shape[1] - place[0] - 8) / width)
    cv2.putText(canvas, text, place, FONT, size, INK, 1, cv2.LINE_AA)
