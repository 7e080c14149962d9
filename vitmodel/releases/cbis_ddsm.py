"""Read CBIS-DDSM (TCIA, 2017; doi:10.1038/sdata.2017.177): digitised films, with one table row per abnormality.

The rows are joined to one row per image. Two facts of the release matter:

- The mass set and the calcification set were split separately, so 31 patients are in both train and test. All their
  images are assigned to test, which keeps every official test image and removes these patients from training. The
  column `official_split` keeps the original split.
- 71 films are in both sets, as two images. Both images are positive if either is, because they show the same breast.
"""

from __future__ import annotations

import logging
import os

import pandas as pd

from vitmodel.data.manifest import as_manifest
from vitmodel.data.tables import read_table
from vitmodel.errors import UsageError
from vitmodel.releases.files import get_or_default, normalize_side
from vitmodel.releases.source import Source, dicom_last

logger = logging.getLogger(__name__)

EXPECTED_FILES = "mass_ and calc_case_description_{train,test}_set.csv, or all in cbis_ddsm_all_abnormalities.csv"
JOINED = "cbis_ddsm_all_abnormalities.csv"
CASE_TABLES = (
    "mass_case_description_train_set.csv",
    "mass_case_description_test_set.csv",
    "calc_case_description_train_set.csv",
    "calc_case_description_test_set.csv",
)
NEEDED_COLUMNS = (
    "patient_id",
    "breast_density",
    "left_or_right_breast",
    "image_view",
    "abnormality_type",
    "assessment",
    "pathology",
    "image_file_path",
)
PATHOLOGY = {"MALIGNANT": 1.0, "BENIGN": 0.0, "BENIGN_WITHOUT_CALLBACK": 0.0}
DENSITY = {"1": "A", "2": "B", "3": "C", "4": "D"}


def detect(source: Source) -> bool:
    """Return whether the source has one of the release's tables."""
    return source.find_table(JOINED, *CASE_TABLES) is not None


def read(source: Source) -> pd.DataFrame:
    """Return a manifest with one row per full mammogram; `birads` is the highest assessment of its abnormalities.

    Raises:
        UsageError: A table is missing, or lacks a column.
    """
    abnormalities = _abnormalities(source)
    # The first folder names the full image: Calc-Training_P_00005_RIGHT_CC
    abnormalities["image_id"] = abnormalities.image_file_path.str.strip().str.split("/").str[0]
    abnormalities["side"] = normalize_side(abnormalities.left_or_right_breast)
    film = [abnormalities.patient_id, abnormalities.side, abnormalities.image_view]
    abnormalities["cancer"] = abnormalities.pathology.map(PATHOLOGY).groupby(film).transform("max")
    abnormalities_by_image = abnormalities.groupby("image_id", sort=False)
    images = abnormalities_by_image.first().reset_index()
    assessments = pd.to_numeric(abnormalities.assessment)
    frame = pd.DataFrame(
        {
            "image_id": images.image_id,
            "patient_id": images.patient_id,
            "laterality": images.side,
            "view": images.image_view,
            "path": _paths(source, images),
            "dataset": "cbis_ddsm",
            "split": images.split.where(~images.patient_id.isin(_patients_in_both_splits(images)), "test"),
            "official_split": images.split,
            "cancer": images.cancer,
            "birads": images.image_id.map(assessments.groupby(abnormalities.image_id).max()),
            "density": images.breast_density.map(DENSITY),
            "abnormality_type": images.abnormality_type,
            "abnormalities": images.image_id.map(abnormalities_by_image.size()),
        }
    )
    return as_manifest(frame, str(source.root))


def _abnormalities(source: Source) -> pd.DataFrame:
    """Return all abnormalities with their official split, from the joined table or from the release's four tables.

    If the source is one of the four tables, only that one is read.
    """
    joined = source.find_table(JOINED)
    if joined:
        return read_table(joined, [*NEEDED_COLUMNS, "split"])
    names = CASE_TABLES if source.is_folder else (source.root.name,)
    return pd.concat([_case_table(source, name) for name in names], ignore_index=True)


def _case_table(source: Source, name: str) -> pd.DataFrame:
    path = source.find_table(name)
    if path is None:
        raise UsageError(
            f"{source.root}: {name} is missing; CBIS-DDSM comes with {', '.join(CASE_TABLES)}, put all four there"
        )
    # Two of the four files spell a column 'breast density'.
    table = read_table(path).rename(columns=lambda column: column.replace(" ", "_"))
    missing = [column for column in NEEDED_COLUMNS if column not in table]
    if missing:
        raise UsageError(f"{path}: column {missing[0]} is missing; the file has {', '.join(table.columns)}")
    return table.assign(split="train" if "train" in name else "test")


def _patients_in_both_splits(images: pd.DataFrame) -> pd.Index:
    """Return the patients who are in both official splits, and log their number."""
    splits_per_patient = images.groupby("patient_id").split.nunique()
    patients = splits_per_patient.index[splits_per_patient > 1]
    if len(patients):
        logger.warning(
            "CBIS-DDSM: %d patients are in both official splits; all their images are assigned to test", len(patients)
        )
    return patients


def _paths(source: Source, images: pd.DataFrame) -> list[str]:
    """Return the path of each image.

    The file is found in a folder named like the image (as TCIA has it) or like its series (as JPEG exports have it).
    Otherwise the path is the one in the table.
    """
    folder = str(source.folder)
    files = _files_by_folder(source)
    listed = images.image_file_path.str.strip()
    by_series = get_or_default(listed.str.split("/").str[2], files, folder + "/" + listed)
    return get_or_default(images.image_id, files, by_series)


def _files_by_folder(source: Source) -> dict[str, str]:
    """Return the last image file in or below each folder name, for all folders of the source."""
    files: dict[str, str] = {}
    for file in dicom_last(source.images):
        for name in file[len(str(source.folder)) :].split(os.sep)[:-1]:
            files[name] = file
    return files
