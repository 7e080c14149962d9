"""Read CBIS-DDSM (TCIA, 2017; doi:10.7937/K9/TCIA.2016.7O02S9CY): digitised films, one table row per abnormality.

Lee RS, Gimenez F, Hoogi A, Miyake KK, Gorovoy M, Rubin DL: A curated mammography data set for use in computer-aided
detection and diagnosis research. Sci Data 4, 170177 (2017), doi:10.1038/sdata.2017.177. CC BY 3.0.

The four case tables are downloaded apart from the images. Two layouts of the images are read:

- TCIA: <film>/<study>/<series>/1-1.dcm, and <film>_<abnormality>/... with the mask and the crop of an abnormality.
- Kaggle (awsaf49/cbis-ddsm-breast-cancer-image-dataset): jpeg/<series>/*.jpg; the tables are in csv/. The series is the
  third part of the paths in the tables.

The boxes of malignant abnormalities (`lesions`) and of the others (`finding_boxes`) are those of their masks.

The rows are joined to one row per image. Two facts of the release matter:

- The mass set and the calcification set were split separately, so 31 patients are in both train and test. All their
  images are assigned to test, which keeps every official test image and removes these patients from training. The
  column `official_split` keeps the original split.
- 71 films are in both sets, as two images. Both images are positive if either is, because they show the same breast.
"""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Mapping

import pandas as pd

from vitmodel.data.manifest import as_manifest
from vitmodel.data.tables import read_table
from vitmodel.errors import UsageError
from vitmodel.releases.files import get_or_default, normalize_side
from vitmodel.releases.listing import dicom_last, looks_like_image
from vitmodel.releases.masks import FilmMask, read_boxes
from vitmodel.releases.missing_tables import MissingTable
from vitmodel.releases.source import Source
from vitmodel.releases.vocabulary import read_density

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
FILM_FOLDER = re.compile(
    r"(?:Mass|Calc)-(?P<split>Training|Test)_(?P<patient>P_\d+)_(?P<side>LEFT|RIGHT)_(?P<view>CC|MLO)"
    r"(?P<abnormality>_\d+)?"
)
"""Name of the folder of a film, or of an abnormality of it, in the layout of TCIA."""
DDSM_ROOT = "/1.3.6.1.4.1.9590.100.1.2."
"""Start of the names of folders that are series of the release."""
MISSING_TABLE = MissingTable(
    f"the tables {', '.join(CASE_TABLES)} of CBIS-DDSM",
    "doi.org/10.7937/K9/TCIA.2016.7O02S9CY",
    re.compile(f"{FILM_FOLDER.pattern}/|{re.escape(DDSM_ROOT)}"),
    ("Mass-", "Calc-", DDSM_ROOT),
    reads_names=True,
)


def detect(source: Source) -> bool:
    """Return whether the source has one of the release's tables."""
    return source.find_table(JOINED, *CASE_TABLES) is not None


