"""Read whatever a user passes for scoring into one table: files, folders, releases, manifests, zips, DICOMDIRs, lists.

Every input has a row. An input that cannot be read gets the status refused.
"""

from __future__ import annotations

import logging
import lzma
import os
import shutil
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
from pydicom import dcmread
from pydicom.errors import InvalidDicomError

from vitmodel.data.manifest import as_manifest, merge_manifests
from vitmodel.data.tables import TABLE_SUFFIXES
from vitmodel.errors import InputRefusedError, UsageError, VitmodelError
from vitmodel.releases import dicom_folder
from vitmodel.releases.files import make_unique
from vitmodel.releases.registry import read_release
from vitmodel.releases.source import Source
from vitmodel.utils import derive_seed

logger = logging.getLogger(__name__)


def read_inputs(sources: Sequence[str], dataset: str, scratch: Path) -> pd.DataFrame:
    """Return one manifest of all `sources`.

    A file that is passed twice has one row. Ids that several files or releases share are made unique. An input without
    any image becomes a row with the status refused and empty preprocessing.

    Args:
        sources: Paths of files, folders, zips, tables or DICOMDIRs; "-" reads paths from standard input, one a line.
        dataset: A key of `RELEASE_ADAPTERS`, or "auto", for folders, zips and tables.
        scratch: Folder below which zips are unpacked.

    Raises:
        UsageError: A table is not valid, or standard input is empty.
        VitmodelError: The disk is full.
    """
    files: list[str] = []
    tables: list[pd.DataFrame] = []
    refused: list[dict[str, str]] = []
    for name in _expand_standard_input(sources):
        try:
            if os.path.isdir(name) or name.lower().endswith(TABLE_SUFFIXES):
                tables.append(_read_source(Path(name), dataset, name))
            elif zipfile.is_zipfile(name):
                tables.append(_read_zip(name, dataset, scratch))
            elif os.path.basename(name).upper() == "DICOMDIR" and os.path.exists(name):
                files += _dicomdir_files(Path(name))
            else:
                files.append(os.path.abspath(name))
        except InputRefusedError as refusal:
            refused.append(_refused_row(name, refusal))
    if files:
        tables.append(dicom_folder.read_files(_without_repeats(files), Path("/")))
    if refused:
        unique = pd.DataFrame(refused).drop_duplicates("path")
        _warn_repeats(len(refused) - len(unique))
        tables.append(as_manifest(unique.assign(dataset="input"), "the inputs"))
    if not tables:
        raise UsageError("standard input names nothing to score; write one path a line to it")
    return tables[0] if len(tables) == 1 else _join(tables)


def _expand_standard_input(sources: Sequence[str]) -> Iterator[str]:
    """Yield `sources`, with "-" replaced by the non-empty lines of standard input."""
    for source in sources:
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
    if not source.exists():
        raise InputRefusedError("missing_file", f"{name} does not exist; check the path")
    files = Source(source)
    if source.is_dir() and not files.images and not files.tables:
        raise InputRefusedError(
            "not_an_image", f"{name} contains no image; it must contain {dicom_folder.EXPECTED_FILES}"
        )
    return read_release(source, dataset)


def _read_zip(name: str, dataset: str, scratch: Path) -> pd.DataFrame:
    """Return the table of a zip; a UsageError names the zip and its member instead of the unpacked file."""
    folder = _unpack(Path(name), scratch)
    try:
        return _read_source(folder, dataset, name)
    except UsageError as error:
        raise UsageError(f"{name}: {str(error).replace(f'{folder}/', '')}") from error


def _unpack(archive: Path, scratch: Path) -> Path:
    """Unpack the zip below `scratch` and return the folder.

    Raises InputRefusedError if the zip is damaged or encrypted, VitmodelError if the disk is full.
    """
    folder = scratch / f"{archive.stem}-{derive_seed(archive.absolute()):016x}"
    try:
        with zipfile.ZipFile(archive) as content:
            _check_unpackable(content, archive, scratch)
            for entry in content.infolist():
                file = content.extract(entry, folder)
                # Keep the archive's file times, so that a second run recognises unchanged files.
                modified = time.mktime((*entry.date_time, 0, 0, -1))
                os.utime(file, (modified, modified))
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # bz2 reports damaged data as OSError without errno
            raise VitmodelError(f"cannot unpack {archive} into {scratch}: {error.strerror}") from error
        raise InputRefusedError("unreadable", f"{archive} cannot be unpacked: {error}; copy it again") from None
    return folder


def _check_unpackable(content: zipfile.ZipFile, archive: Path, scratch: Path) -> None:
    """Create `scratch`; raise InputRefusedError if the zip is encrypted, VitmodelError if there is too little space."""
    if any(entry.flag_bits & 1 for entry in content.infolist()):
        raise InputRefusedError("unreadable", f"{archive} is encrypted; unpack it and pass the folder")
    scratch.mkdir(parents=True, exist_ok=True)
    needed = sum(entry.file_size for entry in content.infolist())
    free = shutil.disk_usage(scratch).free
    if needed > free:
        raise VitmodelError(
            f"{archive} needs {needed / 1e9:.1f} GB unpacked, but {scratch} has {free / 1e9:.1f} GB; free some space"
        )


def _dicomdir_files(dicomdir: Path) -> list[str]:
    """Return the image files that a DICOMDIR lists, existing or not (DICOM PS3.10 section 8, PS3.3 section F.5).

    Raises InputRefusedError if the DICOMDIR cannot be read or lists no image.
    """
    try:
        records = dcmread(dicomdir).DirectoryRecordSequence
        file_ids = [record.ReferencedFileID for record in records if record.DirectoryRecordType == "IMAGE"]
    except (InvalidDicomError, AttributeError, OSError, ValueError) as error:
        raise InputRefusedError(
            "unreadable", f"{dicomdir} cannot be read as a DICOMDIR: {error}; pass the folder of its images"
        ) from None
    if not file_ids:
        raise InputRefusedError("no_pixels", f"{dicomdir} lists no image; pass the folder of its images")
    folder = os.path.abspath(dicomdir.parent)
    return [os.path.join(folder, *_path_parts(file_id)) for file_id in file_ids]


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
    repeated = (table.path != "") & table.path.duplicated()
    _warn_repeats(int(repeated.sum()))
    table = table[~repeated]
    parts = []
    for _, part in table.groupby("dataset", sort=False, dropna=False):
        parts.append(part.assign(image_id=make_unique(part.image_id, part.path, Path("/"))))
    return merge_manifests(parts)
