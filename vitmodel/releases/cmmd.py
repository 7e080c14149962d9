"""Read CMMD, the Chinese Mammography Database (TCIA, 2021; doi:10.7937/tcia.eqde-4b16).

Licence: CC BY 4.0.

Layout: manifest-<n>/CMMD/D1-0001/<study>/<series>/1-1.dcm, as the NBIA Data Retriever writes them, and
CMMD_clinicaldata_revision.xlsx (or the table saved as CSV) in one of these folders or next to them.

The table lists the breasts with a lesion, confirmed by biopsy. An image of any other breast has no label (NaN), because
that breast was not assessed. Sides and views come from the headers.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from vitmodel.data.manifest import as_manifest
from vitmodel.data.tables import read_table
from vitmodel.releases import dicom_folder
from vitmodel.releases.files import normalize_side
from vitmodel.releases.missing_tables import MissingTable
from vitmodel.releases.source import Source

EXPECTED_FILES = "CMMD_clinicaldata_revision.xlsx (or .csv) next to the folders D1-0001, D1-0002, ..."
TABLE_NAMES = ("CMMD_clinicaldata_revision.xlsx", "CMMD_clinicaldata_revision.csv", "cmmd_raw_label.csv")
MISSING_TABLE = MissingTable(
    "CMMD_clinicaldata_revision.xlsx of CMMD",
    "https://www.cancerimagingarchive.net/collection/cmmd/",
    re.compile(r"/D[12]-\d{4}/.*\.dcm$"),
)
NEEDED_COLUMNS = ("ID1", "LeftRight", "Age", "abnormality", "classification", "subtype")
HEADER_COLUMNS = ["image_id", "patient_id", "laterality", "view", "path", "machine_id", "implant", "age"]
CANCER = {"malignant": 1.0, "benign": 0.0}


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
            "patient_id": table.ID1.str.strip(),
            "laterality": normalize_side(table.LeftRight),
            "cancer": table.classification.str.strip().str.lower().map(CANCER),
            "biopsy": 1.0,
            "age": table.Age,
            "abnormality": table.abnormality,
            "subtype": table.subtype,
        }
    )
    return join_images(source, breasts, path)


def join_images(source: Source, breasts: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Return the manifest of the source's images with the values of their breasts.

    Args:
        source: The folders of the patients.
        breasts: A table with patient_id, laterality, age and labels; a breast without an image gets a row, too.
        path: The file of the table, for messages.
    """
    breasts = breasts.sort_values("cancer", ascending=False, kind="stable")  # of two rows of a breast, the worst counts
    breasts = breasts.drop_duplicates(["patient_id", "laterality"])
    age = breasts.groupby("patient_id").age.first()
    images = _images(source, set(breasts.patient_id))
    header_age = images.pop("age")
    frame = images.assign(header_age=header_age).merge(
        breasts.drop(columns="age"), on=["patient_id", "laterality"], how="outer"
    )
    breast_folder = frame.patient_id + "/" + frame.laterality
    frame["age"] = frame.patient_id.map(age).fillna(frame.pop("header_age"))
    frame["image_id"] = frame.image_id.fillna(breast_folder.str.replace("/", "_"))
    frame["path"] = frame.path.fillna(str(source.folder) + "/" + breast_folder)
    return as_manifest(frame.assign(view=frame["view"].fillna(""), dataset="cmmd"), str(path))


def _images(source: Source, patients: set[str]) -> pd.DataFrame:
    """Return the `HEADER_COLUMNS` of all images.

    The patient is the first folder of an image's path that is one of `patients`, else the one in its header.
    """
    if not source.images:
        return pd.DataFrame(columns=HEADER_COLUMNS, dtype=object)
    frame = dicom_folder.read_files(source.images, source.folder)[HEADER_COLUMNS]
    patient = frame.path.map(lambda file: next((part for part in Path(file).parts if part in patients), None))
    return frame.assign(patient_id=patient.fillna(frame.patient_id))
