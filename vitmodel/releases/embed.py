"""Read EMBED, the Emory Breast Imaging Dataset (Open Data, 2023; doi:10.1148/ryai.220047).

Licence: EMBED's data use agreement (registration on https://registry.opendata.aws/emory-breast-imaging-dataset-embed).

Layout: tables/EMBED_OpenData_clinical.csv (a row per finding) and EMBED_OpenData_metadata.csv (a row per file), or
their copies `_reduced`, and images/cohort_<n>/<patient>/<study>/<image>.dcm.

The rows of the two tables belong together by patient, exam and side; a finding of side B, or of no side, belongs to
both breasts. `cancer` comes from pathology alone: a breast that was not biopsied has no label, whatever its BI-RADS. A
cancer of one exam says nothing about the woman's other exams, so that the label is per exam (`exam_id`).
"""

from __future__ import annotations

import os
import re

import pandas as pd

from vitmodel.data import lesions
from vitmodel.data.manifest import as_manifest
from vitmodel.data.tables import read_table
from vitmodel.errors import UsageError
from vitmodel.releases.files import get_or_default, image_stem, normalize_side
from vitmodel.releases.listing import dicom_last, is_dicom_name
from vitmodel.releases.missing_tables import MissingTable
from vitmodel.releases.source import Source
from vitmodel.releases.vocabulary import read_density

EXPECTED_FILES = "EMBED_OpenData_clinical.csv and EMBED_OpenData_metadata.csv (or _reduced) next to images/cohort_1/"
MISSING_TABLE = MissingTable(
    "EMBED_OpenData_clinical.csv and EMBED_OpenData_metadata.csv of EMBED",
    "s3://embed-dataset-open/tables/",
    re.compile(r"/cohort_\d+/\d+/[\d.]+/[\d.]+\.dcm$"),
)
CLINICAL = ("EMBED_OpenData_clinical_reduced.csv", "EMBED_OpenData_clinical.csv")
METADATA = ("EMBED_OpenData_metadata_reduced.csv", "EMBED_OpenData_metadata.csv")
KEYS = ("empi_anon", "acc_anon")
CLINICAL_COLUMNS = (*KEYS, "side", "asses", "tissueden", "path_severity", "bside", "age_at_study")
METADATA_COLUMNS = (*KEYS, "FinalImageType", "ImageLateralityFinal", "ViewPosition", "anon_dicom_path")
OPTIONAL_COLUMNS = ("spot_mag", "ROI_coords", "ManufacturerModelName")
PATH_PREFIX = "/mnt/NAS2/mammo/anon_dicom/"
"""Folder of the images on the computer where the table was made."""
CANCER = {0: 1.0, 1: 1.0, 2: 0.0, 3: 0.0, 4: 0.0, 5: 0.0}
"""`cancer` by path_severity: 0 = invasive, 1 = in situ, 2 to 5 = benign; 6 = another disease, so unknown."""
BIRADS = {"N": 1, "B": 2, "P": 3, "A": 0, "S": 4, "M": 5, "K": 6}
"""BI-RADS by the letter in `asses`, in order of rising concern; the highest of a breast's findings counts."""
"""Density by `tissueden`; 5 = male, which has none."""


def detect(source: Source) -> bool:
    """Return whether the source has one of the release's tables."""
    return source.find_table(*CLINICAL, *METADATA) is not None


