"""The RSNA Screening Mammography Breast Cancer Detection release (Kaggle, 2023) and PNG exports of it.

train.csv (or, where it is absent, test.csv) beside train_images/<patient>/<image>.dcm, or beside a folder of <patient>_<image>.png; or a
subset's table with image_path and the release's columns. To read test.csv where both lie there, name that file as the source.

A release of `vitmodel synth` also has lesions.csv, the boxes of its cancers.

Site 2 gives no density and hardly any BIRADS (there 0 = recall, 1 = negative, 2 = normal); the test table has no targets. All NaN here.
"""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

from vitmodel.data import lesions
from vitmodel.data.manifest import as_manifest, read_table
from vitmodel.releases import custom_table
from vitmodel.releases.files import (
    csv_header,
    find_table,
    get_or_default,
    image_stem,
    list_images,
    patient_from_name,
    tables_with_columns,
)

EXPECTED_FILES = "train.csv or test.csv beside train_images/<patient>/<image>.dcm or <patient>_<image>.png"
TABLE_NAMES = ("train.csv", "test.csv")
LESION_TABLE = "lesions.csv"
SUBSET_COLUMNS = ("image_path", "patient_id", "image_id", "machine_id")


def detect(root: Path) -> bool:
    return bool(_table(root) or tables_with_columns(root, SUBSET_COLUMNS))


def read(root: Path) -> pd.DataFrame:
    """One row per row of the table, whether its image is there or not. Raises UsageError."""
    path = _table(root)
    if path is None:
        return custom_table.read(root, dataset="rsna")
    table = read_table(path, ["patient_id", "image_id", "laterality", "view"]).rename(columns={"BIRADS": "birads"})
    names = table.patient_id + "_" + table.image_id
    folder = root if root.is_dir() else root.parent
    released = (
        os.path.join(os.path.abspath(folder), f"{path.stem}_images", "")
        + table.patient_id
        + "/"
        + table.image_id
        + ".dcm"
    )
    files = {
        _name(file): file for file in sorted(list_images(folder), key=lambda file: file.endswith(".dcm"))
    }  # DICOM before a copy
    boxes = table.image_id.map(_boxes(path.with_name(LESION_TABLE)))
    return as_manifest(
        table.assign(path=get_or_default(names, files, released), dataset="rsna", lesions=boxes), str(path)
    )


def _boxes(path: Path) -> dict[str, str]:
    """The column `lesions` of each image with a cancer that the table shows."""
    if not path.is_file():
        return {}
    table = read_table(path, ["image_id", "cancer", "x0", "y0", "x1", "y1"]).query("cancer == '1'")
    boxes = table[["x0", "y0", "x1", "y1"]].astype(float).groupby(table.image_id)
    return {str(image): lesions.boxes_to_text(rows.to_numpy()) for image, rows in boxes}


def _table(root: Path) -> Path | None:
    """The release's table in `source`; or beside it, where `source` is a folder of exported pictures."""
    path = find_table(root, *TABLE_NAMES)
    if path is None and root.is_dir() and any(patient_from_name(entry.name) for entry in os.scandir(root)):
        path = find_table(root.parent, *TABLE_NAMES)
    return None if path is None or {"path", "image_path"} & csv_header(path) else path


def _name(file: str) -> str:
    """<patient>_<image> of .../<patient>/<image>.dcm and of .../<patient>_<image>.png."""
    name = image_stem(file)
    return name if "_" in name else f"{os.path.basename(os.path.dirname(file))}_{name}"
