"""Files that were uploaded for scoring: saved under safe names, checked against bounds, and read into a manifest."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pandas as pd

from vitmodel.archives import ArchiveBounds, check_bounds, is_archive
from vitmodel.data.tables import TABLE_SUFFIXES
from vitmodel.errors import InputRefusedError, RefusedError, RequestRefusedError, UsageError, VitmodelError
from vitmodel.releases.inputs import read_inputs
from vitmodel.scoring.tables import ScoreTables
from vitmodel.utils import progress_bars

MAX_NAME = 60
"""Most characters of an upload's name, without its suffix; the ids of its images begin with it."""
MAX_FILES = 10_000
"""Most files of a request, and most entries of an archive in it."""
MAX_DEPTH = 32
"""Most folders around a file in an archive."""
INDEX_SECONDS = 20.0
"""Longest time for reading the index of an archive."""


class Upload(NamedTuple):
    """A file of a request."""

    name: str
    """The name that the client gave it."""
    content: BinaryIO


def save_uploads(files: Sequence[Upload], folder: Path, limit: int) -> list[Path]:
    """Write the files into `folder` and return their paths.

    Args:
        files: Images, or zips or tars of images.
        folder: An empty folder.
        limit: Largest size of the unpacked content of an archive in bytes.

    Raises:
        RequestRefusedError: There is no file, a file cannot be accepted, or the disk is full.
    """
    if not files:
        raise RequestRefusedError(422, "no file was sent; send images or zips of images in the field `files`")
    try:
        return [_save(file, number, folder, limit) for number, file in enumerate(files)]
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RequestRefusedError(507, "the server's disk is full; try again later") from error


def _save(file: Upload, number: int, folder: Path, limit: int) -> Path:
    """Write a file under its own name.

    A table or DICOMDIR could make the server read its own files, and is refused.
    """
    name = upload_name(file.name)
    if name.lower().endswith(TABLE_SUFFIXES) or name.upper() == "DICOMDIR":
        raise RequestRefusedError(
            415, f"{name} names files instead of containing an image; send the images themselves or a zip of them"
        )
    path = folder / name
    while path.exists():
        path = path.with_name(f"{number}-{path.name}")
    with path.open("xb") as target:
        shutil.copyfileobj(file.content, target, 1 << 20)
    if is_archive(path):
        bounds = ArchiveBounds(MAX_FILES, MAX_DEPTH, limit, INDEX_SECONDS)
        with contextlib.suppress(InputRefusedError):  # a damaged archive becomes a refused row
            check_bounds(path, bounds, name)
    return path


def upload_name(name: str) -> str:
    """Return the name of an upload as a file name: without folders and control characters, and not too long."""
    base = Path("".join(character for character in name.replace("\\", "/") if character.isprintable())).name
    stem, suffix = os.path.splitext(base)
    cut = stem[:MAX_NAME] + suffix[:16]
    while len(os.fsencode(cut)) > 200:  # a letter may take 4 bytes, and a name on disk 255
        cut = cut[1:]
    return cut or "image"


def read_uploads(paths: Sequence[Path], folder: Path) -> pd.DataFrame:
    """Return the manifest of saved uploads, as `predict` reads files.

    Raises:
        RequestRefusedError: The files cannot be read together.
    """
    try:
        with progress_bars(shown=False):
            return read_inputs([str(path) for path in paths], "dicom_folder")
    except VitmodelError as error:
        raise as_request_error(error, folder) from error


def as_request_error(error: VitmodelError, folder: Path) -> RequestRefusedError:
    """Return the answer to a request whose files cannot be scored: 422 if its files are to blame, else 500."""
    if isinstance(error, RequestRefusedError):
        return error
    status = 422 if isinstance(error, UsageError | RefusedError) else 500
    return RequestRefusedError(status, strip_path(folder, str(error)))


def tables_as_json(tables: ScoreTables, folder: Path) -> dict[str, Any]:
    """Return the tables as lists of rows, without the path of the temporary folder."""
    answer: dict[str, Any] = {}
    for level, rows in tables._asdict().items():
        answer[level] = json.loads(strip_path(folder, rows.to_json(orient="records")))
    return answer


def strip_path(folder: Path, text: str) -> str:
    """Return `text` without the path of the temporary folder, both in plain spelling and as JSON escapes it."""
    for path in {str(folder), os.path.realpath(folder)}:
        for slash in ("/", "\\/"):
            spelled = path.replace("/", slash)
            text = text.replace(f"{spelled}{slash}", "").replace(spelled, "")
    return text