def read(source: Source) -> pd.DataFrame:
    """Return a manifest with one row per file of the metadata table.

    The extra columns `FinalImageType` (2D, or cview for an image synthesised from tomosynthesis) and `spot_mag` (1 =
    spot or magnification view) tell the standard views from the others.

    Raises:
        UsageError: A table is missing, or lacks a column.
    """
    images = _read(source, METADATA, METADATA_COLUMNS).drop_duplicates("anon_dicom_path", ignore_index=True)
    clinical = _read(source, CLINICAL, CLINICAL_COLUMNS)
    images = images.assign(side=normalize_side(images.ImageLateralityFinal))
    images = images.merge(_breasts(clinical), on=[*KEYS, "side"], how="left")
    images = images.merge(_exams(clinical), on=list(KEYS), how="left")
    names = images.anon_dicom_path.map(image_stem)
    files = {image_stem(file): file for file in dicom_last(source.images)}
    image_folder = os.path.join(source.folder, "images", "")
    default_paths = image_folder + images.anon_dicom_path.str.removeprefix(PATH_PREFIX)
    paths = pd.Series(get_or_default(names, files, default_paths), index=images.index)
    boxes = images.get("ROI_coords", pd.Series(index=images.index, dtype=object)).map(_boxes, na_action="ignore")
    boxes = boxes.where(paths.map(is_dicom_name) & (boxes != ""))  # a picture may have another size
    frame = pd.DataFrame(
        {
            "image_id": names,
            "patient_id": images.empi_anon,
            "exam_id": images.acc_anon,
            "laterality": images.side.where(images.side.isin(["L", "R"]), ""),
            "view": images.ViewPosition.fillna(""),
            "path": paths,
            "dataset": "embed",
            "cancer": images.cancer,
            "birads": images.birads,
            "density": images.density,
            "age": images.age,
            "machine_id": images.get("ManufacturerModelName"),
            "lesions": boxes.where(images.cancer == 1),
            "finding_boxes": boxes.where(images.cancer != 1),
            "FinalImageType": images.FinalImageType,
            "spot_mag": images.get("spot_mag"),
        }
    )
    return as_manifest(frame, str(source.root))


def _read(source: Source, names: tuple[str, ...], needed: tuple[str, ...]) -> pd.DataFrame:
    """Return the columns of one of the tables that are used; the reduced copy is read if it has those needed."""
    found = [path for name in names if (path := source.find_table(name)) is not None]
    if not found:
        raise UsageError(
            f"{source.root}: {names[-1]} is missing; download it from the folder tables/ of EMBED "
            "(s3://embed-dataset-open) and put it next to the other table"
        )
    complete = [path for path in found if set(needed) <= source.header(path)]
    table = read_table((complete or found)[0], needed, columns=(*needed, *OPTIONAL_COLUMNS))
    return table.assign(**{name: table[name].map(_identifier, na_action="ignore") for name in KEYS})


def _identifier(text: str) -> str:
    """Return an id that the table may write as a decimal number, such as 12.0 or 1.2e15, without the decimals."""
    is_decimal = re.fullmatch(r"\d+\.0*|\d+(\.\d+)?[eE]\+?\d+", text.strip())
    return f"{float(text):.0f}" if is_decimal else text.strip()


def _breasts(clinical: pd.DataFrame) -> pd.DataFrame:
    """Return `cancer` and `birads` of each breast with an entry in the table of findings.

    The side of the pathology is `bside`, or the finding's side where `bside` is empty; a result whose side is unknown
    or B labels both breasts.
    """
    severity = pd.to_numeric(clinical.path_severity, errors="coerce")
    biopsies = clinical.assign(cancer=severity.map(CANCER), side=clinical.bside.fillna(clinical.side))
    ranks = {birads: rank for rank, birads in enumerate(BIRADS.values())}
    birads = clinical.asses.str.strip().str.upper().map(BIRADS)
    assessments = clinical.assign(rank=birads.map(ranks))
    keys = [*KEYS, "side"]
    breasts = pd.concat(
        [
            _by_side(biopsies).groupby(keys).cancer.max(),
            _by_side(assessments).groupby(keys)["rank"].max(),
        ],
        axis=1,
    )
    values = list(BIRADS.values())
    return breasts.assign(birads=breasts["rank"].map(lambda rank: values[int(rank)], na_action="ignore")).reset_index()


def _by_side(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with `side` L or R; a row of both sides, or of an unknown one, is repeated for each."""
    names = [[side] if side in ("L", "R") else ["L", "R"] for side in normalize_side(rows.side)]
    sides = pd.Series(names, index=rows.index, dtype=object)
    return rows.assign(side=sides).explode("side")


def _exams(clinical: pd.DataFrame) -> pd.DataFrame:
    """Return the density of each exam and the woman's age at it in completed years, as in DICOM headers."""
    density = clinical.tissueden.map(read_density, na_action="ignore")
    age = pd.to_numeric(clinical.age_at_study, errors="coerce") // 1
    return clinical.assign(density=density, age=age).groupby(list(KEYS))[["density", "age"]].first().reset_index()


def _boxes(text: str) -> str:
    """Return ROI_coords, a list of (ymin, xmin, ymax, xmax), as boxes x0 y0 x1 y1."""
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]
    rois = zip(numbers[::4], numbers[1::4], numbers[2::4], numbers[3::4], strict=False)
    return lesions.boxes_to_text((x0, y0, x1, y1) for y0, x0, y1, x1 in rois)
