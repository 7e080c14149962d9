"""Read CMMD, the Chinese Mammography Database (TCIA, 2021; doi:10.7937/tcia.eqde-4b16).

It has a label per breast and a folder of DICOM files per patient. The clinical table is published as a spreadsheet:
save it as CSV under one of the names in `TABLE_NAMES`. It lists the breasts with a lesion, confirmed by biopsy. An
image of any other breast has no label (NaN), because that breast was not assessed.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from vitmodel.data.manifest import as_manifest
from vitmodel.data.tables import read_table
from vitmodel.releases import dicom_folder
from vitmodel.releases.source import Source

EXPECTED_FILES = "cmmd_raw_label.csv or CMMD_clinicaldata_revision.csv next to folders D1-0001, D1-0002, ..."
TABLE_NAMES = ("cmmd_raw_label.csv", "CMMD_clinicaldata_revision.csv", "CMMD_clinicaldata_revision.xlsx")
NEEDED_COLUMNS = ("ID1", "LeftRight", "Age", "abnormality", "classification", "subtype")
CANCER = {"Malignant": 1.0, "Benign": 0.0}


def detect(source: Source) -> bool:
    """Return whether the source has the clinical table."""
    return source.find_table(*TABLE_NAMES) is not None


def read(source: Source) -> pd.DataFrame:
    """Return a manifest with one row per image, whose side and view come from its header.

    A labelled breast without any image gets one row without a view.

    Raises:
        UsageError: The table cannot be read, or lacks a column.
    """
    path = source.find_table(*TABLE_NAMES) or source.root
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
    frame = _images(source, set(table.ID1)).merge(breasts, on=["patient_id", "laterality"], how="outer")
    breast_folder = frame.patient_id + "/" + frame.laterality
    frame["image_id"] = frame.image_id.fillna(breast_folder.str.replace("/", "_"))
    frame["path"] = frame.path.fillna(str(source.folder) + "/" + breast_folder)
    return as_manifest(frame.assign(view=frame["view"].fillna(""), dataset="cmmd"), str(path))


def _images(source: Source, patients: set[str]) -> pd.DataFrame:
    """Return image_id, patient_id, laterality, view and path of all images.

    The patient is the first folder of an image's path that is one of `patients`, else the one in its header.
    """
    columns = ["image_id", "patient_id", "laterality", "view", "path"]
    if not source.images:
        return pd.DataFrame(columns=columns, dtype=object)
    frame = dicom_folder.read_files(source.images, source.folder)[columns]
    patient = frame.path.map(lambda file: next((part for part in Path(file).parts if part in patients), None))
    return frame.assign(patient_id=patient.fillna(frame.patient_id))
