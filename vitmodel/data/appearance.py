"""What an image looks like in a few numbers and words that say nothing about the patient: the columns of drift.

They are written into score tables, and their distribution in the training set into the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

NUMBERS = {
    "grey_mean": "mean grey value",
    "grey_contrast": "grey contrast (SD)",
    "breast_height_mm": "breast height in mm",
    "breast_share": "breast size (share of the picture)",
}
"""Columns of numbers -> what they hold."""
CATEGORIES = {"view": "view", "laterality": "side", "machine_id": "machine"}
"""Columns of names -> what they hold."""


@dataclass(frozen=True)
class Appearance:
    """The numbers of one image; None = unknown."""

    grey_mean: float | None = None
    """Mean of the tissue's grey values, 0 to 1."""
    grey_contrast: float | None = None
    """Standard deviation of the tissue's grey values."""
    breast_height_mm: float | None = None
    """Height of the breast's box in mm."""
    breast_share: float | None = None
    """Area of the breast's box as a share of the whole picture."""

    def to_record(self) -> dict[str, str | float | None]:
        """Return the numbers by column."""
        return asdict(self)


def measure_appearance(pixels: np.ndarray, record: Mapping[str, Any]) -> Appearance:
    """Return the numbers of an image.

    Args:
        pixels: The crop `(H, W)` in [0, 1]; 0 = air.
        record: The image's provenance: the crop box, the size and the row spacing of its source, where they are known.
    """
    tissue = pixels[pixels > 0]
    known = {name: value for name, value in record.items() if value is not None and not pd.isna(value)}
    height_mm = share = None
    if {"box_x0", "box_y0", "box_x1", "box_y1"} <= known.keys():
        x0, y0, x1, y1 = (float(known[f"box_{side}"]) for side in ("x0", "y0", "x1", "y1"))
        if "spacing_row" in known:
            height_mm = (y1 - y0) * float(known["spacing_row"])
        if {"source_height", "source_width"} <= known.keys():
            share = (y1 - y0) * (x1 - x0) / (float(known["source_height"]) * float(known["source_width"]))
    return Appearance(float(tissue.mean()), float(tissue.std()), height_mm, share)
