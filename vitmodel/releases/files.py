"""Find the label tables and image files of a source, listing each folder once and without decoding any image."""

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

IMAGE_SUFFIXES = (
    *(".dcm", ".dicom", ".dic", ".ima"),
    *(".png", ".jpg", ".jpeg", ".jfif", ".tif", ".tiff", ".jp2", ".bmp", ".pgm"),
)
PATIENT_IMAGE_PATTERN = re.compile(r"([^_]*\d[^_]*)_([^_]+)")
"""File names of the form <patient>_<image>, where the patient has a digit: img_1 and img_2 do not share a patient."""


def find_table(root: Path, *names: str) -> Path | None:
    """Return the first of `names` that is in the folder `root`, or `root` itself if it is a file with such a name."""
    if root.is_file():
        return root if root.name in names else None
    return next((root / name for name in names if (root / name).is_file()), None)


def tables_with_columns(root: Path, columns: Collection[str]) -> list[Path]:
    """Return the CSV files in the folder `root` (or `root` itself) whose header has all of `columns`."""
    files = [root] if root.is_file() else sorted(root.glob("*.csv"))
    return [path for path in files if path.suffix.lower() == ".csv" and set(columns) <= csv_header(path)]


def csv_header(path: Path) -> set[str]:
    """Return the column names of a CSV file, or none if it cannot be read: reading the table will report that."""
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            return set(next(csv.reader(file), []))
    except (OSError, csv.Error):
        return set()


def list_images(root: Path) -> list[str]:
    """Return the sorted absolute paths of the images below the folder `root`, or of `root` itself if it is a file."""
    return [os.path.abspath(root)] if root.is_file() else sorted(iter_images(os.path.abspath(root)))


def iter_images(folder: str, ancestors: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yield the paths of the images below `folder`, in no particular order.

    Images are recognised by their suffix. A file without a suffix is an image if it starts like a DICOM file (DICOM
    PS3.10 section 7.1). A subfolder that a run wrote its output to is skipped, because the output folder may be inside
    the source. If `folder` itself is such a folder, it is read.

    Args:
        folder: The folder to search.
        ancestors: Real paths of the folders that contain `folder`, to detect cycles of symbolic links.
    """
    real_path = os.path.realpath(folder)
    if real_path in ancestors:  # a symbolic link to a folder that contains it
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if os.path.exists(os.path.join(entry.path, LOCK_FILE)):
                    _warn_skipped_folder(os.path.abspath(entry.path))
                else:
                    yield from iter_images(entry.path, ancestors | {real_path})
            elif entry.name.upper() != "DICOMDIR" and _looks_like_image(entry):
                yield entry.path


@functools.cache
def _warn_skipped_folder(folder: str) -> None:
    """Warn that a folder is skipped; cached, to warn once however often the folder is listed."""
    logger.warning("%s is skipped, because it holds the results of a run; to read its images, pass this folder", folder)


def _looks_like_image(entry: os.DirEntry[str]) -> bool:
    """Return whether a file has an image's suffix, or no suffix and the first bytes of a DICOM file."""
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix and not suffix[1:].isdigit():  # a file named by its UID, such as 1.2.840.1, has no suffix
        return suffix in IMAGE_SUFFIXES
    try:
        with open(entry.path, "rb") as file:
            return file.read(132).endswith(b"DICM")
    except OSError:
        return True  # keep an unreadable file in the table, so that it is reported as refused


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
