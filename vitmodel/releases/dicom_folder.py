"""Images with no table: DICOM, PNG, JPEG or TIFF files below a folder, or one file. The headers tell what is known; labels are NaN."""

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

EXPECTED_FILES = "at least one DICOM, PNG, JPEG or TIFF file"
HEADER_COLUMNS = ("image_id", "patient_id", "laterality", "view", "machine_id", "implant", "age")


def detect(root: Path) -> bool:
    return root.is_file() or next(iter_images(str(root)), None) is not None


def read(root: Path) -> pd.DataFrame:
    """One row per file, also where it is no image after all (the ETL will refuse it).

    What the header lacks comes from the name: the image from the file's; the patient from <patient>_<image>, else from the folder that
    the file lies in, where there are several, else the file is a patient of its own. Raises UsageError where there is no image.
    """
    files = list_images(root)
    if not files:
        raise UsageError(f"{root}: no image in this folder; looked for {EXPECTED_FILES}")
    unread = sorted(path.name for path in root.glob("*.csv")) if root.is_dir() else []
    if unread:
        logger.warning(
            "%s: read without labels, for its tables are none that an adapter knows: %s", root, ", ".join(unread)
        )
    return read_files(files, root)


def read_files(files: list[str], root: Path) -> pd.DataFrame:
    """One row per file, also where it is no image or not there; ids that several files share get the file's path below `root`."""
    sorted_by_patient = len({os.path.dirname(file) for file in files}) > 1
    rows = [_row(file, sorted_by_patient) for file in progress(files, "headers", unit="file")]
    frame = pd.DataFrame(rows).assign(dataset="dicom_folder")
    frame["image_id"] = make_unique(frame.image_id, frame.path, root)
    return as_manifest(frame, str(root))


def _row(file: str, sorted_by_patient: bool) -> dict[str, Any]:
    try:
        known = {
            name: value
            for name, value in asdict(open_image(file).header).items()
            if name in HEADER_COLUMNS and value not in ("", None)
        }
    except ImageRefusedError:
        known = {}
    patient = patient_from_name(file) or (Path(file).parent.name if sorted_by_patient else image_stem(file))
    return {"image_id": image_stem(file), "patient_id": patient, "laterality": "", "view": "", "path": file} | known
