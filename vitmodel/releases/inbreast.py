"""INbreast (2012; doi:10.1016/j.acra.2011.09.014): INbreast.csv and AllDICOMs/<file>_<patient>_MG_<side>_<view>_ANON.dcm.

The table's patients are removed; the code in the file names tells them apart. An image that is not there becomes a patient of its own.
Pathology is not in the table, so cancer is NaN; BI-RADS 4a, 4b and 4c become 4 (birads_text keeps the letter).
"""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

from vitmodel.data.manifest import as_manifest, read_table
from vitmodel.releases.files import find_table, get_or_default, image_stem, list_images, normalize_side

EXPECTED_FILES = "INbreast.csv beside AllDICOMs/"
TABLE_NAME = "INbreast.csv"
NEEDED_COLUMNS = ("Laterality", "View", "File Name", "ACR", "Bi-Rads")
DENSITY = {"1": "A", "2": "B", "3": "C", "4": "D"}


def detect(root: Path) -> bool:
    return find_table(root, TABLE_NAME) is not None


def read(root: Path) -> pd.DataFrame:
    """One row per image. Raises UsageError."""
    path = root if root.is_file() else root / TABLE_NAME
    table = read_table(path, NEEDED_COLUMNS, separator=";")
    files = {image_stem(file).split("_")[0]: file for file in list_images(path.parent)}
    patients = {image: image_stem(file).split("_")[1] for image, file in files.items() if "_" in image_stem(file)}
    image, birads = table["File Name"].str.strip(), table["Bi-Rads"].str.strip()
    released = os.path.join(os.path.abspath(path.parent), "AllDICOMs", "") + image + ".dcm"
    frame = pd.DataFrame(
        {
            "image_id": image,
            "patient_id": get_or_default(image, patients, image),
            "laterality": normalize_side(table.Laterality),
            "view": table.View.str.strip(),
            "path": get_or_default(image, files, released),
            "dataset": "inbreast",
            "birads": birads.str[:1],
            "birads_text": birads,
            "density": table.ACR.str.strip().map(DENSITY),
        }
    )
    return as_manifest(frame, str(path))
