"""Read whatever a user passes for scoring into one table: files, folders, releases, manifests, archives, DICOMDIRs.

Every input has a row. An input that cannot be read gets the status refused.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from pydicom import dcmread
from pydicom.errors import InvalidDicomError

from vitmodel.archives import check_readable, is_source_folder, open_source, path_to_text, source_exists
from vitmodel.data.manifest import as_manifest, merge_manifests
from vitmodel.data.tables import TABLE_SUFFIXES
from vitmodel.errors import InputRefusedError, RefusedError, UsageError
from vitmodel.releases import dicom_folder
from vitmodel.releases.files import make_unique
from vitmodel.releases.registry import read_release
from vitmodel.releases.source import Source
from vitmodel.utils import describe_failure

logger = logging.getLogger(__name__)


def read_inputs(sources: Sequence[str], dataset: str) -> pd.DataFrame:
    """Return one manifest of all `sources`.

    A file that is passed twice has one row. Ids that several files or releases share are made unique. An input without
    any image becomes a row with the status refused and empty preprocessing.

    Args:
        sources: Paths of files, folders, zips, tars, tables or DICOMDIRs; "-" reads paths from standard input, one
            a line.
        dataset: A key of `RELEASE_ADAPTERS`, or "auto", for folders, archives and tables.

    Raises:
        UsageError: The only source is a table that is not valid, or standard input is empty.
    """
    files: list[str] = []
    tables: list[pd.DataFrame] = []
    refused: list[dict[str, str]] = []
    names = list(_expand_standard_input(sources))
    for name in names:
        try:
            if is_source_folder(name) or name.lower().endswith(TABLE_SUFFIXES):
                tables.append(_read_source(Path(name), dataset, name))
            elif os.path.basename(name).upper() == "DICOMDIR" and source_exists(name):
                files += _dicomdir_files(Path(name))
            else:
                check_readable(name)
                files.append(os.path.abspath(name))
        except InputRefusedError as refusal:
            refused.append(_refused_row(name, refusal))
        except Exception as error:
            if len(names) == 1:
                raise
            refused.append(_refused_row(name, _as_refusal(error)))
    if files:
        tables.append(dicom_folder.read_files(_without_repeats(files), _common_folder(files)))
    if refused:
        unique = pd.DataFrame(refused).drop_duplicates("path")
        _warn_repeats(len(refused) - len(unique))
        tables.append(as_manifest(unique.assign(dataset="input"), "the inputs"))
    if not tables:
        raise UsageError("standard input names nothing to score; write one path a line to it")
    return tables[0] if len(tables) == 1 else _join(tables)


def _as_refusal(error: Exception) -> InputRefusedError:
    """Return the refusal of one of several inputs that cannot be read."""
    if isinstance(error, UsageError):
        return InputRefusedError("unreadable", str(error))
    return InputRefusedError("failed", describe_failure(error))


def _expand_standard_input(sources: Sequence[str]) -> Iterator[str]:
    """Yield `sources`, with "-" replaced by the non-empty lines of standard input."""
    for source in map(path_to_text, sources):
        if source == "-":
            yield from filter(None, (line.strip() for line in sys.stdin))
        else:
            yield source


def _refused_row(name: str, refusal: InputRefusedError) -> dict[str, str]:
    return {
        "image_id": name,
        "patient_id": name,
        "laterality": "",
        "view": "",
        "path": os.path.abspath(name),
        "status": "refused",
        "reason": refusal.code,
        "remark": refusal.message,
    }


def _read_source(source: Path, dataset: str, name: str) -> pd.DataFrame:
    """Return the table of a folder or CSV file that the user calls `name`.

    Raises InputRefusedError if it does not exist or contains no image.
    """
    if not source_exists(source):
        raise InputRefusedError("missing_file", f"{name} does not exist; check the path")
    files = Source(source)
    if files.is_folder and not files.images and not files.tables:
        raise InputRefusedError(
            "not_an_image", f"{name} contains no image; it must contain {dicom_folder.EXPECTED_FILES}"
        )
    return read_release(files, dataset)


def _dicomdir_files(dicomdir: Path) -> list[str]:
    """Return the image files that a DICOMDIR lists, existing or not (DICOM PS3.10 section 8, PS3.3 section F.5).

    Raises InputRefusedError if the DICOMDIR cannot be read or lists no image.
    """
    try:
        with open_source(dicomdir) as file:
            records = dcmread(file).DirectoryRecordSequence
        file_ids = [record.ReferencedFileID for record in records if record.DirectoryRecordType == "IMAGE"]
    except (InvalidDicomError, AttributeError, OSError, ValueError, RefusedError) as error:
        raise InputRefusedError(
            "unreadable",
            f"{dicomdir} cannot be read as a DICOMDIR ({describe_failure(error)}); pass the folder of its images",
        ) from None
    if not file_ids:
        raise InputRefusedError("no_pixels", f"{dicomdir} lists no image; pass the folder of its images")
    folder = os.path.abspath(dicomdir.parent)
    return [_path_on_disk(folder, _path_parts(file_id)) for file_id in file_ids]


def _path_on_disk(folder: str, parts: Sequence[str]) -> str:
    """Return the path of a file of a DICOMDIR.

    A copied disk may have names in another case, or a suffix that was added to the files; names in a DICOMDIR are in
    capitals and have no suffix (PS3.10 section 8.2).
    """
    path = folder
    for part in parts:
        exact = os.path.join(path, part)
        try:
            names = {} if os.path.exists(exact) else {name.lower(): name for name in os.listdir(path)}
        except OSError:  # the folder is missing, or is in an archive
            names = {}
        wanted = part.lower()
        with_suffix = (name for name in names if os.path.splitext(name)[0] == wanted)
        found = names.get(wanted) or names.get(next(with_suffix, ""))
        path = os.path.join(path, found) if found else exact
    return path


def _path_parts(file_id: str | Sequence[str]) -> Sequence[str]:
    """Return the components of a ReferencedFileID, which pydicom gives as str if there is only one."""
    return [file_id] if isinstance(file_id, str) else file_id


def _without_repeats(files: Sequence[str]) -> list[str]:
    unique = list(dict.fromkeys(files))
    _warn_repeats(len(files) - len(unique))
    return unique


def _warn_repeats(count: int) -> None:
    if count:
        logger.warning("inputs that repeat an earlier file: %d; each file is scored once", count)


def _join(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of all tables, and of rows with the same file only the first."""
    table = pd.concat([part.astype(object) for part in tables], ignore_index=True)
    sources = pd.Series(np.repeat(range(len(tables)), [len(part) for part in tables]))
    repeated = (table.path != "") & table.path.duplicated()
    _warn_repeats(int(repeated.sum()))
    table = dicom_folder.separate_shared_patients(table[~repeated], sources[~repeated])
    parts = []
    for _, part in table.groupby("dataset", sort=False, dropna=False):
        parts.append(part.assign(image_id=make_unique(part.image_id, part.path, _common_folder(part.path))))
    return merge_manifests(parts)


def _common_folder(files: Iterable[str]) -> Path:
    """Return the lowest folder that contains all files."""
    folders = {os.path.dirname(os.path.abspath(file)) for file in files if file}
    return Path(os.path.commonpath(folders)) if folders else Path("/")
