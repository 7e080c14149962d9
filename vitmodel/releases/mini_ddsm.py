"""Read Mini-DDSM (2020; arXiv:2010.00494): digitised films of DDSM as JPEG or PNG, with masks of the lesions.

Lekamlage CD, Afzal F, Westerberg E, Cheddad A: Mini-DDSM: Mammography-based automatic age estimation. DMIP 2020.
Published on Kaggle (cheddad/miniddsm2), free for research with citation of Mini-DDSM and DDSM.

The release has folders Benign/, Cancer/ and Normal/ with <case>/C_0027_1.LEFT_CC.jpg next to ..._Mask.jpg, and the
tables DataWMask.xlsx and Data-MoreThanTwoMasks.xlsx. Status is that of the case, not of the breast. In a case with a
cancer, therefore, a breast is positive if the contour of a lesion is drawn in one of its films, and negative if
contours are drawn only in the other breast. Without any contour, `cancer` is NaN for both. Density 0 is unknown.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import pandas as pd

from vitmodel.data.manifest import as_manifest
from vitmodel.data.tables import read_table
from vitmodel.releases.files import image_stem, normalize_side
from vitmodel.releases.masks import FilmMask, read_boxes
from vitmodel.releases.missing_tables import MissingTable
from vitmodel.releases.source import Source
from vitmodel.releases.vocabulary import read_density

EXPECTED_FILES = "DataWMask.xlsx next to Benign/, Cancer/ and Normal/ with films such as C_0027_1.LEFT_CC.jpg"
TABLE_NAMES = ("DataWMask.xlsx", "DataWMask.csv", "Data-MoreThanTwoMasks.xlsx", "Data-MoreThanTwoMasks.csv")
NEEDED_COLUMNS = ("fileName", "Status", "Tumour_Contour", "Age", "Density")
FILM_PATH = re.compile(r"/(benign|cancer|normal)/(.*/)?[A-D]_\d+_\d+\.(LEFT|RIGHT)_(CC|MLO)\.\w+$", re.IGNORECASE)
FILM_NAME = re.compile(r"(?P<case>.+)\.(?P<side>LEFT|RIGHT)_(?P<view>CC|MLO)", re.IGNORECASE)
MASK_NAME = re.compile(r"(?P<film>.+)_mask\d*", re.IGNORECASE)
STATUS_FOLDERS = ("benign", "cancer", "normal")
MISSING_TABLE = MissingTable(
    "the table DataWMask.xlsx of Mini-DDSM",
    "kaggle.com/datasets/cheddad/miniddsm2",
    FILM_PATH,
    (".LEFT_", ".RIGHT_"),
    unknown="age and density",
    reads_names=True,
)


def detect(source: Source) -> bool:
    """Return whether the source has one of the release's tables."""
    return source.find_table(*TABLE_NAMES) is not None


def read(source: Source) -> pd.DataFrame:
    """Return a manifest with one row per film, from the tables and from the films that no table lists.

    Raises:
        UsageError: A table cannot be read, or lacks a column.
    """
    paths = _films(source)
    masks = _masks(source, paths)
    table = _listed_films(source).reindex(columns=["fullPath", "Status", "has_contour", "Age", "Density"])
    names = [*table.index, *(name for name in paths if name not in table.index)]
    table = table.reindex(pd.Index(names, name="image_id")).reset_index()
    parts = table.image_id.str.extract(FILM_NAME)
    listed_paths = (str(source.folder) + "/" + table.fullPath.str.replace("\\", "/")).fillna(table.image_id)
    table["path"] = table.image_id.map(paths).fillna(listed_paths)
    table["status"] = table.Status.str.strip().str.lower().fillna(table.path.map(_status_of_folder))
    table["has_contour"] = (table.has_contour == True) | table.image_id.isin(masks)  # noqa: E712 (NaN is not True)
    table["patient_id"] = parts.case.fillna(table.image_id)
    table["laterality"] = normalize_side(parts.side.fillna(""))
    cancer = _cancer(table)
    film_masks = [
        FilmMask(film, (mask,), malignant)
        for name, film, malignant in zip(table.image_id, table.path, cancer == 1, strict=True)
        for mask in masks.get(name, ())
    ]
    lesions, finding_boxes = read_boxes(film_masks, "Mini-DDSM")
    frame = pd.DataFrame(
        {
            "image_id": table.image_id,
            "patient_id": table.patient_id,
            "laterality": table.laterality,
            "view": parts["view"].fillna("").str.upper(),
            "path": table.path,
            "dataset": "mini_ddsm",
            "cancer": cancer,
            "density": table.Density.map(read_density, na_action="ignore"),
            "age": pd.to_numeric(table.Age, errors="coerce").replace(0, np.nan),
            "lesions": table.path.map(lesions),
            "finding_boxes": table.path.map(finding_boxes),
            "case_status": table.status,
        }
    )
    return as_manifest(frame, str(source.root))


def _films(source: Source) -> dict[str, str]:
    """Return the path of each film by its name; of a JPEG and a PNG copy, the PNG, which has more grey levels."""
    png_last = sorted(source.images, key=lambda file: file.lower().endswith(".png"))
    files = {image_stem(file): file for file in png_last}
    return {name: file for name, file in files.items() if FILM_NAME.fullmatch(name)}


def _masks(source: Source, films: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the masks of each film that exists: those in its folder or, if there are none, those in other folders."""
    masks: dict[str, list[str]] = defaultdict(list)
    for file in source.files:
        match = MASK_NAME.fullmatch(image_stem(file))
        if match and match["film"] in films:
            masks[match["film"]].append(file)
    for name, files in masks.items():
        nearby = [file for file in files if os.path.dirname(file) == os.path.dirname(films[name])]
        masks[name] = nearby or list({image_stem(file): file for file in files}.values())
    return dict(masks)


def _listed_films(source: Source) -> pd.DataFrame:
    """Return the rows of the release's tables by the name of the film; none, with a warning, if there is no table."""
    found = [source.find_table(*names) for names in (TABLE_NAMES[:2], TABLE_NAMES[2:])]
    tables = [read_table(path, NEEDED_COLUMNS) for path in found if path is not None]
    if not tables:
        MISSING_TABLE.warn(source)
        return pd.DataFrame(columns=[*NEEDED_COLUMNS, "fullPath", "has_contour"], dtype=object)
    table = pd.concat(tables, ignore_index=True)
    contours = table.filter(regex="^Tumour_Contour")
    table["has_contour"] = (contours.notna() & (contours != "-")).any(axis=1)
    films = table.fileName.str.replace("\\", "/").map(image_stem, na_action="ignore")
    has_contour = table.has_contour.groupby(films).any()
    return table.groupby(films).first().assign(has_contour=has_contour)


def _status_of_folder(path: str) -> str | float:
    """Return the class of the folder that holds a film; NaN if there is none."""
    folders = (part.lower() for part in reversed(path.split(os.sep)[:-1]))
    return next((folder for folder in folders if folder in STATUS_FOLDERS), np.nan)


def _cancer(table: pd.DataFrame) -> pd.Series:
    """Return the label of each film's breast from the status of its case and the contours in the case."""
    breast_has_contour = table.has_contour.groupby([table.patient_id, table.laterality]).transform("any")
    case_has_contour = table.has_contour.groupby(table.patient_id).transform("any")
    label = table.status.map({"normal": 0.0, "benign": 0.0, "cancer": 1.0})
    other_breast = (label == 1) & case_has_contour & ~breast_has_contour
    return label.mask(other_breast, 0.0).mask((label == 1) & ~case_has_contour)
