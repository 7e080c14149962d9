"""Images with no table: DICOM, PNG, JPEG or TIFF files below a folder, or one file. The headers tell what is known; labels are NaN."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from vitmodel.data.manifest import as_manifest
from vitmodel.data.source import distinct, image_files, images_below, patient_of, stem
from vitmodel.pixels.image import open_image
from vitmodel.pixels.verdict import ImageRefused
from vitmodel.utils import UsageError, progress

logger = logging.getLogger(__name__)

LOOKS_FOR = "at least one DICOM, PNG, JPEG or TIFF file"
FROM_HEADER = ("image_id", "patient_id", "laterality", "view", "machine_id", "implant", "age")


def detect(source: Path) -> bool:
    return source.is_file() or next(images_below(str(source)), None) is not None


def read(source: Path) -> pd.DataFrame:
    """One row per file, also where it is no image after all (the ETL will refuse it).

    What the header lacks comes from the name: the image from the file's, the patient from <patient>_<image>, else from the folder that
    the file lies in below `source`, else the file is a patient of its own. Raises UsageError where there is no image.
    """
    files = image_files(source)
    if not files:
        raise UsageError(f"{source}: no image in this folder; looked for {LOOKS_FOR}")
    unread = sorted(path.name for path in source.glob("*.csv")) if source.is_dir() else []
    if unread:
        logger.warning("%s: read without labels, for its tables are none that an adapter knows: %s", source, ", ".join(unread))
    root = Path(os.path.abspath(source))
    frame = pd.DataFrame([_row(file, root) for file in progress(files, "headers", unit="file")]).assign(dataset="dicom_folder")
    frame["image_id"] = distinct(frame.image_id, frame.path, root)
    return as_manifest(frame, str(source))


def _row(file: str, root: Path) -> dict[str, Any]:
    try:
        known = {name: value for name, value in asdict(open_image(file).header).items() if name in FROM_HEADER and value not in ("", None)}
    except ImageRefused:
        known = {}
    folder = "" if Path(file).parent == root else Path(file).parent.name
    names = {"image_id": stem(file), "patient_id": patient_of(file) or folder or stem(file), "laterality": "", "view": "", "path": file}
    return names | known
