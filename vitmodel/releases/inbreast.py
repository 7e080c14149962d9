"""INbreast (2012; doi:10.1016/j.acra.2011.09.014): INbreast.csv and AllDICOMs/<file>_<patient>_MG_<side>_<view>_ANON.dcm.

The table's patients are removed; the code in the file names tells them apart. An image that is not there becomes a patient of its own.
Pathology is not in the table, so cancer is NaN; BI-RADS 4a, 4b and 4c become 4 (birads_text keeps the letter).
"""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

from vitmodel.data.manifest import as_manifest, read_table
from vitmodel.releases.files import find_table, image_files, lookup, side, stem

LOOKS_FOR = "INbreast.csv beside AllDICOMs/"
TABLE = "INbreast.csv"
NEEDED = ("Laterality", "View", "File Name", "ACR", "Bi-Rads")
DENSITY = {"1": "A", "2": "B", "3": "C", "4": "D"}


def detect(source: Path) -> bool:
    return find_table(source, TABLE) is not None


def read(source: Path) -> pd.DataFrame:
    """One row per image. Raises UsageError."""
    path = source if source.is_file() else source / TABLE
    table = read_table(path, NEEDED, separator=";")
    files = {stem(file).split("_")[0]: file for file in image_files(path.parent)}
    patients = {image: stem(file).split("_")[1] for image, file in files.items() if "_" in stem(file)}
    image, birads = table["File Name"].str.strip(), table["Bi-Rads"].str.strip()
    released = os.path.join(os.path.abspath(path.parent), "AllDICOMs", "") + image + ".dcm"
    frame = pd.DataFrame(
        {
            "image_id": image,
            "patient_id": lookup(image, patients, image),
            "laterality": side(table.Laterality),
            "view": table.View.str.strip(),
            "path": lookup(image, files, released),
            "dataset": "inbreast",
            "birads": birads.str[:1],
            "birads_text": birads,
            "density": table.ACR.str.strip().map(DENSITY),
        }
    )
    return as_manifest(frame, str(path))
