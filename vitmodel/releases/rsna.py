"""Read the RSNA Screening Mammography Breast Cancer Detection release (Kaggle, 2023) and PNG exports of it.

The source is one of:

- train.csv (or test.csv, if there is no train.csv) next to train_images/<patient>/<image>.dcm, or next to a folder of
  <patient>_<image>.png. If the folder contains both tables, pass test.csv itself to read that one.
- The table of a subset, with image_path and the release's columns.

A release made by `vitmodel synth` also has lesions.csv, the boxes of its cancers.

Site 2 gives no density and hardly any BIRADS (in this release 0 = recall, 1 = negative, 2 = normal). The test table has
no targets. All these values are NaN.
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

EXPECTED_FILES = "train.csv or test.csv next to train_images/<patient>/<image>.dcm or <patient>_<image>.png"
TABLE_NAMES = ("train.csv", "test.csv")
LESION_TABLE = "lesions.csv"
SUBSET_COLUMNS = ("image_path", "patient_id", "image_id", "machine_id")


def detect(root: Path) -> bool:
    """Return whether `root` has the release's table or the table of a subset."""
    return bool(_table(root) or tables_with_columns(root, SUBSET_COLUMNS))


def read(root: Path) -> pd.DataFrame:
    """Return a manifest with one row per row of the table, including images whose file is missing.

    Raises:
        UsageError: A table cannot be read, or lacks a column.
    """
    path = _table(root)
    if path is None:
        return custom_table.read(root, dataset="rsna")
    table = read_table(path, ["patient_id", "image_id", "laterality", "view"]).rename(columns={"BIRADS": "birads"})
    names = table.patient_id + "_" + table.image_id
    folder = root if root.is_dir() else root.parent
    image_folder = os.path.join(os.path.abspath(folder), f"{path.stem}_images", "")
    default_paths = image_folder + table.patient_id + "/" + table.image_id + ".dcm"
    dicom_last = sorted(list_images(folder), key=lambda file: file.endswith(".dcm"))
    files = {_name(file): file for file in dicom_last}  # of two files of one name, the DICOM file wins
    boxes = table.image_id.map(_boxes(path.with_name(LESION_TABLE)))
    paths = get_or_default(names, files, default_paths)
    return as_manifest(table.assign(path=paths, dataset="rsna", lesions=boxes), str(path))


def _boxes(path: Path) -> dict[str, str]:
    """Return the value of the column `lesions` for each image in which the table of lesions has a cancer."""
    if not path.is_file():
        return {}
    table = read_table(path, ["image_id", "cancer", "x0", "y0", "x1", "y1"]).query("cancer == '1'")
    boxes = table[["x0", "y0", "x1", "y1"]].astype(float).groupby(table.image_id)
    return {str(image): lesions.boxes_to_text(rows.to_numpy()) for image, rows in boxes}


def _table(root: Path) -> Path | None:
    """Return the release's table in `root`, or in the parent folder if `root` is a folder of exported images."""
    path = find_table(root, *TABLE_NAMES)
    if path is None and root.is_dir() and any(patient_from_name(entry.name) for entry in os.scandir(root)):
        path = find_table(root.parent, *TABLE_NAMES)
    return None if path is None or {"path", "image_path"} & csv_header(path) else path


def _name(file: str) -> str:
    """Return <patient>_<image> for .../<patient>/<image>.dcm and for .../<patient>_<image>.png."""
    name = image_stem(file)
    return name if "_" in name else f"{os.path.basename(os.path.dirname(file))}_{name}"
