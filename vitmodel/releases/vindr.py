"""Read VinDr-Mammo (PhysioNet, 2022; doi:10.1038/s41597-023-02100-7).

Licence: PhysioNet Restricted Health Data License 1.5.0.

Layout: breast-level_annotations.csv, finding_annotations.csv, metadata.csv and images/<study>/<image>.dicom, as
PhysioNet has them; or a set of pictures <study>/<image>.png with these tables or with vindr_detection_v1_folds.csv,
which has a row per finding.

The release has no pathology, so `cancer` is NaN. It gives BI-RADS (a target) per breast and per finding. Each patient
has one study. The official split is kept (training becomes train).
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd

from vitmodel.archives import is_source_file
from vitmodel.data import lesions
from vitmodel.data.manifest import as_manifest
from vitmodel.data.tables import read_table
from vitmodel.releases.dicom_folder import image_size
from vitmodel.releases.files import get_or_default, image_stem, normalize_side
from vitmodel.releases.listing import dicom_last, is_dicom_name
from vitmodel.releases.missing_tables import MissingTable
from vitmodel.releases.source import Source

logger = logging.getLogger(__name__)

EXPECTED_FILES = "breast-level_annotations.csv (or vindr_detection_v1_folds.csv) next to images/<study>/<image>.dicom"
MISSING_TABLE = MissingTable(
    "breast-level_annotations.csv of VinDr-Mammo",
    "https://physionet.org/content/vindr-mammo/",
    re.compile(r"/[0-9a-f]{32}/[0-9a-f]{32}\.\w+$"),
)
BREASTS = "breast-level_annotations.csv"
FOLDS = ("vindr_detection_v1_folds.csv", "vindr_detection_v1_folds_abnormal.csv")
FINDINGS = "finding_annotations.csv"
HEADERS = "metadata.csv"
NEEDED_COLUMNS = ("study_id", "image_id", "laterality", "view_position", "breast_birads", "breast_density", "split")
OTHER_NAMES = {"patient_id": "study_id", "view": "view_position"}
"""Columns that the set of pictures calls otherwise."""
CORNERS = ["xmin", "ymin", "xmax", "ymax"]


def detect(source: Source) -> bool:
    """Return whether the source has the table of breasts or that of a set of pictures."""
    return source.find_table(BREASTS, *FOLDS) is not None


def read(source: Source) -> pd.DataFrame:
    """Return a manifest with one row per image.

    The column `findings` has the names of all findings of the image, `finding_boxes` their boxes and the extra column
    `finding_birads` their highest BI-RADS. The boxes hold in the pixels of the DICOM file, so that a picture of another
    size has none.

    Raises:
        UsageError: A table cannot be read, or lacks a column.
    """
    path = source.find_table(BREASTS, *FOLDS) or source.root
    rows = _read(path, NEEDED_COLUMNS)
    table = rows.drop_duplicates("image_id", ignore_index=True)
    image_folder = os.path.join(path.parent, "images", "")
    default_paths = image_folder + table.study_id + "/" + table.image_id + ".dicom"
    files = {image_stem(file): file for file in dicom_last(source.images)}
    paths = pd.Series(get_or_default(table.image_id, files, default_paths), index=table.index)
    findings = _findings(_all_findings(source, path, rows)).reindex(table.image_id).set_index(table.index)
    headers = _headers(path.with_name(HEADERS)).reindex(table.image_id).set_index(table.index)
    frame = pd.DataFrame(
        {
            "image_id": table.image_id,
            "patient_id": table.study_id,
            "laterality": normalize_side(table.laterality),
            "view": table.view_position,
            "path": paths,
            "dataset": "vindr",
            "split": table.split.replace({"training": "train"}),
            "birads": _birads(table.breast_birads),
            "density": table.breast_density.str.removeprefix("DENSITY "),
            "findings": findings["names"],
            "finding_boxes": _boxes_of_dicom(findings.boxes, paths, table),
            "finding_birads": findings.birads,
            "age": headers.age,
            "machine_id": headers.machine_id,
        }
    )
    return as_manifest(frame, str(path))


def _read(path: Path, needed: tuple[str, ...]) -> pd.DataFrame:
    """Return a table with the official names of its columns."""
    table = read_table(path)
    if not set(needed) <= set(table):
        other_names = {other: name for other, name in OTHER_NAMES.items() if name not in table}
        table = table.rename(columns=other_names)
    if not set(needed) <= set(table):
        return read_table(path, needed)  # raises the error that names the missing column
    return table


def _birads(values: pd.Series) -> pd.Series:
    """Return the number of 'BI-RADS 4', as text."""
    return values.str.removeprefix("BI-RADS ")


def _all_findings(source: Source, path: Path, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the table of findings: next to the table of breasts, or that table itself if it has a row per finding."""
    if "finding_categories" in rows:
        return rows
    nearby = path.with_name(FINDINGS)
    findings = nearby if is_source_file(nearby) else source.find_table(FINDINGS)
    if findings is None:
        logger.warning(
            "%s: %s is missing, so the images have no findings; get it from PhysioNet", path.parent, FINDINGS
        )
        return pd.DataFrame(columns=["image_id", "finding_categories"], dtype=object)
    return read_table(findings, ["image_id", "finding_categories"])


