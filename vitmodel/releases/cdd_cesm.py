"""Read CDD-CESM (TCIA, 2021; doi:10.7937/29kw-ae92): contrast-enhanced mammograms from Cairo.

Khaled R, Helal M, Alfarghaly O, et al.: Categorized contrast enhanced mammography dataset for diagnostic and artificial
intelligence research. Sci Data 9, 122 (2022), doi:10.1038/s41597-022-01238-0. CC BY 4.0.

The release has the folders "Low energy images of CDD-CESM" (P1_L_DM_MLO.jpg) and "Subtracted images of CDD-CESM"
(P1_L_CM_MLO.jpg), the spreadsheet Radiology-manual-annotations.xlsx (sheet "all") and, with outlines of the findings,
Radiology_hand_drawn_segmentations_v2.csv. Only low-energy images are read: they look like ordinary mammograms, whereas
subtracted images show the contrast medium. The pathology is given per image, so a breast has the worst of its images,
of both kinds. Of several BI-RADS values, separated by $, the largest counts.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pandas as pd

from vitmodel.data.lesions import boxes_to_text
from vitmodel.data.manifest import as_manifest
from vitmodel.data.tables import read_table
from vitmodel.errors import UsageError
from vitmodel.releases.files import get_or_default, image_stem, normalize_side
from vitmodel.releases.missing_tables import MissingTable, read_names
from vitmodel.releases.source import Source

logger = logging.getLogger(__name__)

EXPECTED_FILES = 'Radiology-manual-annotations.xlsx next to the folder "Low energy images of CDD-CESM"'
TABLE_NAMES = tuple(
    f"Radiology{gap}manual{gap}annotations.{suffix}" for suffix in ("xlsx", "csv") for gap in ("-", " ", "_")
)
SHEET = "all"
OUTLINE_TABLES = ("Radiology_hand_drawn_segmentations_v2.csv", "Radiology_hand_drawn_segmentations.csv")
NEEDED_COLUMNS = ("Image_name", "Patient_ID", "Side", "Type", "Age", "Breast density (ACR)", "BIRADS", "View")
PATHOLOGY_COLUMN = "Pathology Classification"
"""Start of the name of the column with the label."""
IMAGE_NAME = re.compile(r"(?:^|/)P(?P<patient>\d+)_(?P<side>[LR])_(?P<type>DM|CM)_(?P<view>[A-Z]+)", re.IGNORECASE)
MISSING_TABLE = MissingTable(
    f"the spreadsheet {TABLE_NAMES[0]} of CDD-CESM",
    "doi.org/10.7937/29kw-ae92",
    IMAGE_NAME,
    ("_DM_", "_CM_"),
    reads_names=True,
)


def detect(source: Source) -> bool:
    """Return whether the source has the release's table."""
    return source.find_table(*TABLE_NAMES) is not None


def read(source: Source) -> pd.DataFrame:
    """Return a manifest with one row per low-energy image; without the table, one without labels and with a warning.

    Raises:
        UsageError: The table cannot be read, or lacks a column.
    """
    files = {image_stem(file).strip(): file for file in source.images}
    subtracted = sum("_CM_" in name.upper() for name in files)
    if subtracted:
        logger.info("%s: %d subtracted images are left out, because they are no mammograms", source.root, subtracted)
    path = source.find_table(*TABLE_NAMES)
    if path is None:
        MISSING_TABLE.warn(source)
        low_energy = {name: file for name, file in files.items() if "_CM_" not in name.upper()}
        return read_names(low_energy, IMAGE_NAME, source, "cdd_cesm")
    images = _low_energy_images(read_table(path, NEEDED_COLUMNS, sheet=SHEET), str(path))
    low_energy_folder = str(source.folder) + "/Low energy images of CDD-CESM/"
    tags = images.get("Tags", pd.Series(index=images.index, dtype=object))
    boxes = images.name.map(_outline_boxes(source.find_table(*OUTLINE_TABLES)))
    frame = pd.DataFrame(
        {
            "image_id": images.name,
            "patient_id": images.Patient_ID.str.removesuffix(".0"),
            "laterality": images.side,
            "view": images["View"].str.strip().str.upper(),
            "path": get_or_default(images.name, files, low_energy_folder + images.name + ".jpg"),
            "dataset": "cdd_cesm",
            "cancer": images.cancer,
            "birads": images.birads,
            "density": images["Breast density (ACR)"].str.strip().str.upper().str.extract("^([A-D])")[0],
            "age": pd.to_numeric(images.Age, errors="coerce"),
            "findings": tags.map(_joined, na_action="ignore"),
            "lesions": boxes.where(images.image_cancer == 1),
            "finding_boxes": boxes.where(images.image_cancer != 1),
        }
    )
    return as_manifest(frame, str(path))


def _low_energy_images(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return one row per low-energy image with `name`, `side`, the labels of image and breast, and `birads`."""
    pathology = next((column for column in table if column.strip().startswith(PATHOLOGY_COLUMN)), None)
    if pathology is None:
        raise UsageError(f"{name}: column {PATHOLOGY_COLUMN}/ Follow up is missing; download the spreadsheet again")
    table["name"] = table.Image_name.str.strip().map(image_stem)
    table["side"] = normalize_side(table.Side)
    words = table[pathology].str.lower()
    label = words.str.contains("malignant").astype(float).where(words.str.contains("malignant|benign|normal", na=False))
    table["image_cancer"] = label.groupby(table.name).transform("max")
    table["cancer"] = label.groupby([table.Patient_ID, table.side]).transform("max")
    table["birads"] = _largest_birads(table.BIRADS).groupby(table.name).transform("max")
    is_low_energy = table.Type.str.strip().str.upper() == "DM"
    return table[is_low_energy].drop_duplicates("name").reset_index(drop=True)


def _largest_birads(values: pd.Series) -> pd.Series:
    """Return the largest of the assessments in each cell, such as 3 for 2$3; NaN if there is none."""
    return pd.to_numeric(values.str.findall(r"[0-6]").str.join(",").str.split(",").explode()).groupby(level=0).max()


def _joined(tags: str) -> str:
    return ";".join(dict.fromkeys(tag.strip() for tag in tags.split("$") if tag.strip()))


def _outline_boxes(path: Path | None) -> dict[str, str]:
    """Return the boxes of the outlines of each image, as text; none if the table of outlines is missing.

    The table is an export of the VGG Image Annotator: a row per outline, its shape as JSON, in pixels of the image.
    """
    if path is None:
        return {}
    table = read_table(path, ["#filename", "region_shape_attributes"])
    names = table["#filename"].map(lambda file: image_stem(file).strip(), na_action="ignore")
    boxes = table.region_shape_attributes.map(_outline_box, na_action="ignore").dropna()
    return {str(name): boxes_to_text(group) for name, group in boxes.groupby(names[boxes.index])}


def _outline_box(text: str) -> tuple[float, float, float, float] | None:
    """Return the bounding box of an outline; None if its shape is unknown."""
    try:
        shape = json.loads(text)
        if "all_points_x" in shape:
            x, y = shape["all_points_x"], shape["all_points_y"]
            return min(x), min(y), max(x) + 1, max(y) + 1
        if "cx" in shape:
            half_width, half_height = shape.get("rx", shape.get("r")), shape.get("ry", shape.get("r"))
            left, top = shape["cx"] - half_width, shape["cy"] - half_height
            return left, top, left + 2 * half_width, top + 2 * half_height
        if "width" in shape:
            return shape["x"], shape["y"], shape["x"] + shape["width"], shape["y"] + shape["height"]
    except (ValueError, KeyError, TypeError):
        return None
    return None
