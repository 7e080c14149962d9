"""What a source holds: its label tables and image files, each tree listed once. Knows no release and opens no image."""

from __future__ import annotations

import csv
import functools
import hashlib
import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import pandas as pd

from vitmodel.jobs.journal import LOCK_FILE

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".dcm", ".dicom", ".dic", ".ima", ".png", ".jpg", ".jpeg", ".tif", ".tiff")
PATIENT_IMAGE_PATTERN = re.compile(r"([^_]*\d[^_]*)_([^_]+)")
"""File names that tell the patient: <patient>_<image>, where the patient's part has a digit (so that not all of img_1, img_2 are one)."""


def find_table(root: Path, *names: str) -> Path | None:
    """The first of `names` that lies in the folder `source`, or `source` itself if it is a file of such a name."""
    if root.is_file():
        return root if root.name in names else None
    return next((root / name for name in names if (root / name).is_file()), None)


def tables_with_columns(root: Path, columns: Collection[str]) -> list[Path]:
    """The CSV files in the folder `source` (or `source` itself) whose header has all of `columns`."""
    files = [root] if root.is_file() else sorted(root.glob("*.csv"))
    return [path for path in files if path.suffix.lower() == ".csv" and set(columns) <= csv_header(path)]


def csv_header(path: Path) -> set[str]:
    """The column names of a CSV file; none where it cannot be read, which reading the table will report."""
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            return set(next(csv.reader(file), []))
    except (OSError, csv.Error):
        return set()


def list_images(root: Path) -> list[str]:
    """The absolute paths of the images below the folder `source`, sorted; or `source` itself where it is a file."""
    return [os.path.abspath(root)] if root.is_file() else sorted(iter_images(os.path.abspath(root)))


def iter_images(folder: str, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """The images below `folder`, which lies in the folders `above`, in no order.

    An image is told by its suffix; a name without one counts if the file starts like DICOM (PS3.10 section 7.1). A folder that a run
    wrote into is left out, for OUT may lie in SOURCE; as `folder` itself it is read.
    """
    real = os.path.realpath(folder)
    if real in above:  # a symbolic link to a folder that holds it
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if os.path.exists(os.path.join(entry.path, LOCK_FILE)):
                    _warn_skipped_folder(os.path.abspath(entry.path))
                else:
                    yield from iter_images(entry.path, above | {real})
            elif entry.name.upper() != "DICOMDIR" and _looks_like_image(entry):
                yield entry.path


@functools.cache
def _warn_skipped_folder(folder: str) -> None:
    """Once, however often the tree is listed."""
    logger.warning("%s is left out, for it holds the results of a run; to use them as images, name that folder", folder)


def _looks_like_image(entry: os.DirEntry[str]) -> bool:
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix and not suffix[1:].isdigit():  # an image named by its UID, 1.2.840.1, ends like .1
        return suffix in IMAGE_SUFFIXES
    try:
        with open(entry.path, "rb") as file:
            return file.read(132).endswith(b"DICM")
    except OSError:
        return True  # it stays in the table, to be refused by name


def image_stem(path: str) -> str:
    """The file's name without its suffix, where the suffix is an image's."""
    name = os.path.basename(path)
    base, suffix = os.path.splitext(name)
    return base if suffix.lower() in IMAGE_SUFFIXES else name


def patient_from_name(path: str) -> str | None:
    """The patient that a file name <patient>_<image> tells, if it does."""
    match = PATIENT_IMAGE_PATTERN.fullmatch(image_stem(path))
    return match[1] if match else None


def get_or_default(names: pd.Series, known: Mapping[str, str], otherwise: Iterable[str]) -> list[str]:
    """What is known of each name (its file, its patient), or else the entry of `otherwise`."""
    return [known.get(name, default) for name, default in zip(names, otherwise, strict=True)]


def make_unique(names: pd.Series, paths: pd.Series, root: Path) -> pd.Series:
    """`names`, and where several files share one the file's path below `root` instead, with '-' between its parts."""
    below = paths.str.removeprefix(os.path.join(os.path.abspath(root), "")).str.replace(os.sep, "-")
    return names.where(~names.duplicated(keep=False), below)


def normalize_side(values: pd.Series) -> pd.Series:
    """Left, LEFT, l ... as L; right likewise as R; what is empty stays so."""
    return values.str.strip().str.upper().str[:1]


def safe_file_name(identifier: str) -> str:
    """An id as a file name: itself, or, where it has characters that a path must not, cleaned and told apart by a hash."""
    clean = re.sub(r"[^\w.-]", "_", identifier).lstrip(".")
    return clean if clean == identifier else f"{clean}-{hashlib.sha256(identifier.encode()).hexdigest()[:8]}"