def _findings(rows: pd.DataFrame) -> pd.DataFrame:
    """Return `names`, `boxes` and `birads` of the findings of each image; NaN where it has none."""
    names = rows.finding_categories.str.findall("'([^']+)'").groupby(rows.image_id).sum()
    result = pd.DataFrame({"names": names.map(lambda found: ";".join(sorted(set(found) - {"No Finding"})) or np.nan)})
    birads = _birads(rows.get("finding_birads", pd.Series(index=rows.index, dtype=object)))
    result["birads"] = pd.to_numeric(birads, errors="coerce").groupby(rows.image_id).max()
    corners = rows.reindex(columns=CORNERS).apply(pd.to_numeric, errors="coerce").dropna()
    boxes = corners.groupby(rows.image_id.reindex(corners.index))
    texts = {image: lesions.boxes_to_text(group.to_numpy()) for image, group in boxes}
    return result.assign(boxes=pd.Series(texts, dtype=object))


def _headers(path: Path) -> pd.DataFrame:
    """Return `age` and `machine_id` of each image in the table of headers; without this table, of none."""
    columns = {"Patient's Age": "age", "Manufacturer's Model Name": "machine_id"}
    table = read_table(path) if is_source_file(path) else pd.DataFrame(columns=["SOP Instance UID"], dtype=object)
    if "SOP Instance UID" not in table:  # another release's table of this common name
        table = pd.DataFrame(columns=["SOP Instance UID"], dtype=object)
    table = table.reindex(columns=["SOP Instance UID", *columns]).rename(columns=columns)
    table = table.drop_duplicates("SOP Instance UID").set_index("SOP Instance UID")
    age = pd.to_numeric(table.age.astype(object).str.extract(r"^0*([1-9]\d*)Y$", expand=False))
    return table.assign(age=age)


def _boxes_of_dicom(boxes: pd.Series, paths: pd.Series, table: pd.DataFrame) -> pd.Series:
    """Return the boxes of DICOM files and of pictures that have the size of their DICOM file."""
    sizes = table.reindex(columns=["height", "width"]).apply(pd.to_numeric, errors="coerce")
    is_copy = boxes.notna() & ~paths.map(is_dicom_name)
    resized = [row for row in boxes.index[is_copy] if image_size(paths[row]) != tuple(sizes.loc[row])]
    if resized:
        logger.warning(
            "boxes of findings are left out for %d pictures, because they have another size than the DICOM files",
            len(resized),
        )
    return boxes.drop(resized).reindex(boxes.index)
