"""Images sorted into one folder per class: positive/ and negative/, cancer/ and normal/, malignant/ and benign/, 1/ and 0/.

The class folders may lie in train/, val/ and test/ folders, which are kept as the split. Patients come from file names like
<patient>_<image>; where any name is otherwise, each file is a patient of its own, and a split may then divide a patient: the log says so.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pandas as pd

from vitmodel.data.manifest import as_manifest
from vitmodel.errors import UsageError
from vitmodel.releases.files import image_stem, list_images, make_unique, patient_from_name

logger = logging.getLogger(__name__)

EXPECTED_FILES = "folders positive/ and negative/ (or cancer and normal, malignant and benign, 1 and 0)"
CLASSES = {
    "positive": 1.0,
    "cancer": 1.0,
    "malignant": 1.0,
    "1": 1.0,
    "negative": 0.0,
    "normal": 0.0,
    "benign": 0.0,
    "0": 0.0,
}
SPLITS = {"train": "train", "val": "val", "valid": "val", "test": "test"}


def detect(root: Path) -> bool:
    """Whether `source`, or a split's folder in it, holds a folder of each class."""
    if not root.is_dir():
        return False
    return any(
        _has_classes(folder) for folder in [root, *(root / name for name in _folders(root) if name.lower() in SPLITS)]
    )


def _has_classes(folder: Path) -> bool:
    names = {name.lower() for name in _folders(folder)}
    worded = {CLASSES.get(name) for name in names - {"0", "1"}}
    return names == {"0", "1"} or {0.0, 1.0} <= worded  # among other folders, 0 and 1 may be patients


def _folders(folder: Path) -> list[str]:
    return [entry.name for entry in os.scandir(folder) if entry.is_dir()]


def read(root: Path) -> pd.DataFrame:
    """One row per image; side and view are unknown, and so is the class of an image outside the class folders. Raises UsageError."""
    paths = pd.Series(list_images(root), dtype=object)
    if paths.empty:
        raise UsageError(f"{root}: no image in these folders; looked for DICOM, PNG, JPEG and TIFF files")
    patients, stems = paths.map(patient_from_name), paths.map(image_stem)
    image_ids = make_unique(stems, paths, root)
    if patients.isna().any():
        logger.warning("%s: not all files are named <patient>_<image>, so each counts as a patient of its own", root)
        patients = image_ids
    # the outermost counts: negative/1 may be patient 1
    folders = paths.map(
        lambda path: [part.lower() for part in Path(path).relative_to(os.path.abspath(root)).parts[:-1]]
    )
    frame = pd.DataFrame(
        {
            "image_id": image_ids,
            "patient_id": patients,
            "laterality": "",
            "view": "",
            "path": paths,
            "dataset": "class_folders",
            "cancer": folders.map(lambda names: next((CLASSES[name] for name in names if name in CLASSES), np.nan)),
            "split": folders.map(lambda names: next((SPLITS[name] for name in names if name in SPLITS), np.nan)),
        }
    )
    return as_manifest(frame, str(root))
