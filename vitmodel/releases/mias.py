"""Read the mini-MIAS films (1994) from a CSV table with image_path, severity (N, B, M) and density_FGD.

The original PGM files must be converted to PNG first. Background tissue is given as F (fatty), G (glandular) or
D (dense). These three classes do not map to the four of the ACR, so `density` is NaN and `density_FGD` is kept. If the
table has the columns x, y_top_left and radius, the box of a malignant finding is made from this circle.
"""

from __future__ import annotations

import pandas as pd

from vitmodel.data import lesions
from vitmodel.releases import custom_table
from vitmodel.releases.source import Source

EXPECTED_FILES = "a CSV file with image_path, severity and density_FGD"


def detect(source: Source) -> bool:
    """Return whether the source has a table with the columns of mini-MIAS."""
    return bool(source.tables_with_columns(["image_path", "patient_id", "severity", "density_FGD"]))


def read(source: Source) -> pd.DataFrame:
    """Return a manifest with one row per film, where `cancer` means malignant.

    Raises:
        UsageError: The folder contains several tables, or the table is not valid.
    """
    table = custom_table.read(source, dataset="mias")
    return table.assign(cancer=table.severity.map({"M": 1.0, "B": 0.0, "N": 0.0}), lesions=_boxes(table))


def _boxes(table: pd.DataFrame) -> pd.Series:
    """Return the bounding box of the circle of each malignant finding, as text; NaN if it has no circle."""
    if not {"x", "y_top_left", "radius"} <= set(table):
        return pd.Series(index=table.index, dtype=object)
    x, y, radius = (pd.to_numeric(table[name], errors="coerce") for name in ("x", "y_top_left", "radius"))
    corners = pd.concat([x - radius, y - radius, x + radius, y + radius], axis=1)
    has_circle = (table.severity == "M") & corners.notna().all(axis=1)
    texts = corners[has_circle].apply(lambda row: lesions.boxes_to_text([row]), axis=1)
    return texts.reindex(table.index)
