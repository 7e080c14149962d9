"""Read images without a table: DICOM, PNG, JPEG, TIFF, JPEG 2000, BMP or PGM files below a folder, or a single file.

Metadata comes from the DICOM headers. All labels are NaN.
"""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from vitmodel.data.manifest import as_manifest
from vitmodel.errors import ImageRefusedError, UsageError
from vitmodel.pixels.open import open_image
from vitmodel.releases.files import image_stem, make_unique, patient_from_name
from vitmodel.releases.source import Source, without_copies
from vitmodel.utils import progress

logger = logging.getLogger(__name__)

MAX_NAMES = 10
"""Number of files that the warning about tables names."""
EXPECTED_FILES = "at least one DICOM, PNG, JPEG, TIFF, JPEG 2000, BMP or PGM file"
HEADER_COLUMNS = ("image_id", "patient_id", "study_id", "laterality", "view", "machine_id", "implant", "age")


def detect(source: Source) -> bool:
    """Return whether the source is a file or contains an image."""
    return source.is_file or bool(source.images)


def read(source: Source) -> pd.DataFrame:
    """Return a manifest with one row per file, including files that turn out to be no image (ETL refuses those).

    Values that the header lacks come from the file's path. The image is the file's name. The patient is taken from a
    name of the form <patient>_<image>; else it is the file's folder, if there are several folders; else each file is
    a patient of its own.

    Raises:
        UsageError: The folder contains no image.
    """
    if source.is_file:
        return read_files([str(source.root)], source.root)
    files = without_copies(source.images)
    if not files:
        raise UsageError(f"{source.root}: no image found in this folder; it must contain {EXPECTED_FILES}")
    warn_of_tables(source)
    return read_files(files, source.root)


def warn_of_tables(source: Source) -> None:
    """Warn that the images have no labels although the source has files that may hold them."""
    ignored = source.files_of_labels()
    if ignored:
        names = ", ".join(ignored[:MAX_NAMES]) + (
            f" and {len(ignored) - MAX_NAMES} more" if ignored[MAX_NAMES:] else ""
        )
        logger.warning(
            "%s: these files were not read, because no adapter recognises them: %s; if they hold labels, see "
            "'Your own table' in the documentation",
            source.root,
            names,
        )


def read_files(files: list[str], root: Path) -> pd.DataFrame:
    """Return a manifest with one row per file, including files that do not exist or are no image.

    The `exam_id` of a patient with several studies is the StudyInstanceUID; that of other patients is empty. An image
    id that several files share is replaced by each file's path below `root`.
    """
    folder_is_patient = len({os.path.dirname(file) for file in files}) > 1
    rows = [_row(file, folder_is_patient) for file in progress(files, "headers", unit="file")]
    frame = pd.DataFrame(rows).assign(dataset="dicom_folder")
    frame["image_id"] = make_unique(frame.image_id, frame.path, root)
    several_studies = frame.study_id.replace("", None).groupby(frame.patient_id).transform("nunique") > 1
    frame["exam_id"] = frame.pop("study_id").where(several_studies, "")
    return as_manifest(frame, str(root))


def read_headers(files: list[str]) -> list[dict[str, Any]]:
    """Return the non-empty `HEADER_COLUMNS` of each file's header; none for a file that is no image."""
    return [_header_values(file) for file in progress(files, "headers", unit="file")]


def _row(file: str, folder_is_patient: bool) -> dict[str, Any]:
    """Return the manifest's values for a file: those in its header, and those in its path where the header has none."""
    patient = patient_from_name(file) or (Path(file).parent.name if folder_is_patient else image_stem(file))
    row = {"image_id": image_stem(file), "patient_id": patient, "laterality": "", "view": "", "path": file}
    return row | {"study_id": ""} | _header_values(file)


def _header_values(file: str) -> dict[str, Any]:
    """Return the non-empty `HEADER_COLUMNS` of a file's header; none if the image is refused."""
    try:
        header = asdict(open_image(file).header)
    except ImageRefusedError:
        return {}
    return {name: value for name, value in header.items() if name in HEADER_COLUMNS and value not in ("", None)}


def image_size(file: str) -> tuple[int, int] | None:
    """Return the rows and columns of an image, or None if it cannot be read."""
    try:
        header = open_image(file).header
    except ImageRefusedError:
        return None
    return header.rows, header.columns