def read(source: Source) -> pd.DataFrame:
    """Return a manifest with one row per full mammogram; `birads` is the highest assessment of its abnormalities.

    Without any table, the folders of TCIA give patient, side, view and split, and a warning names the missing tables.

    Raises:
        UsageError: A table is missing, or lacks a column.
    """
    if not detect(source):
        return _read_folders(source)
    abnormalities = _abnormalities(source)
    # The first folder names the full image: Calc-Training_P_00005_RIGHT_CC
    abnormalities["image_id"] = abnormalities.image_file_path.str.strip().str.split("/").str[0]
    abnormalities["side"] = normalize_side(abnormalities.left_or_right_breast)
    film = [abnormalities.patient_id, abnormalities.side, abnormalities.image_view]
    abnormalities["cancer"] = abnormalities.pathology.map(PATHOLOGY).groupby(film).transform("max")
    abnormalities_by_image = abnormalities.groupby("image_id", sort=False)
    images = abnormalities_by_image.first().reset_index()
    assessments = pd.to_numeric(abnormalities.assessment)
    paths = pd.Series(_paths(source, images))
    films = dict(zip(images.image_id, paths, strict=True))
    lesions, finding_boxes = read_boxes(_masks(source, abnormalities, films), "CBIS-DDSM")
    frame = pd.DataFrame(
        {
            "image_id": images.image_id,
            "patient_id": images.patient_id,
            "laterality": images.side,
            "view": images.image_view,
            "path": paths,
            "dataset": "cbis_ddsm",
            "split": images.split.where(~images.patient_id.isin(_patients_in_both_splits(images)), "test"),
            "official_split": images.split,
            "cancer": images.cancer,
            "birads": images.image_id.map(assessments.groupby(abnormalities.image_id).max()),
            "density": images.breast_density.map(read_density, na_action="ignore"),
            "lesions": paths.map(lesions),
            "finding_boxes": paths.map(finding_boxes),
            "findings": images.image_id.map(abnormalities_by_image.abnormality_type.agg(_joined)),
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
            f"{source.root}: {name} is missing; get the four tables of CBIS-DDSM ({', '.join(CASE_TABLES)}) "
            f"from {MISSING_TABLE.origin} and put all of them there"
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


def _masks(source: Source, abnormalities: pd.DataFrame, films: Mapping[str, str]) -> list[FilmMask]:
    """Return the mask of each abnormality whose film exists.

    The mask and the crop share a folder named like the abnormality (TCIA), or are in the series that the table names
    (Kaggle), where a few tables have exchanged the two; `FilmMask.candidates` therefore has both.
    """
    files = _candidates_by_folder(source)
    columns = [name for name in ("ROI_mask_file_path", "cropped_image_file_path") if name in abnormalities]
    existing = set(source.images)
    masks = []
    for row in abnormalities.to_dict("records"):
        listed = [str(row[name]).strip().split("/") for name in columns]
        folders = {f"{row['image_id']}_{row.get('abnormality_id')}", *(parts[2] for parts in listed if len(parts) > 2)}
        candidates = sorted({file for folder in folders for file in files.get(folder, ())})
        film = films[row["image_id"]]
        if candidates and film in existing:
            masks.append(FilmMask(film, tuple(candidates), row["pathology"] == "MALIGNANT"))
    return masks


def _candidates_by_folder(source: Source) -> dict[str, list[str]]:
    """Return all pictures in or below each folder that is named like an abnormality or a series."""
    files: dict[str, list[str]] = defaultdict(list)
    for file in source.files:
        if MISSING_TABLE.images.search(file) and looks_like_image(file):
            for name in file[len(str(source.folder)) :].split(os.sep)[:-1]:
                files[name].append(file)
    return files


def _joined(names: pd.Series) -> str:
    return ";".join(dict.fromkeys(names.dropna()))


def _read_folders(source: Source) -> pd.DataFrame:
    """Return a manifest of TCIA's films by the names of their folders, with a warning that the labels are missing.

    Raises:
        UsageError: The folders are those of series, so that only the tables tell films from masks and crops.
    """
    folders = {match[0]: match for match in map(FILM_FOLDER.search, source.images) if match}
    films = {name: match.groupdict() for name, match in folders.items() if not match["abnormality"]}
    if not films:
        raise UsageError(
            f"{source.root}: {MISSING_TABLE.table} are missing, and only they tell films from masks and crops; get "
            f"them from {MISSING_TABLE.origin} and put them in this folder"
        )
    MISSING_TABLE.warn(source)
    names = pd.Series(list(films), dtype=object)
    parts = pd.DataFrame(list(films.values()))
    frame = pd.DataFrame(
        {
            "image_id": names,
            "patient_id": parts.patient,
            "laterality": normalize_side(parts.side),
            "view": parts["view"],
            "path": names.map(_files_by_folder(source)),
            "dataset": "cbis_ddsm",
            "split": parts.split.map({"Training": "train", "Test": "test"}),
        }
    )
    return as_manifest(frame, str(source.root))
