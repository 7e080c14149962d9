"""Read VinDr-Mammo (PhysioNet, 2022).

The release has breast-level_annotations.csv, finding_annotations.csv and images/<study_id>/<image_id>.dicom. It has no
pathology, so `cancer` is NaN. It gives BI-RADS (a target) per breast and boxes per finding. Each patient has one study.
The official split is kept (training becomes train).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd

from vitmodel.archives import is_source_file
from vitmodel.data.manifest import as_manifest
from vitmodel.data.tables import read_table
from vitmodel.releases.files import get_or_default, image_stem
from vitmodel.releases.source import Source, dicom_last

EXPECTED_FILES = "breast-level_annotations.csv next to images/<study>/<image>.dicom"
BREASTS = "breast-level_annotations.csv"
FINDINGS = "finding_annotations.csv"
NEEDED_COLUMNS = ("study_id", "image_id", "laterality", "view_position", "breast_birads", "breast_density", "split")


def detect(source: Source) -> bool:
    """Return whether the source has the table of breasts."""
    return source.find_table(BREASTS) is not None


def read(source: Source) -> pd.DataFrame:
    """Return a manifest with one row per image.

    The extra column `findings` has the names of all findings of the image, separated by ';'.

    Raises:
        UsageError: A table cannot be read, or lacks a column.
    """
    path = source.find_table(BREASTS) or source.root
    table = read_table(path, NEEDED_COLUMNS)
    image_folder = os.path.join(os.path.abspath(path.parent), "images", "")
    default_paths = image_folder + table.study_id + "/" + table.image_id + ".dicom"
    files = {image_stem(file): file for file in dicom_last(source.images)}
    frame = pd.DataFrame(
        {
            "image_id": table.image_id,
            "patient_id": table.study_id,
            "laterality": table.laterality,
            "view": table.view_position,
            "path": get_or_default(table.image_id, files, default_paths),
            "dataset": "vindr",
            "split": table.split.replace({"training": "train"}),
            "birads": table.breast_birads.str.removeprefix("BI-RADS "),
            "density": table.breast_density.str.removeprefix("DENSITY "),
            "findings": table.image_id.map(_findings(path.with_name(FINDINGS))),
        }
    )
    return as_manifest(frame, str(path))


def _findings(path: Path) -> dict[str, str | float]:
    """Return the findings of each image in the table, separated by ';'; NaN for an image without a finding."""
    if not is_source_file(path):
        return {}
    table = read_table(path, ["image_id", "finding_categories"])
    lists = table.finding_categories.str.findall("'([^']+)'").groupby(table.image_id).sum()
    return {
        image: ";".join(sorted(set(names) - {"No Finding"})) or np.nan
        for image, names in zip(lists.index, lists, strict=True)
    }
