"""The mini-MIAS films (1994) as pictures with a table: CSV with image_path, severity (N, B, M) and density_FGD.

Background tissue is given as F (fatty), G (glandular), D (dense): three classes that do not map to the four of ACR, so density stays
NaN and density_FGD is kept. The original PGM files must be converted to PNG first.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from vitmodel.data import listing
from vitmodel.data.source import tables_with

LOOKS_FOR = "a CSV file with image_path, severity and density_FGD"


def detect(source: Path) -> bool:
    return bool(tables_with(source, ["image_path", "patient_id", "severity", "density_FGD"]))


def read(source: Path) -> pd.DataFrame:
    """One row per film; cancer = malignant. Raises UsageError."""
    table = listing.read(source, dataset="mias")
    return table.assign(cancer=table.severity.map({"M": 1.0, "B": 0.0, "N": 0.0}))
