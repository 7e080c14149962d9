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
from vitmodel.releases.files import find_table, header, image_files, lookup, patient_of, stem, tables_with

LOOKS_FOR = "train.csv or test.csv beside train_images/<patient>/<image>.dcm or <patient>_<image>.png"
TABLES = ("train.csv", "test.csv")
LESIONS = "lesions.csv"
SUBSET = ("image_path", "patient_id", "image_id", "machine_id")


def detect(source: Path) -> bool:
    return bool(_table(source) or tables_with(source, SUBSET))


def read(source: Path) -> pd.DataFrame:
    """One row per row of the table, whether its image is there or not. Raises UsageError."""
    path = _table(source)
    if path is None:
        return custom_table.read(source, dataset="rsna")
    table = read_table(path, ["patient_id", "image_id", "laterality", "view"]).rename(columns={"BIRADS": "birads"})
    names = table.patient_id + "_" + table.image_id
    folder = source if source.is_dir() else source.parent
    released = os.path.join(os.path.abspath(folder), f"{path.stem}_images", "") + table.patient_id + "/" + table.image_id + ".dcm"
    files = {_name(file): file for file in sorted(image_files(folder), key=lambda file: file.endswith(".dcm"))}  # DICOM before a copy
    boxes = table.image_id.map(_boxes(path.with_name(LESIONS)))
    return as_manifest(table.assign(path=lookup(names, files, released), dataset="rsna", lesions=boxes), str(path))


def _boxes(path: Path) -> dict[str, str]:
    """The column `lesions` of each image with a cancer that the table shows."""
    if not path.is_file():
        return {}
    table = read_table(path, ["image_id", "cancer", "x0", "y0", "x1", "y1"]).query("cancer == '1'")
    boxes = table[["x0", "y0", "x1", "y1"]].astype(float).groupby(table.image_id)
    return {str(image): lesions.to_text(rows.to_numpy()) for image, rows in boxes}


def _table(source: Path) -> Path | None:
    """The release's table in `source`; or beside it, where `source` is a folder of exported pictures."""
    path = find_table(source, *TABLES)
    if path is None and source.is_dir() and any(patient_of(entry.name) for entry in os.scandir(source)):
        path = find_table(source.parent, *TABLES)
    return None if path is None or {"path", "image_path"} & header(path) else path


def _name(file: str) -> str:
    """<patient>_<image> of .../<patient>/<image>.dcm and of .../<patient>_<image>.png."""
    name = stem(file)
    return name if "_" in name else f"{os.path.basename(os.path.dirname(file))}_{name}"
