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
from vitmodel.releases.files import distinct, image_files, images_below, patient_of, stem
from vitmodel.utils import progress

logger = logging.getLogger(__name__)

LOOKS_FOR = "at least one DICOM, PNG, JPEG or TIFF file"
FROM_HEADER = ("image_id", "patient_id", "laterality", "view", "machine_id", "implant", "age")


def detect(source: Path) -> bool:
    return source.is_file() or next(images_below(str(source)), None) is not None


def read(source: Path) -> pd.DataFrame:
    """One row per file, also where it is no image after all (the ETL will refuse it).

    What the header lacks comes from the name: the image from the file's; the patient from <patient>_<image>, else from the folder that
    the file lies in, where there are several, else the file is a patient of its own. Raises UsageError where there is no image.
    """
    files = image_files(source)
    if not files:
        raise UsageError(f"{source}: no image in this folder; looked for {LOOKS_FOR}")
    unread = sorted(path.name for path in source.glob("*.csv")) if source.is_dir() else []
    if unread:
        logger.warning("%s: read without labels, for its tables are none that an adapter knows: %s", source, ", ".join(unread))
    return read_files(files, source)


def read_files(files: list[str], root: Path) -> pd.DataFrame:
    """One row per file, also where it is no image or not there; ids that several files share get the file's path below `root`."""
    sorted_by_patient = len({os.path.dirname(file) for file in files}) > 1
    rows = [_row(file, sorted_by_patient) for file in progress(files, "headers", unit="file")]
    frame = pd.DataFrame(rows).assign(dataset="dicom_folder")
    frame["image_id"] = distinct(frame.image_id, frame.path, root)
    return as_manifest(frame, str(root))


def _row(file: str, sorted_by_patient: bool) -> dict[str, Any]:
    try:
        known = {name: value for name, value in asdict(open_image(file).header).items() if name in FROM_HEADER and value not in ("", None)}
    except ImageRefusedError:
        known = {}
    patient = patient_of(file) or (Path(file).parent.name if sorted_by_patient else stem(file))
    return {"image_id": stem(file), "patient_id": patient, "laterality": "", "view": "", "path": file} | known
