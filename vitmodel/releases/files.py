"""Names of files, patients and sides, as releases write them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from vitmodel.releases.listing import IMAGE_SUFFIXES

MAX_FILE_NAME = 200
"""Most bytes of a file name without its suffix; file systems allow 255 in all."""
PATIENT_IMAGE_PATTERN = re.compile(r"([^_]*\d[^_]*)_([^_]+)")
"""File names of the form <patient>_<image>, where the patient has a digit: img_1 and img_2 do not share a patient."""

SERIES_FOLDER = re.compile(
    r"(series?|serie|se|dicoms?|dcm|images?|img|im|files?|pictures?|png|left|right|l|r|(l|r)?(cc|mlo|ml|lm))[-_. ]?\d*",
    re.IGNORECASE,
)
"""Folders of a series or a view: one of that name may lie in the folder of any patient."""
STUDY_FOLDER = re.compile(r"(study|studies|exam|exams|visit|st)[-_. ]?\d*|\d+(\.\d+){4,}", re.IGNORECASE)
"""Folders of a study, which may be a patient's only if there is none above."""


def image_stem(path: str) -> str:
    """Return the file's name without its suffix, if the suffix is an image's."""
    name = os.path.basename(path)
    base, suffix = os.path.splitext(name)
    return base if suffix.lower() in IMAGE_SUFFIXES else name


def patient_from_name(path: str) -> str | None:
    """Return the patient of a file named <patient>_<image>, or None if it has another name."""
    match = PATIENT_IMAGE_PATTERN.fullmatch(image_stem(path))
    return match[1] if match else None


def folder_patients(files: Sequence[str], root: Path) -> list[str]:
    """Return the patient that each file's folder below `root` suggests.

    Folders of series are no patients, and folders of studies only if there is none above. Patients of the same name in
    different folders get the path.
    """
    start = os.path.join(os.path.abspath(root), "")
    if start == os.path.join(os.sep, ""):
        start = os.path.join(os.path.commonpath([os.path.dirname(file) for file in files]), "")
    paths = [_patient_folder(os.path.dirname(file).removeprefix(start.rstrip(os.sep)), root) for file in files]
    folders_of_name: dict[str, set[tuple[str, ...]]] = {}
    for path in paths:
        folders_of_name.setdefault(path[-1], set()).add(path)
    return [path[-1] if len(folders_of_name[path[-1]]) == 1 else "-".join(path) for path in paths]


def _patient_folder(relative: str, root: Path) -> tuple[str, ...]:
    """Return the folders of a path down to the patient's; that of `root` if the path is empty."""
    folders = [name for name in relative.split(os.sep) if name]
    without_series = [name for name in folders if not SERIES_FOLDER.fullmatch(name)]
    patients = [name for name in without_series if not STUDY_FOLDER.fullmatch(name)]
    return tuple(patients or without_series[:1] or folders or [root.name])


def get_or_default(names: pd.Series, values: Mapping[str, str], defaults: Iterable[str]) -> list[str]:
    """Return the entry of `values` for each name, or the element of `defaults` at its position if there is none."""
    return [values.get(name, default) for name, default in zip(names, defaults, strict=True)]


def make_unique(names: pd.Series, paths: pd.Series, root: Path) -> pd.Series:
    """Return `names`, with each repeated name replaced by its file's path below `root`, joined with '-'."""
    relative_paths = paths.str.removeprefix(os.path.join(os.path.abspath(root), "")).str.replace(os.sep, "-")
    return names.where(~names.duplicated(keep=False), relative_paths)


def normalize_side(values: pd.Series) -> pd.Series:
    """Return L for Left, LEFT, l and so on, R likewise, and empty values unchanged."""
    return values.str.strip().str.upper().str[:1]


def safe_file_name(identifier: str) -> str:
    """Return an id as a file name.

    Characters that are not allowed in a path are replaced, and a long name is cut; a hash of the id is then appended to
    keep names distinct.
    """
    clean = re.sub(r"[^\w.-]", "_", identifier).lstrip(".")
    while len(clean.encode()) > MAX_FILE_NAME:
        clean = clean[: len(clean) * 9 // 10]
    return clean if clean == identifier else f"{clean}-{hashlib.sha256(identifier.encode()).hexdigest()[:8]}"
