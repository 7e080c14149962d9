"""Read INbreast (2012; doi:10.1016/j.acra.2011.09.014).

Licence: for research, on request to the Breast Research Group (INESC Porto).

Layout: INbreast.csv or INbreast.xls, AllDICOMs/<file>_<patient>_MG_<side>_<view>_ANON.dcm and AllXML/<file>.xml with
the outlines of the findings.

Patient ids were removed from the table, so the code in the file names identifies patients. An image whose file is
missing becomes a patient of its own. The table has no pathology, so `cancer` is NaN. BI-RADS 4a, 4b and 4c become 4;
`birads_text` keeps the letter.
"""

from __future__ import annotations

import logging
import os
import plistlib
import re
from typing import Any, NamedTuple
from xml.parsers.expat import ExpatError

import numpy as np
import pandas as pd

from vitmodel.archives import open_source
from vitmodel.data import lesions
from vitmodel.data.manifest import as_manifest
from vitmodel.data.tables import read_table
from vitmodel.errors import RefusedError
from vitmodel.releases.files import get_or_default, image_stem, normalize_side
from vitmodel.releases.listing import dicom_last, is_dicom_name
from vitmodel.releases.missing_tables import MissingTable
from vitmodel.releases.source import Source
from vitmodel.releases.vocabulary import read_density

logger = logging.getLogger(__name__)

EXPECTED_FILES = "INbreast.csv or INbreast.xls next to AllDICOMs/"
TABLE_NAMES = ("INbreast.csv", "INbreast.xls", "INbreast.xlsx")
MISSING_TABLE = MissingTable(
    "INbreast.csv or INbreast.xls of INbreast",
    "the release's main folder",
    re.compile(r"/\d+_[0-9a-f]{16}_MG_[LR]_\w+_ANON\.dcm$"),
)
NEEDED_COLUMNS = ("Laterality", "View", "File Name", "ACR", "Bi-Rads")
POINT = re.compile(r"\(\s*([-\d.eE+]+)\s*,\s*([-\d.eE+]+)\s*\)")
MARKER = re.compile(r"(Point|Unnamed).*", re.IGNORECASE)
"""Names of outlines that mark no finding."""


class Outlines(NamedTuple):
    """The findings that are outlined in an image."""

    names: set[str]
    boxes: list[tuple[float, float, float, float]]
    """Bounding boxes in source pixels; a finding that is marked by a point has none."""


def detect(source: Source) -> bool:
    """Return whether the source has the release's table."""
    return source.find_table(*TABLE_NAMES) is not None


def read(source: Source) -> pd.DataFrame:
    """Return a manifest with one row per image.

    The columns `findings` and `finding_boxes` have the names and boxes of the outlines. The boxes hold in the pixels of
    the DICOM file, so that a picture has none.

    Raises:
        UsageError: The table cannot be read, or lacks a column.
    """
    path = source.find_table(*TABLE_NAMES) or source.root
    table = read_table(path, NEEDED_COLUMNS)
    image = table["File Name"].str.strip().str.removesuffix(".0")
    is_image = image.str.fullmatch(r"\d+").fillna(False).astype(bool)  # the spreadsheet ends with notes
    table = table[is_image].reset_index(drop=True)
    image = image[is_image].reset_index(drop=True)
    name_parts = {file: image_stem(file).split("_") for file in dicom_last(source.images)}
    files = {parts[0]: file for file, parts in name_parts.items()}
    patients = {image: name_parts[file][1] for image, file in files.items() if len(name_parts[file]) > 1}
    birads = table["Bi-Rads"].str.strip().str.removesuffix(".0")
    default_paths = os.path.join(source.folder, "AllDICOMs", "") + image + ".dcm"
    paths = pd.Series(get_or_default(image, files, default_paths), index=image.index)
    outlines = {os.path.splitext(os.path.basename(file))[0]: file for file in source.files if _is_outline_file(file)}
    found = {name: _read_outlines(outlines[name]) for name in image if name in outlines}
    boxes = image.map({name: lesions.boxes_to_text(entry.boxes) or np.nan for name, entry in found.items()})
    frame = pd.DataFrame(
        {
            "image_id": image,
            "patient_id": get_or_default(image, patients, image),
            "laterality": normalize_side(table.Laterality),
            "view": table.View.str.strip(),
            "path": paths,
            "dataset": "inbreast",
            "birads": birads.str[:1],
            "birads_text": birads,
            "density": table.ACR.map(read_density, na_action="ignore"),
            "findings": image.map({name: ";".join(sorted(entry.names)) or np.nan for name, entry in found.items()}),
            "finding_boxes": boxes.where(paths.map(is_dicom_name)),
        }
    )
    return as_manifest(frame, str(path))


def _is_outline_file(file: str) -> bool:
    return os.path.basename(os.path.dirname(file)).lower() == "allxml" and file.lower().endswith(".xml")


def _read_outlines(file: str) -> Outlines:
    """Return the outlines of an image: those of a property list as OsiriX exports it."""
    outlines = Outlines(set(), [])
    try:
        with open_source(file) as stream:
            rois: list[dict[str, Any]] = plistlib.load(stream)["Images"][0]["ROIs"]
    except (RefusedError, OSError, ValueError, LookupError, TypeError, ExpatError) as error:
        logger.warning("%s cannot be read as outlines (%s), so this image has no boxes", file, error)
        return outlines
    for roi in rois:
        name = str(roi.get("Name", "")).strip()
        if not name or MARKER.fullmatch(name):
            continue
        outlines.names.add(name)
        corners = [POINT.fullmatch(point.strip()) for point in roi.get("Point_px", [])]
        x = [float(corner[1]) for corner in corners if corner]
        y = [float(corner[2]) for corner in corners if corner]
        if x and min(x) < max(x) and min(y) < max(y):
            outlines.boxes.append((min(x), min(y), max(x), max(y)))
    return outlines
