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
import re
from pathlib import Path

import pandas as pd

from vitmodel.archives import is_source_file
from vitmodel.data import lesions
from vitmodel.data.manifest import as_manifest
from vitmodel.data.tables import read_table
from vitmodel.releases import custom_table
from vitmodel.releases.files import get_or_default, image_stem
from vitmodel.releases.listing import dicom_last
from vitmodel.releases.missing_tables import MissingTable
from vitmodel.releases.source import Source

EXPECTED_FILES = "train.csv or test.csv next to train_images/<patient>/<image>.dcm or <patient>_<image>.png"
TABLE_NAMES = ("train.csv", "test.csv")
MISSING_TABLE = MissingTable(
    "train.csv of RSNA Screening Mammography",
    "https://www.kaggle.com/competitions/rsna-breast-cancer-detection/data",
    re.compile(r"/train_images[^/]*/\d+/\d+\.\w+$"),
)
LESION_TABLE = "lesions.csv"
NEEDED_COLUMNS = ("patient_id", "image_id", "laterality", "view")
SUBSET_COLUMNS = ("image_path", "patient_id", "image_id", "machine_id")


def detect(source: Source) -> bool:
    """Return whether the source has the release's table or the table of a subset."""
    return bool(_table(source) or source.tables_with_columns(SUBSET_COLUMNS))


def read(source: Source) -> pd.DataFrame:
    """Return a manifest with one row per row of the table, including images whose file is missing.

    Raises:
        UsageError: A table cannot be read, or lacks a column.
    """
    path = _table(source)
    if path is None:
        return custom_table.read(source, dataset="rsna")
    table = read_table(path, NEEDED_COLUMNS).rename(columns={"BIRADS": "birads"})
    names = table.patient_id + "_" + table.image_id
    image_folder = os.path.join(path.parent, f"{path.stem}_images", "")
    default_paths = image_folder + table.patient_id + "/" + table.image_id + ".dcm"
    files = {_name(file): file for file in dicom_last(source.images)}
    boxes = table.image_id.map(_boxes(path.with_name(LESION_TABLE)))
    paths = get_or_default(names, files, default_paths)
    return as_manifest(table.assign(path=paths, dataset="rsna", lesions=boxes), str(path))


def _boxes(path: Path) -> dict[str, str]:
    """Return the value of the column `lesions` for each image in which the table of lesions has a cancer."""
    if not is_source_file(path):
        return {}
    table = read_table(path, ["image_id", "cancer", "x0", "y0", "x1", "y1"]).query("cancer == '1'")
    boxes = table[["x0", "y0", "x1", "y1"]].astype(float).groupby(table.image_id)
    return {str(image): lesions.boxes_to_text(rows.to_numpy()) for image, rows in boxes}


def _table(source: Source) -> Path | None:
    """Return the release's table; a table with the path of each image is a subset's instead."""
    path = source.find_table(*TABLE_NAMES)
    if path is None:
        return None
    header = source.header(path)
    return path if "patient_id" in header and not {"path", "image_path"} & header else None


def _name(file: str) -> str:
    """Return <patient>_<image> for .../<patient>/<image>.dcm and for .../<patient>_<image>.png."""
    name = image_stem(file)
    return name if "_" in name else f"{os.path.basename(os.path.dirname(file))}_{name}"
