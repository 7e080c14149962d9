"""Boxes of proven cancers: convert them between the text of a table's cell, arrays and positions on a crop."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from vitmodel.errors import UsageError
from vitmodel.pixels.preprocessing import CropGeometry

NO_BOXES = np.empty((0, 4), np.float32)


def boxes_to_text(boxes: Iterable[Iterable[float]]) -> str:
    """Return boxes (x0, y0, x1, y1 in source pixels, ends exclusive) as a cell of the column `lesions`."""
    return ";".join(" ".join(f"{value:g}" for value in box) for box in boxes)


def boxes_from_text(text: str, file: str = "a row") -> np.ndarray:
    """Return the boxes of a cell of the column `lesions`, `(K, 4)`.

    Args:
        text: The cell.
        file: The row's file, for the message.

    Raises:
        UsageError: The text is not a list of boxes.
    """
    try:
        boxes = [[float(value) for value in box.split()] for box in text.split(";")]
        return np.array(boxes, np.float32).reshape(-1, 4)
    except ValueError:
        raise UsageError(
            f"column lesions: the value of {file} is not a list of boxes; write x0 y0 x1 y1 for each, separated by ';'"
        ) from None


def boxes_on_crop(boxes: np.ndarray, geometry: CropGeometry) -> np.ndarray:
    """Return boxes of the source image, `(K, 4)`, in pixels of the crop that `geometry` describes: `(K, 4)`.

    Ends are exclusive.
    """
    matrix = geometry.to_source()
    scale = np.diag(matrix[:, :2])
    shift = matrix[:, 2]
    # The matrix has pixel centres at whole numbers; boxes have pixel edges there.
    corners = (boxes.reshape(-1, 2, 2) - 0.5 - shift) / scale + 0.5
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1).astype(np.float32)
