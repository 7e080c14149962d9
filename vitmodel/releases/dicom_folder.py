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
from vitmodel.pixels.identity import ImageIdentity, read_identity
from vitmodel.pixels.open import open_image
from vitmodel.releases import patients
from vitmodel.releases.files import folder_patients, image_stem, make_unique, patient_from_name
from vitmodel.releases.identified_files import IdentifiedFile
from vitmodel.releases.listing import without_copies
from vitmodel.releases.source import Source
from vitmodel.utils import progress

logger = logging.getLogger(__name__)

MAX_NAMES = 10
"""Number of files that the warning about tables names."""
EXPECTED_FILES = "at least one DICOM, PNG, JPEG, TIFF, JPEG 2000, BMP or PGM file"
DESCRIPTIVE_COLUMNS = ("laterality", "view", "machine_id", "implant", "age")
HEADER_COLUMNS = ("image_id", "patient_id", *DESCRIPTIVE_COLUMNS)


def detect(source: Source) -> bool:
    """Return whether the source is a file or contains an image."""
    return source.is_file or bool(source.images)


def read(source: Source) -> pd.DataFrame:
    """Return a manifest with one row per file, including files that turn out to be no image (ETL refuses those).

    The header of a refused image counts as well. Values that it lacks come from the file's path: the image is the
    file's name; the patient is taken from a name of the form <patient>_<image>, else it is the file's folder, if there
    are several folders, else each file is a patient of its own.

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

    Patients, exams and images are separated by `patients`. An image id that several files share is replaced by each
    file's path below `root`.
    """
    identified = [
        IdentifiedFile(file, identity, name)
        for file, identity, name in zip(files, _read_identities(files), _patients_from_paths(files, root), strict=True)
    ]
    columns = {name: [getattr(file.identity, name) for file in identified] for name in DESCRIPTIVE_COLUMNS}
    frame = pd.DataFrame(columns | {"path": files, "dataset": "dicom_folder"}).join(patients.resolve(identified))
    image_ids = pd.Series([file.identity.image_id or image_stem(file.path) for file in identified])
    return as_manifest(frame.assign(image_id=make_unique(image_ids, frame.path, root)), str(root))


def separate_shared_patients(table: pd.DataFrame, sources: pd.Series) -> pd.DataFrame:
    """Return a joined table in which patients, exams and images that several sources share are separated again.

    Args:
        table: Rows of several sources.
        sources: The source of each row. Each of them was read by itself.
    """
    shared = (table.dataset == "dicom_folder") & (sources.groupby(table.patient_id).transform("nunique") > 1)
    if not shared.any():
        return table
    rows = table[shared]
    identities = _read_identities(rows.path.tolist())
    identified = [
        IdentifiedFile(path, identity, name)
        for path, identity, name in zip(rows.path, identities, rows.patient_id, strict=True)
    ]
    resolved = patients.resolve(identified).set_axis(rows.index)
    table = table.copy()
    resolved["shared_study"] = resolved["shared_study"].combine(rows["shared_study"], max)
    table.loc[shared, list(resolved)] = resolved
    nameless = rows.index[[not file.identity.study_id and not file.has_patient for file in identified]]
    names = table.patient_id[nameless].unique()
    if len(names):
        logger.warning("images of several inputs are of one patient by the names of their files: %s", ", ".join(names))
    return table


def read_headers(files: list[str]) -> list[dict[str, Any]]:
    """Return the non-empty `HEADER_COLUMNS` of each file's header; none for a file without one."""
    return [
        {name: value for name, value in asdict(identity).items() if name in HEADER_COLUMNS and value not in ("", None)}
        for identity in _read_identities(files)
    ]


def _read_identities(files: list[str]) -> list[ImageIdentity]:
    return [read_identity(file) for file in progress(files, "headers", unit="file")]


def _patients_from_paths(files: list[str], root: Path) -> list[str]:
    """Return the patient that the name or the folder of each file suggests."""
    if len({os.path.dirname(file) for file in files}) > 1:
        defaults = folder_patients(files, root)
    else:
        defaults = [image_stem(file) for file in files]
    return [patient_from_name(file) or default for file, default in zip(files, defaults, strict=True)]


def image_size(file: str) -> tuple[int, int] | None:
    """Return the rows and columns of an image, or None if it cannot be read."""
    try:
        header = open_image(file).header
    except ImageRefusedError:
        return None
    return header.rows, header.columns
