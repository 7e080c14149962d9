"""The mini-MIAS films (1994) as pictures with a table: CSV with image_path, severity (N, B, M) and density_FGD.

Background tissue is given as F (fatty), G (glandular), D (dense): three classes that do not map to the four of ACR, so density stays
NaN and density_FGD is kept. The original PGM files must be converted to PNG first. Of a malignant finding, a circle is known where the
table has x, y_top_left and radius.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from vitmodel.data import lesions
from vitmodel.releases import custom_table
from vitmodel.releases.files import tables_with_columns

EXPECTED_FILES = "a CSV file with image_path, severity and density_FGD"


def detect(root: Path) -> bool:
    return bool(tables_with_columns(root, ["image_path", "patient_id", "severity", "density_FGD"]))


def read(root: Path) -> pd.DataFrame:
    """One row per film; cancer = malignant. Raises UsageError."""
    table = custom_table.read(root, dataset="mias")
    return table.assign(cancer=table.severity.map({"M": 1.0, "B": 0.0, "N": 0.0}), lesions=_boxes(table))


def _boxes(table: pd.DataFrame) -> pd.Series:
    """The box about the circle of each malignant finding whose circle is known."""
    if not {"x", "y_top_left", "radius"} <= set(table):
        return pd.Series(index=table.index, dtype=object)
    x, y, radius = (pd.to_numeric(table[name], errors="coerce") for name in ("x", "y_top_left", "radius"))
    corners = pd.concat([x - radius, y - radius, x + radius, y + radius], axis=1)
    known = (table.severity == "M") & corners.notna().all(axis=1)
    return corners[known].apply(lambda row: lesions.boxes_to_text([row]), axis=1).reindex(table.index)
