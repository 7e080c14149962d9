"""Where proven cancers lie: boxes as the text of a table's cell, and on a crop. Knows no release, and not what a box is used for."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from vitmodel.errors import UsageError
from vitmodel.pixels.preprocessing import CropGeometry

NO_BOXES = np.empty((0, 4), np.float32)


def boxes_to_text(boxes: Iterable[Iterable[float]]) -> str:
    """Boxes x0, y0, x1, y1, ends exclusive, in source pixels as a cell of the column `lesions`."""
    return ";".join(" ".join(f"{value:g}" for value in box) for box in boxes)


def boxes_from_text(text: str) -> np.ndarray:
    """The boxes of such a cell: K 4. Raises UsageError where it is no such text."""
    try:
        return np.array([[float(value) for value in box.split()] for box in text.split(";")], np.float32).reshape(-1, 4)
    except ValueError:
        raise UsageError(f"column lesions: {text!r} is not x0 y0 x1 y1, boxes separated by ';'") from None


def boxes_on_crop(boxes: np.ndarray, geometry: CropGeometry) -> np.ndarray:
    """Boxes of the source (K 4) on the crop that `geometry` describes: K 4, ends exclusive, in its pixels."""
    matrix = geometry.to_source()
    scale, shift = np.diag(matrix[:, :2]), matrix[:, 2]
    corners = (
        boxes.reshape(-1, 2, 2) - 0.5 - shift
    ) / scale + 0.5  # pixel centres at whole numbers there, edges in boxes
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1).astype(np.float32)
