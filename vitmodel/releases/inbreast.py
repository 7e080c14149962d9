"""Read INbreast (2012; doi:10.1016/j.acra.2011.09.014).

The release has INbreast.csv and AllDICOMs/<file>_<patient>_MG_<side>_<view>_ANON.dcm. Patient ids were removed from the
table, so the code in the file names identifies patients. An image whose file is missing becomes a patient of its own.
The table has no pathology, so `cancer` is NaN. BI-RADS 4a, 4b and 4c become 4; `birads_text` keeps the letter.
"""

from __future__ import annotations

import os

import pandas as pd

from vitmodel.data.manifest import as_manifest
from vitmodel.data.tables import read_table
from vitmodel.releases.files import get_or_default, image_stem, normalize_side
from vitmodel.releases.source import Source

EXPECTED_FILES = "INbreast.csv next to AllDICOMs/"
TABLE_NAME = "INbreast.csv"
NEEDED_COLUMNS = ("Laterality", "View", "File Name", "ACR", "Bi-Rads")
DENSITY = {"1": "A", "2": "B", "3": "C", "4": "D"}


def detect(source: Source) -> bool:
    """Return whether the source has the release's table."""
    return source.find_table(TABLE_NAME) is not None


def read(source: Source) -> pd.DataFrame:
    """Return a manifest with one row per image.

    Raises:
        UsageError: The table cannot be read, or lacks a column.
    """
    path = source.find_table(TABLE_NAME) or source.root
    table = read_table(path, NEEDED_COLUMNS)
    name_parts = {file: image_stem(file).split("_") for file in source.images}
    files = {parts[0]: file for file, parts in name_parts.items()}
    patients = {image: name_parts[file][1] for image, file in files.items() if len(name_parts[file]) > 1}
    image = table["File Name"].str.strip()
    birads = table["Bi-Rads"].str.strip()
    default_paths = os.path.join(os.path.abspath(path.parent), "AllDICOMs", "") + image + ".dcm"
    frame = pd.DataFrame(
        {
            "image_id": image,
            "patient_id": get_or_default(image, patients, image),
            "laterality": normalize_side(table.Laterality),
            "view": table.View.str.strip(),
            "path": get_or_default(image, files, default_paths),
            "dataset": "inbreast",
            "birads": birads.str[:1],
            "birads_text": birads,
            "density": table.ACR.str.strip().map(DENSITY),
        }
    )
    return as_manifest(frame, str(path))
