"""A grid of crops with captions in one picture."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

CAPTION_HEIGHT = 14
"""Height of the caption under each crop, in pixels."""
GAP = 2
"""Gap between crops, in pixels."""


def contact_grid(
    crops: Sequence[np.ndarray], captions: Sequence[str] = (), columns: int = 8, height: int = 192
) -> np.ndarray:
    """Return crops arranged row by row in one picture.

    Args:
        crops: Crops `(H, W)`, uint8, uint16 or float32 in [0, 1].
        captions: A caption for each crop, or none at all.
        columns: Number of crops per row.
        height: Height of each crop in the picture, in pixels.

    Returns:
        The picture, two-dimensional uint8.
    """
    resized = [_resize(_to_8_bits(crop), height) for crop in crops]
    width = max((crop.shape[1] for crop in resized), default=1)
    caption_height = CAPTION_HEIGHT if captions else 0
    row_height = height + caption_height + GAP
    rows = -(-len(resized) // columns)
    picture = np.zeros((rows * row_height, columns * (width + GAP)), np.uint8)
    for number, crop in enumerate(resized):
        top = number // columns * row_height
        left = number % columns * (width + GAP)
        picture[top : top + height, left : left + crop.shape[1]] = crop
        if captions:
            origin = (left + 2, top + height + 11)
            cv2.putText(picture, captions[number], origin, cv2.FONT_HERSHEY_SIMPLEX, 0.36, 255, 1, cv2.LINE_AA)
    return picture


def _to_8_bits(crop: np.ndarray) -> np.ndarray:
    """Return a crop as uint8."""
    if crop.dtype == np.uint16:
        return (crop >> 8).astype(np.uint8)
    return crop if crop.dtype == np.uint8 else np.rint(crop * 255).astype(np.uint8)


def _resize(crop: np.ndarray, height: int) -> np.ndarray:
    """Return a crop resized to a height, at its own aspect ratio."""
    factor = height / crop.shape[0]
    kernel = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return cv2.resize(crop, (max(1, round(crop.shape[1] * factor)), height), interpolation=kernel)
