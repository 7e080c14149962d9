"""How vendors present the same breast: contrast curve, noise, black level, burned-in marker, collimator. Knows no anatomy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from vitmodel.phantoms.anatomy import PhantomView
from vitmodel.utils import derive_seed


@dataclass(frozen=True)
class VendorStyle:
    """How one vendor presents a view: contrast curve, noise, black level, marker, collimator blades."""

    midpoint: float = 0.5
    """Tissue value shown as mid-grey."""
    slope: float = 1.0
    """Steepness of the contrast curve; 1 leaves the middle greys."""
    noise: float = 0.0
    """Electronic noise, standard deviation on the 0 to 1 scale."""
    black_level: float = 0.0
    """Grey of the air, a black level that lifts every pixel."""
    marker: Literal["text", "lead", "none"] = "text"
    marker_row: float = 0.1
    """Marker's height on the picture, as a fraction."""
    collimation_mm: float = 0.0
    """Width of the bright border that the collimator leaves at the edges away from the chest wall."""


def apply_style(view: PhantomView, style: VendorStyle, text: str, seed: int, chest_wall: str) -> np.ndarray:
    """The view as a vendor would show it: float32 H W in [0, 1].

    `text` is the burned-in marker, such as "R MLO"; it goes into the air, on the side away from `chest_wall` ("L" or "R").
    """
    rng = np.random.default_rng(derive_seed(seed, "look"))
    height, width = view.image.shape
    image = _contrast(view.image, style)
    if style.noise:
        image += style.noise * rng.standard_normal(image.shape, np.float32)
    image = style.black_level + (1 - style.black_level) * np.where(
        view.mask, np.clip(image, 0, 1), 0
    )  # a black level lifts all, and hides no skin
    canvas = np.zeros((height, width), np.uint8)  # drawn with the chest wall at the left, letters excepted
    if border := round(style.collimation_mm / view.spacing):
        canvas[:, -border:] = canvas[:border, width * 9 // 10 :] = canvas[-border:, width * 9 // 10 :] = 60
    if chest_wall == "R":
        canvas = np.ascontiguousarray(canvas[:, ::-1])
    _draw_marker(canvas, style, text, view.spacing, chest_wall)
    canvas[view.mask] = 0
    return np.clip(np.maximum(image, canvas.astype(np.float32) / 255), 0, 1)


def _contrast(image: np.ndarray, style: VendorStyle) -> np.ndarray:
    """A sigmoid that keeps 0 at 0 and 1 at 1."""
    steepness, midpoint = np.float32(4 * style.slope), np.float32(style.midpoint)
    low, high = (1 / (1 + np.exp(-steepness * (end - midpoint))) for end in (np.float32(0), np.float32(1)))
    return (1 / (1 + np.exp(-steepness * (image - midpoint))) - low) / (high - low)


def _draw_marker(canvas: np.ndarray, style: VendorStyle, text: str, spacing: float, chest_wall: str) -> None:
    if style.marker == "none":
        return
    height, width = canvas.shape
    scale = 7 / spacing / 22  # capitals of the font are 22 pixels high at scale 1; 7 mm on the picture
    thick = max(1, round(0.7 / spacing))
    font = cv2.FONT_HERSHEY_SIMPLEX if style.marker == "text" else cv2.FONT_HERSHEY_DUPLEX
    (across, up), _ = cv2.getTextSize(text, font, scale, thick)
    row, margin = int(style.marker_row * height) + up, round(14 / spacing)
    column = width - margin - across if chest_wall == "L" else margin
    if style.marker == "lead":  # a metal plate with the letters cut out of it
        pad = round(2.5 / spacing)
        cv2.rectangle(canvas, (column - pad, row - up - pad), (column + across + pad, row + pad), 235, -1)
        cv2.putText(canvas, text, (column, row), font, scale, 25, thick, cv2.LINE_AA)
    else:
        cv2.putText(canvas, text, (column, row), font, scale, 190, thick, cv2.LINE_AA)
