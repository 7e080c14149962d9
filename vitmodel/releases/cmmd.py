"""CMMD, the Chinese Mammography Database (TCIA, 2021; doi:10.7937/tcia.eqde-4b16): a label per breast, a folder of DICOMs per patient.

The clinical table is published as a spreadsheet: save it as CSV under one of TABLES. It names the breasts with a lesion, proven by
biopsy; an image of another breast has no label (NaN), for nobody looked there.
"""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

from vitmodel.data.manifest import as_manifest, read_table
from vitmodel.releases import dicom_folder
from vitmodel.releases.files import find_table, list_images

EXPECTED_FILES = "cmmd_raw_label.csv or CMMD_clinicaldata_revision.csv beside folders D1-0001, D1-0002, ..."
TABLE_NAMES = ("cmmd_raw_label.csv", "CMMD_clinicaldata_revision.csv")
NEEDED_COLUMNS = ("ID1", "LeftRight", "Age", "abnormality", "classification", "subtype")
CANCER = {"Malignant": 1.0, "Benign": 0.0}


def detect(root: Path) -> bool:
    return find_table(root, *TABLE_NAMES) is not None


def read(root: Path) -> pd.DataFrame:
    """One row per image, side and view from its header; and one, without a view, per labelled breast of which no image is there."""
    path = find_table(root, *TABLE_NAMES) or root
    table = read_table(path, NEEDED_COLUMNS)
    breasts = pd.DataFrame(
        {
            "patient_id": table.ID1,
            "laterality": table.LeftRight,
            "cancer": table.classification.map(CANCER),
            "biopsy": 1.0,
            "age": table.Age,
            "abnormality": table.abnormality,
            "subtype": table.subtype,
        }
    )
    frame = _images(path.parent, set(table.ID1)).merge(breasts, on=["patient_id", "laterality"], how="outer")
    expected = frame.patient_id + "/" + frame.laterality
    frame["image_id"] = frame.image_id.fillna(expected.str.replace("/", "_"))
    frame["path"] = frame.path.fillna(os.path.abspath(path.parent) + "/" + expected)
    return as_manifest(frame.assign(view=frame["view"].fillna(""), dataset="cmmd"), str(path))


def _images(folder: Path, patients: set[str]) -> pd.DataFrame:
    """image_id, patient_id, laterality, view and path of the images in the folders of `patients`."""
    columns = ["image_id", "patient_id", "laterality", "view", "path"]
    if not list_images(folder):
        return pd.DataFrame(columns=columns, dtype=object)
    frame = dicom_folder.read(folder)[columns]
    owner = frame.path.map(lambda file: next((part for part in Path(file).parts if part in patients), None))
    return frame.assign(patient_id=owner.fillna(frame.patient_id))
