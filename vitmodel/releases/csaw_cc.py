"""Read CSAW-CC (SciLifeLab, 2021; doi:10.5878/45vm-t798): screening mammograms of Karolinska University Hospital.

Strand F: CSAW-CC (mammography), a dataset for AI research to improve screening, diagnostics and prognostics of breast
cancer. Karolinska Institutet, 2022. Access on request, for research.

The release has CSAW-CC_breast_cancer_screening_data.csv with one row per image, the images
<patient>_20990909_<side>_<view>_<number>.dcm in folders of any depth, and masks of cancers, <image>_mask.png. A patient
has several examinations (`exam_id` is the year). `rad_timing` states when the cancer was found after the examination:

- 1, within 60 days (detected at screening): `cancer` is 1 in the breast with the cancer.
- 2, within 60 to 729 days (interval cancer): `cancer` is NaN, because it may not have been there yet. The extra column
  `cancer_within_2_years` is 1 for timing 1 and 2, to train with interval cancers as positives.
- 3, after 730 days or more (prior image): NaN in both columns.

The other breast and women without cancer are 0. `age_group` is 40-55 or over 55; the age itself is not published.
"""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from vitmodel.data.manifest import as_manifest
from vitmodel.data.tables import read_table
from vitmodel.releases.files import get_or_default, image_stem, normalize_side
from vitmodel.releases.listing import dicom_last
from vitmodel.releases.masks import FilmMask, read_boxes
from vitmodel.releases.missing_tables import MissingTable, read_names
from vitmodel.releases.source import Source

EXPECTED_FILES = "CSAW-CC_breast_cancer_screening_data.csv next to 00045_20990909_L_CC_1.dcm, ... in any folder"
TABLE_NAMES = ("CSAW-CC_breast_cancer_screening_data.csv", "CSAW-CC_breast_cancer_screening_data.xlsx")
NEEDED_COLUMNS = (
    "anon_patientid",
    "exam_year",
    "anon_filename",
    "imagelaterality",
    "viewposition",
    "x_case",
    "x_cancer_laterality",
    "rad_timing",
)
IMAGE_NAME = re.compile(r"(?P<patient>\d+)_20990909_(?P<side>[LR])_(?P<view>[A-Z]+)_\d+")
MISSING_TABLE = MissingTable(
    f"the table {TABLE_NAMES[0]} of CSAW-CC", "doi.org/10.5878/45vm-t798", IMAGE_NAME, ("_20990909_",), reads_names=True
)
AGE_GROUP = {"1": "40-55", "2": "over 55"}
MASK_SUFFIX = "_mask"


def detect(source: Source) -> bool:
    """Return whether the source has the release's table."""
    return source.find_table(*TABLE_NAMES) is not None


def read(source: Source) -> pd.DataFrame:
    """Return a manifest with one row per image; without the table, one without labels and with a warning.

    Raises:
        UsageError: The table cannot be read, or lacks a column.
    """
    path = source.find_table(*TABLE_NAMES)
    if path is None:
        MISSING_TABLE.warn(source)
        return read_names({image_stem(file): file for file in dicom_last(source.images)}, IMAGE_NAME, source, "csaw_cc")
    table = read_table(path, NEEDED_COLUMNS)
    names = table.anon_filename.str.strip().map(image_stem)
    files = {image_stem(file): file for file in dicom_last(source.images)}
    paths = pd.Series(get_or_default(names, files, str(source.folder) + "/" + table.anon_filename.str.strip()))
    side = normalize_side(table.imagelaterality)
    found_at_screening = _label(table, side, (1,))
    is_cancer = dict(zip(names, found_at_screening == 1, strict=True))
    lesions, finding_boxes = read_boxes(_masks(source, files, is_cancer), "CSAW-CC")
    optional = table.reindex(columns=["x_age", "dicom_manufacturer", "x_type"])
    frame = pd.DataFrame(
        {
            "image_id": names,
            "patient_id": table.anon_patientid,
            "exam_id": table.anon_patientid + "_" + table.exam_year.str.removesuffix(".0"),
            "laterality": side,
            "view": table.viewposition.str.strip().str.upper(),
            "path": paths,
            "dataset": "csaw_cc",
            "cancer": found_at_screening,
            "lesions": paths.map(lesions),
            "finding_boxes": paths.map(finding_boxes),
            "machine_id": optional.dicom_manufacturer,
            "cancer_within_2_years": _label(table, side, (1, 2)),
            "rad_timing": table.rad_timing.str.removesuffix(".0"),
            "cancer_type": optional.x_type.str.removesuffix(".0"),
            "age_group": optional.x_age.str.removesuffix(".0").map(AGE_GROUP),
        }
    )
    return as_manifest(frame, str(path))


def _label(table: pd.DataFrame, side: pd.Series, timings: tuple[int, ...]) -> pd.Series:
    """Return 1 for a breast whose cancer was found at one of `timings`, 0 for one without cancer, NaN for others.

    A cancer without a known side makes both breasts unknown; one that is on both sides counts for both.
    """
    case = pd.to_numeric(table.x_case, errors="coerce")
    cancer_side = normalize_side(table.x_cancer_laterality)
    label = pd.Series(np.nan, index=table.index)
    label[case == 0] = 0.0
    label[(case == 1) & cancer_side.isin(["L", "R"]) & (cancer_side != side)] = 0.0
    is_sick = (case == 1) & ((cancer_side == side) | (cancer_side == "B"))
    label[is_sick & pd.to_numeric(table.rad_timing, errors="coerce").isin(timings)] = 1.0
    return label


def _masks(source: Source, images: dict[str, str], malignant: dict[str, bool]) -> list[FilmMask]:
    """Return the masks of the images that exist; `malignant` says of each image whether it shows a proven cancer."""
    names = {file: image_stem(file) for file in source.files}
    films = {file: name.removesuffix(MASK_SUFFIX) for file, name in names.items() if name.endswith(MASK_SUFFIX)}
    return [
        FilmMask(images[name], (file,), malignant[name])
        for file, name in films.items()
        if name in images and name in malignant
    ]
