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
from vitmodel.releases.files import image_stem, iter_images, list_images, make_unique, patient_from_name
from vitmodel.utils import progress

logger = logging.getLogger(__name__)

EXPECTED_FILES = "at least one DICOM, PNG, JPEG, TIFF, JPEG 2000, BMP or PGM file"
HEADER_COLUMNS = ("image_id", "patient_id", "laterality", "view", "machine_id", "implant", "age")


def detect(root: Path) -> bool:
    """Return whether `root` is a file or a folder that contains an image."""
    return root.is_file() or next(iter_images(str(root)), None) is not None


def read(root: Path) -> pd.DataFrame:
    """Return a manifest with one row per file, including files that turn out to be no image (ETL refuses those).

    Values that the header lacks come from the file's path. The image is the file's name. The patient is taken from a
    name of the form <patient>_<image>; else it is the file's folder, if there are several folders; else each file is
    a patient of its own.

    Raises:
        UsageError: The folder contains no image.
    """
    files = list_images(root)
    if not files:
        raise UsageError(f"{root}: no image found in this folder; it must contain {EXPECTED_FILES}")
    ignored_tables = sorted(path.name for path in root.glob("*.csv")) if root.is_dir() else []
    if ignored_tables:
        logger.warning(
            "%s: the images have no labels, because no adapter recognises these tables: %s",
            root,
            ", ".join(ignored_tables),
        )
    return read_files(files, root)


def read_files(files: list[str], root: Path) -> pd.DataFrame:
    """Return a manifest with one row per file, including files that do not exist or are no image.

    An image id that several files share is replaced by each file's path below `root`.
    """
    folder_is_patient = len({os.path.dirname(file) for file in files}) > 1
    rows = [_row(file, folder_is_patient) for file in progress(files, "headers", unit="file")]
    frame = pd.DataFrame(rows).assign(dataset="dicom_folder")
    frame["image_id"] = make_unique(frame.image_id, frame.path, root)
    return as_manifest(frame, str(root))


def _row(file: str, folder_is_patient: bool) -> dict[str, Any]:
    """Return the manifest's values for a file: those in its header, and those in its path where the header has none."""
    patient = patient_from_name(file) or (Path(file).parent.name if folder_is_patient else image_stem(file))
    row = {"image_id": image_stem(file), "patient_id": patient, "laterality": "", "view": "", "path": file}
    return row | _header_values(file)


def _header_values(file: str) -> dict[str, Any]:
    """Return the non-empty `HEADER_COLUMNS` of a file's header; none if the image is refused."""
    try:
        header = asdict(open_image(file).header)
    except ImageRefusedError:
        return {}
    return {name: value for name, value in header.items() if name in HEADER_COLUMNS and value not in ("", None)}
