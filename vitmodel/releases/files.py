"""Names of files, patients and sides, as releases write them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from vitmodel.releases.source import IMAGE_SUFFIXES

PATIENT_IMAGE_PATTERN = re.compile(r"([^_]*\d[^_]*)_([^_]+)")
"""File names of the form <patient>_<image>, where the patient has a digit: img_1 and img_2 do not share a patient."""


def image_stem(path: str) -> str:
    """Return the file's name without its suffix, if the suffix is an image's."""
    name = os.path.basename(path)
    base, suffix = os.path.splitext(name)
    return base if suffix.lower() in IMAGE_SUFFIXES else name


def patient_from_name(path: str) -> str | None:
    """Return the patient of a file named <patient>_<image>, or None if it has another name."""
    match = PATIENT_IMAGE_PATTERN.fullmatch(image_stem(path))
    return match[1] if match else None


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

    Characters that are not allowed in a path are replaced; a hash of the id is then appended to keep names distinct.
    """
    clean = re.sub(r"[^\w.-]", "_", identifier).lstrip(".")
    return clean if clean == identifier else f"{clean}-{hashlib.sha256(identifier.encode()).hexdigest()[:8]}"
