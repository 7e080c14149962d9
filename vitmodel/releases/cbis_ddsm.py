"""CBIS-DDSM (TCIA, 2017; doi:10.1038/sdata.2017.177): digitised films, a table row per abnormality, joined here to a row per image.

Two facts of the release matter. The mass set and the calcification set are split apart, so 31 patients stand in both train and test:
they go to test as a whole, which keeps every official test image and frees training of them (official_split remembers). And 71 films
are in both sets as two images: both are positive if either is, for they show the same breast.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pandas as pd

from vitmodel.data.manifest import as_manifest, read_table
from vitmodel.errors import UsageError
from vitmodel.releases.files import find_table, get_or_default, list_images, normalize_side

logger = logging.getLogger(__name__)

EXPECTED_FILES = "mass_ and calc_case_description_{train,test}_set.csv, or all in cbis_ddsm_all_abnormalities.csv"
JOINED = "cbis_ddsm_all_abnormalities.csv"
CASE_TABLES = tuple(
    f"{kind}_case_description_{part}_set.csv" for kind in ("mass", "calc") for part in ("train", "test")
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


def detect(root: Path) -> bool:
    return find_table(root, JOINED, *CASE_TABLES) is not None


def read(root: Path) -> pd.DataFrame:
    """One row per full mammogram; birads is the highest of its abnormalities. Raises UsageError."""
    table = _abnormalities(root)
    table["image_id"] = (
        table.image_file_path.str.strip().str.split("/").str[0]
    )  # Calc-Training_P_00005_RIGHT_CC: one full image each
    table["side"], table["cancer"] = normalize_side(table.left_or_right_breast), table.pathology.map(PATHOLOGY)
    film = [table.patient_id, table.side, table.image_view]
    table["cancer"] = table.cancer.groupby(film).transform("max")
    images = table.groupby("image_id", sort=False)
    frame = images.first().reset_index()
    official = frame.split
    frame = pd.DataFrame(
        {
            "image_id": frame.image_id,
            "patient_id": frame.patient_id,
            "laterality": frame.side,
            "view": frame.image_view,
            "path": _paths(root, frame),
            "dataset": "cbis_ddsm",
            "split": official.where(~frame.patient_id.isin(_divided(frame)), "test"),
            "official_split": official,
            "cancer": frame.cancer,
            "birads": frame.image_id.map(pd.to_numeric(table.assessment).groupby(table.image_id).max()),
            "density": frame.breast_density.map(DENSITY),
            "abnormality_type": frame.abnormality_type,
            "abnormalities": frame.image_id.map(images.size()),
        }
    )
    return as_manifest(frame, str(root))


def _abnormalities(root: Path) -> pd.DataFrame:
    joined = find_table(root, JOINED)
    if joined:
        return read_table(joined, [*NEEDED_COLUMNS, "split"])
    parts = []
    for name in CASE_TABLES if root.is_dir() else (root.name,):
        path = find_table(root, name)
        if path is None:
            raise UsageError(f"{root}: {name} is missing; CBIS-DDSM comes with {', '.join(CASE_TABLES)}")
        table = read_table(path).rename(
            columns=lambda column: column.replace(" ", "_")
        )  # 'breast density' in two files of the four
        missing = [column for column in NEEDED_COLUMNS if column not in table]
        if missing:
            raise UsageError(f"{path}: column {missing[0]} is missing; the file has {', '.join(table.columns)}")
        parts.append(table.assign(split="train" if "train" in name else "test"))
    return pd.concat(parts, ignore_index=True)


def _divided(frame: pd.DataFrame) -> pd.Index:
    """The patients that the official splits divide."""
    parts = frame.groupby("patient_id").split.nunique()
    divided = parts.index[parts > 1]
    if len(divided):
        logger.warning(
            "CBIS-DDSM: %d patients stand in both official splits; all their images are put into test", len(divided)
        )
    return divided


def _paths(root: Path, frame: pd.DataFrame) -> list[str]:
    """The file below a folder named like the image (TCIA) or like its series (JPEG exports); else the path that the table gives."""
    folder = os.path.abspath(root if root.is_dir() else root.parent)
    files = {part: file for file in list_images(Path(folder)) for part in file[len(folder) :].split(os.sep)[:-1]}
    path = frame.image_file_path.str.strip()
    return get_or_default(frame.image_id, files, get_or_default(path.str.split("/").str[2], files, folder + "/" + path))
