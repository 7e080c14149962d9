"""VinDr-Mammo (PhysioNet, 2022): breast-level_annotations.csv, finding_annotations.csv and images/<study_id>/<image_id>.dicom.

There is no pathology in this release, so cancer is NaN; what it gives is BI-RADS (a target) per breast and boxes per finding. One study
per patient; the official split is kept (training becomes train).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd

from vitmodel.data.manifest import as_manifest, read_table
from vitmodel.releases.files import find_table, get_or_default, image_stem, list_images

EXPECTED_FILES = "breast-level_annotations.csv beside images/<study>/<image>.dicom"
BREASTS, FINDINGS = "breast-level_annotations.csv", "finding_annotations.csv"
NEEDED_COLUMNS = ("study_id", "image_id", "laterality", "view_position", "breast_birads", "breast_density", "split")


def detect(root: Path) -> bool:
    return find_table(root, BREASTS) is not None


def read(root: Path) -> pd.DataFrame:
    """One row per image; extra column `findings`: the names of all its findings, separated by ';'. Raises UsageError."""
    path = root if root.is_file() else root / BREASTS
    table, folder = read_table(path, NEEDED_COLUMNS), os.path.abspath(path.parent)
    released = os.path.join(folder, "images", "") + table.study_id + "/" + table.image_id + ".dicom"
    files = {image_stem(file): file for file in list_images(path.parent)}
    frame = pd.DataFrame(
        {
            "image_id": table.image_id,
            "patient_id": table.study_id,
            "laterality": table.laterality,
            "view": table.view_position,
            "path": get_or_default(table.image_id, files, released),
            "dataset": "vindr",
            "split": table.split.replace({"training": "train"}),
            "birads": table.breast_birads.str.removeprefix("BI-RADS "),
            "density": table.breast_density.str.removeprefix("DENSITY "),
            "findings": table.image_id.map(_findings(path.with_name(FINDINGS))),
        }
    )
    return as_manifest(frame, str(path))


def _findings(path: Path) -> dict[str, str | float]:
    """The findings of every image that the table names; NaN for one without."""
    if not path.is_file():
        return {}
    table = read_table(path, ["image_id", "finding_categories"])
    lists = table.finding_categories.str.findall("'([^']+)'").groupby(table.image_id).sum()
    return {
        image: ";".join(sorted(set(names) - {"No Finding"})) or np.nan
        for image, names in zip(lists.index, lists, strict=True)
    }
