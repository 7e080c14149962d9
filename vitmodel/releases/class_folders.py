"""Read images sorted into one folder per class.

The folders are positive/ and negative/, cancer/ and normal/, malignant/ and benign/, or 1/ and 0/. They may be inside
train/, val/ and test/ folders, which become the split. The patient is taken from file names of the form
<patient>_<image>. If any file has another name, each file counts as a separate patient. Then a split may divide a
patient, and a warning is logged.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd

from vitmodel.archives import folder_names
from vitmodel.data.manifest import as_manifest
from vitmodel.errors import UsageError
from vitmodel.releases.files import image_stem, make_unique, patient_from_name
from vitmodel.releases.listing import is_hidden, without_copies
from vitmodel.releases.source import Source

logger = logging.getLogger(__name__)

T = TypeVar("T")

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


def detect(source: Source) -> bool:
    """Return whether the source, or a split's folder in it, contains a folder for each class."""
    root = source.root
    if not source.is_folder:
        return False
    split_folders = [root / name for name in _folders(root) if name.lower() in SPLITS]
    return any(_has_classes(folder) for folder in [root, *split_folders])


def _has_classes(folder: Path) -> bool:
    names = {name.lower() for name in _folders(folder)}
    named_classes = {CLASSES.get(name) for name in names - {"0", "1"}}
    return names == {"0", "1"} or {0.0, 1.0} <= named_classes  # among other folders, 0 and 1 may be patients


def _folders(folder: Path) -> list[str]:
    return [name for name in folder_names(folder) if not is_hidden(name)]


def read(source: Source) -> pd.DataFrame:
    """Return a manifest with one row per image.

    Side and view are unknown, and so is the class of an image that is outside the class folders.

    Raises:
        UsageError: The folder contains no image.
    """
    paths = pd.Series(without_copies(source.images), dtype=object)
    if paths.empty:
        raise UsageError(
            f"{source.root}: no image found; add DICOM, PNG, JPEG, TIFF, JPEG 2000, BMP or PGM files to these folders"
        )
    patients = paths.map(patient_from_name)
    image_ids = make_unique(paths.map(image_stem), paths, source.root)
    if patients.isna().any():
        logger.warning(
            "%s: some files are not named <patient>_<image>, so each file is a patient of its own", source.root
        )
        patients = image_ids
    folders = paths.map(lambda path: _folder_names(path, source.root))
    frame = pd.DataFrame(
        {
            "image_id": image_ids,
            "patient_id": patients,
            "laterality": "",
            "view": "",
            "path": paths,
            "dataset": "class_folders",
            "cancer": folders.map(lambda names: _first_value(names, CLASSES)),
            "split": folders.map(lambda names: _first_value(names, SPLITS)),
        }
    )
    return as_manifest(frame, str(source.root))


def _folder_names(path: str, root: Path) -> list[str]:
    """Return the lower-case names of the folders between `root` and the file, outermost first."""
    return [part.lower() for part in Path(path).relative_to(os.path.abspath(root)).parts[:-1]]


def _first_value(names: Iterable[str], values: Mapping[str, T]) -> T | float:
    """Return the value of the outermost folder that has one, else NaN: in negative/1, 1 may be a patient."""
    return next((values[name] for name in names if name in values), np.nan)
