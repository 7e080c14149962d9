"""Vendor styles of a mammogram: contrast curve, noise, black level, burned-in marker and collimator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from vitmodel.phantoms.anatomy import PhantomView
from vitmodel.utils import derive_seed


@dataclass(frozen=True)
class VendorStyle:
    """How one vendor presents a view."""

    midpoint: float = 0.5
    """Tissue value displayed as mid-grey."""
    slope: float = 1.0
    """Steepness of the contrast curve; 1 leaves medium greys unchanged."""
    noise: float = 0.0
    """Standard deviation of the electronic noise on the 0 to 1 scale."""
    black_level: float = 0.0
    """Grey value of air, by which every pixel is raised."""
    marker: Literal["text", "lead", "none"] = "text"
    """Burned-in letters, a lead plate with the letters cut out, or no marker."""
    marker_row: float = 0.1
    """Vertical position of the marker as a fraction of the image height."""
    collimation_mm: float = 0.0
    """Width of the bright collimator border at the edges away from the chest wall."""


def apply_style(view: PhantomView, style: VendorStyle, text: str, seed: int, chest_wall: str) -> np.ndarray:
    """Return the view as presented by a vendor, `(H, W)` float32 in [0, 1].

    Args:
        view: The view to present.
        style: The vendor's style.
        text: Burned-in marker, such as "R MLO". It is drawn over air, on the side away from the chest wall.
        seed: Seed of the electronic noise.
        chest_wall: Side of the image, "L" or "R", at which the chest wall lies.
    """
    rng = np.random.default_rng(derive_seed(seed, "look"))
    height, width = view.image.shape
    image = _contrast(view.image, style)
    if style.noise:
        image += style.noise * rng.standard_normal(image.shape, np.float32)
    tissue = np.where(view.mask, np.clip(image, 0, 1), 0)
    image = style.black_level + (1 - style.black_level) * tissue  # raises all pixels, so that it hides no skin
    canvas = np.zeros((height, width), np.uint8)  # the collimator is drawn with the chest wall at the left
    if border := round(style.collimation_mm / view.spacing):
        canvas[:, -border:] = canvas[:border, width * 9 // 10 :] = canvas[-border:, width * 9 // 10 :] = 60
    if chest_wall == "R":
        canvas = np.ascontiguousarray(canvas[:, ::-1])
    _draw_marker(canvas, style, text, view.spacing, chest_wall)
    canvas[view.mask] = 0
    return np.clip(np.maximum(image, canvas.astype(np.float32) / 255), 0, 1)


def _contrast(image: np.ndarray, style: VendorStyle) -> np.ndarray:
    """Apply a sigmoid that maps 0 to 0 and 1 to 1."""
    steepness = np.float32(4 * style.slope)
    midpoint = np.float32(style.midpoint)
    low, high = (1 / (1 + np.exp(-steepness * (end - midpoint))) for end in (np.float32(0), np.float32(1)))
    return (1 / (1 + np.exp(-steepness * (image - midpoint))) - low) / (high - low)


def _draw_marker(canvas: np.ndarray, style: VendorStyle, text: str, spacing: float, chest_wall: str) -> None:
    """Draw the marker on `canvas`, 14 mm from the edge away from the chest wall."""
    if style.marker == "none":
        return
    height, width = canvas.shape
    scale = 7 / spacing / 22  # letters 7 mm high; capitals of the font are 22 pixels high at scale 1
    thickness = max(1, round(0.7 / spacing))
    font = cv2.FONT_HERSHEY_SIMPLEX if style.marker == "text" else cv2.FONT_HERSHEY_DUPLEX
    (text_width, text_height), _ = cv2.getTextSize(text, font, scale, thickness)
    row = int(style.marker_row * height) + text_height
    margin = round(14 / spacing)
    column = width - margin - text_width if chest_wall == "L" else margin
    level = 190
    if style.marker == "lead":  # a metal plate with the letters cut out
        pad = round(2.5 / spacing)
        level = 25
        corner = (column - pad, row - text_height - pad)
        cv2.rectangle(canvas, corner, (column + text_width + pad, row + pad), 235, -1)
    cv2.putText(canvas, text, (column, row), font, scale, level, thickness, cv2.LINE_AA)
