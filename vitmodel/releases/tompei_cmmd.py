"""Read TOMPEI-CMMD (TCIA, 2025; doi:10.7937/wezw-bh22), which reads the images of CMMD again and outlines the lesions.

Licence: CC BY 4.0, as CMMD.

Layout: the folders of CMMD, TOMPEI-CMMD_clinical_data_v01_20250121.xlsx, and <patient>_MLO_<side>_AnnotationFile.json
with the outlines of the lesions in the MLO view, in pixels of the DICOM file.

`classification` is the pathology as far as the image shows it: Invisible is a cancer that cannot be located, Normal a
breast, often with a benign lesion, in which nothing can be located. A breast that was excluded has no label.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from vitmodel.archives import open_source
from vitmodel.data import lesions
from vitmodel.data.tables import is_spreadsheet, read_table
from vitmodel.errors import RefusedError, UsageError
from vitmodel.releases import cmmd
from vitmodel.releases.files import normalize_side
from vitmodel.releases.listing import is_dicom_name
from vitmodel.releases.source import Source

EXPECTED_FILES = "TOMPEI-CMMD_clinical_data_v01_20250121.xlsx next to the folders D1-0001, D1-0002, ... of CMMD"
TABLE_NAME = re.compile(r"TOMPEI-CMMD_clinical_data.*", re.IGNORECASE)
SHEET = "Imaging Diagnosis Details Sheet"
PATIENT = re.compile(r"D\d-\d+")
COLUMNS = {
    "id": "patient_id",
    "leftright": "laterality",
    "age": "age",
    "breast density": "density",
    "classification": "classification",
    "bi-rads category": "birads",
}
"""Columns of the manifest by the text of the table's, in lower case and with single spaces."""
CANCER = {"malignant": 1.0, "invisible": 1.0, "benign": 0.0, "normal": 0.0}
DENSITY = {
    "fatty": "A",
    "almost": "A",
    "scattered": "B",
    "heterogeneous": "C",
    "heterogeneously": "C",
    "extremely": "D",
}
"""Density by the first word of the cell."""
ANNOTATION_NAME = re.compile(r"(.+)_MLO_([LR])_AnnotationFile\.json")


def detect(source: Source) -> bool:
    """Return whether the source has the clinical table."""
    return _table(source) is not None


def read(source: Source) -> pd.DataFrame:
    """Return a manifest as that of CMMD, with the corrected labels, density, BI-RADS and boxes of the outlines.

    The boxes of a breast with cancer are in `lesions`, those of other breasts in `finding_boxes`.

    Raises:
        UsageError: The table cannot be read, or lacks a column.
    """
    path = _table(source) or source.root
    breasts = _breasts(path)
    table = cmmd.join_images(source, breasts, path)
    outlines = {name: _read_outlines(file) for name, file in _annotations(source, path).items()}
    names = (table.patient_id + "_" + table.laterality).where((table["view"] == "MLO") & table.path.map(is_dicom_name))
    names = names.mask(names.duplicated(keep=False))  # of several MLO images, the outlined one is unknown
    boxes = names.map({name: lesions.boxes_to_text(boxes) or np.nan for name, (_, boxes) in outlines.items()})
    return table.assign(
        lesions=boxes.where(table.cancer == 1),
        finding_boxes=boxes.where(table.cancer != 1),
        findings=names.map({name: ";".join(labels) or np.nan for name, (labels, _) in outlines.items()}),
    )


def _table(source: Source) -> Path | None:
    return next((path for path in source.tables if TABLE_NAME.fullmatch(path.name)), None)


def _breasts(path: Path) -> pd.DataFrame:
    """Return the breasts of the table, whose header has two or three rows."""
    table = read_table(path, sheet=SHEET if is_spreadsheet(path) else None)
    is_breast = table.apply(lambda cells: cells.astype(str).str.strip().str.fullmatch(PATIENT)).any(axis=1)
    first = int(np.argmax(is_breast)) if is_breast.any() else len(table)
    header = [table.columns, *table.iloc[:first].itertuples(index=False)]
    names: dict[str, int] = {}
    for row in header:
        for position, text in enumerate(row):
            names.setdefault(" ".join(str(text).lower().split()), position)
    missing = [text for text in COLUMNS if text not in names]
    if missing:
        raise UsageError(f"{path}: column {missing[0]!r} is missing; download the table again from TCIA")
    breasts = table[is_breast].iloc[:, [names[text] for text in COLUMNS]].set_axis(list(COLUMNS.values()), axis=1)
    breasts = breasts.apply(lambda cells: cells.str.strip())
    return breasts.assign(
        laterality=normalize_side(breasts.laterality),
        cancer=breasts.classification.str.lower().map(CANCER),
        density=breasts.density.map(_density, na_action="ignore"),
        birads=breasts.birads.str.extract(r"([0-6])", expand=False),
    )


def _density(text: str) -> str | float:
    """Return the category A to D of a cell with a letter, a number from 1 to 4 or words such as 'scattered'."""
    if text.upper() in "ABCD":
        return text.upper()
    if text in "1234":
        return "ABCD"[int(text) - 1]
    return DENSITY.get(text.lower().split()[0], np.nan)


def _annotations(source: Source, table: Path) -> dict[str, Path]:
    """Return the files with outlines by <patient>_<side>; they are below the source or next to the table."""
    near_table = [] if table.is_relative_to(source.folder) else table.parent.rglob("*_AnnotationFile.json")
    files = [path for path in (*map(Path, source.files), *near_table) if "__MACOSX" not in path.parts]
    matches = ((ANNOTATION_NAME.fullmatch(path.name), path) for path in files)
    return {f"{match[1]}_{match[2]}": path for match, path in matches if match}


def _read_outlines(path: Path) -> tuple[list[str], list[tuple[float, float, float, float]]]:
    """Return the sorted names of the outlined lesions and their boxes.

    Raises:
        UsageError: The file cannot be read.
    """
    try:
        with open_source(path) as file:
            entries = json.loads(file.read().decode("utf-8-sig"))
        labels = sorted({str(entry["label"]).strip() for entry in entries})
        return labels, list(_boxes(entries))
    except (RefusedError, OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a list of outlines ({error}); download it again, or remove it") from None


def _boxes(entries: list[dict[str, list[dict[str, float]]]]) -> Iterator[tuple[float, float, float, float]]:
    """Yield the bounding box of each outline that has an area."""
    for entry in entries:
        x = [point["x"] for point in entry["cgPoints"]]
        y = [point["y"] for point in entry["cgPoints"]]
        if x and min(x) < max(x) and min(y) < max(y):
            yield min(x), min(y), max(x), max(y)
