"""Whatever a user names to be scored, as one table: files, folders, releases, manifests, zips, DICOMDIRs, lists. Opens no pixels.

Every input has a row: what cannot be read stays as a refused one.
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
from vitmodel.errors import InputRefusedError, UsageError, VitmodelError
from vitmodel.releases import dicom_folder
from vitmodel.releases.files import make_unique
from vitmodel.releases.registry import read_release
from vitmodel.utils import derive_seed

logger = logging.getLogger(__name__)


def read_inputs(sources: Sequence[str], dataset: str, scratch: Path) -> pd.DataFrame:
    """One manifest of all `sources`; `-` stands for the names on standard input. A zip is unpacked below `scratch`.

    A file that is named twice has one row; ids that several files or releases use are told apart. An input that gives no image is a row
    whose status is refused and whose preprocessing is empty. Raises UsageError for a table at fault and where standard input is empty,
    VitmodelError where the disk is full.
    """
    files: list[str] = []
    tables: list[pd.DataFrame] = []
    refused: list[dict[str, str]] = []
    for name in _names(sources):
        try:
            if os.path.isdir(name) or name.lower().endswith(".csv"):
                tables.append(_release(Path(name), dataset, name))
            elif zipfile.is_zipfile(name):
                tables.append(_zipped(name, dataset, scratch))
            elif os.path.basename(name).upper() == "DICOMDIR" and os.path.exists(name):
                files += _listed(Path(name))
            else:
                files.append(os.path.abspath(name))
        except InputRefusedError as refusal:
            row = {"image_id": name, "patient_id": name, "laterality": "", "view": "", "path": os.path.abspath(name)}
            refused.append(row | {"status": "refused", "reason": refusal.code, "remark": refusal.message})
    if files:
        tables.append(dicom_folder.read_files(_once(files), Path("/")))
    if refused:
        once = pd.DataFrame(refused).drop_duplicates("path")
        _say_repeated(len(refused) - len(once))
        tables.append(as_manifest(once.assign(dataset="input"), "the inputs"))
    if not tables:
        raise UsageError("standard input names nothing to score")
    return tables[0] if len(tables) == 1 else _join(tables)


def _names(sources: Sequence[str]) -> Iterator[str]:
    for source in sources:
        if source == "-":
            yield from filter(None, (line.strip() for line in sys.stdin))
        else:
            yield source


def _release(source: Path, dataset: str, name: str) -> pd.DataFrame:
    """The table of `source`, which the user knows by `name`. Raises InputRefusedError where nothing there is an image."""
    if not source.exists():
        raise InputRefusedError("missing_file", f"{name} does not exist")
    if source.is_dir() and not dicom_folder.detect(source) and not any(source.glob("*.csv")):
        raise InputRefusedError("not_an_image", f"{name} holds no image; looked for {dicom_folder.EXPECTED_FILES}")
    return read_release(source, dataset)


def _zipped(name: str, dataset: str, scratch: Path) -> pd.DataFrame:
    """The table of a zip. Raises UsageError for a table in it that is at fault, by the zip's name and the member's."""
    folder = _unpack(Path(name), scratch)
    try:
        return _release(folder, dataset, name)
    except UsageError as error:
        raise UsageError(f"{name}: {str(error).replace(f'{folder}/', '')}") from error


def _unpack(archive: Path, scratch: Path) -> Path:
    """Unpack the zip below `scratch` and return the folder.

    Raises InputRefusedError if the zip is damaged or encrypted, VitmodelError if the disk is full.
    """
    folder = scratch / f"{archive.stem}-{derive_seed(archive.absolute()):016x}"
    try:
        with zipfile.ZipFile(archive) as content:
            if any(entry.flag_bits & 1 for entry in content.infolist()):
                raise InputRefusedError("unreadable", f"{archive} is encrypted; unpack it and name the folder")
            scratch.mkdir(parents=True, exist_ok=True)
            needed, free = sum(entry.file_size for entry in content.infolist()), shutil.disk_usage(scratch).free
            if needed > free:
                raise VitmodelError(
                    f"{archive} needs {needed / 1e9:.1f} GB unpacked, {scratch} has {free / 1e9:.1f} GB; free some space"
                )
            for entry in content.infolist():
                changed = time.mktime((*entry.date_time, 0, 0, -1))
                os.utime(
                    content.extract(entry, folder), (changed, changed)
                )  # the archive's own time: a second run knows the file again
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # bz2 tells of damage by one without a number
            raise VitmodelError(f"cannot unpack {archive} into {scratch}: {error.strerror}") from error
        raise InputRefusedError("unreadable", f"{archive} cannot be unpacked: {error}") from None
    return folder


def _listed(dicomdir: Path) -> list[str]:
    """The image files that a DICOMDIR lists (PS3.10 section 8, PS3.3 F.5), whether they are there or not. Raises InputRefusedError."""
    try:
        records = dcmread(dicomdir).DirectoryRecordSequence
        names = [record.ReferencedFileID for record in records if record.DirectoryRecordType == "IMAGE"]
    except (InvalidDicomError, AttributeError, OSError, ValueError) as error:
        raise InputRefusedError("unreadable", f"{dicomdir} cannot be read as a DICOMDIR: {error}") from None
    if not names:
        raise InputRefusedError("no_pixels", f"{dicomdir} lists no image")
    folder = os.path.abspath(dicomdir.parent)
    return [os.path.join(folder, *([name] if isinstance(name, str) else name)) for name in names]


def _once(files: Sequence[str]) -> list[str]:
    once = list(dict.fromkeys(files))
    _say_repeated(len(files) - len(once))
    return once


def _say_repeated(count: int) -> None:
    if count:
        logger.warning(
            "inputs that name an earlier file again: %d; a file counts once, however often it is named", count
        )


def _join(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """All rows; where a file stands in several tables, its first row."""
    table = pd.concat([part.astype(object) for part in tables], ignore_index=True)
    again = (table.path != "") & table.path.duplicated()
    _say_repeated(int(again.sum()))
    table = table[~again]
    parts = []
    for _, part in table.groupby("dataset", sort=False, dropna=False):
        parts.append(part.assign(image_id=make_unique(part.image_id, part.path, Path("/"))))
    return merge_manifests(parts)
