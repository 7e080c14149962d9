"""Many crops in one picture. Knows pixels and captions, no table."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

CAPTION_HEIGHT = 14  # pixels under each crop
GAP = 2


def contact_grid(
    crops: Sequence[np.ndarray], captions: Sequence[str] = (), columns: int = 8, height: int = 192
) -> np.ndarray:
    """Crops (H W, uint8, uint16 or float32 in [0, 1]) row by row, each `height` pixels high, with captions below: H' W' uint8."""
    shown = [_resized(_to_8_bits(crop), height) for crop in crops]
    width = max((crop.shape[1] for crop in shown), default=1)
    below = CAPTION_HEIGHT if captions else 0
    rows = -(-len(shown) // columns)
    picture = np.zeros((rows * (height + below + GAP), columns * (width + GAP)), np.uint8)
    for number, crop in enumerate(shown):
        top, left = number // columns * (height + below + GAP), number % columns * (width + GAP)
        picture[top : top + height, left : left + crop.shape[1]] = crop
        if captions:
            cv2.putText(
                picture,
                captions[number],
                (left + 2, top + height + 11),
                cv2.FONT_HERSHEY_SIMPLEX,
                0.36,
                255,
                1,
                cv2.LINE_AA,
            )
    return picture


def _to_8_bits(crop: np.ndarray) -> np.ndarray:
    if crop.dtype == np.uint16:
        return (crop >> 8).astype(np.uint8)
    return crop if crop.dtype == np.uint8 else np.rint(crop * 255).astype(np.uint8)


def _resized(crop: np.ndarray, height: int) -> np.ndarray:
    factor = height / crop.shape[0]
    kernel = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return cv2.resize(crop, (max(1, round(crop.shape[1] * factor)), height), interpolation=kernel)
