"""Find the files that a table names, although its folders may have moved or come from another operating system."""

from __future__ import annotations

import logging
import ntpath
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from vitmodel.archives import path_on_disk, path_to_text, source_exists
from vitmodel.releases.source import Source

logger = logging.getLogger(__name__)


def resolve_own_paths(values: pd.Series, source: Source, table: Path) -> pd.Series:
    """Return the absolute paths of a table's files.

    A path is relative to `source.image_folder`, which is the table's folder unless the user states another. A file that
    is not there is searched by its tail, the last parts of its path, below that folder.

    Args:
        values: Cells of the column, NaN if empty.
        source: The source that the table belongs to.
        table: The table, for messages.
    """
    folder = str(source.image_folder if source.given_images else table.parent)
    names = values.map(lambda value: _with_slashes(str(value).strip(), folder), na_action="ignore")
    paths = names.map(lambda name: os.path.normpath(os.path.join(folder, name)), na_action="ignore")
    is_missing = paths.notna() & ~paths.isin(_existing(paths.dropna()))
    missing = names.index[
        is_missing | names.map(lambda name: isinstance(name, str) and bool(ntpath.splitdrive(name)[0]))
    ]
    if missing.empty:
        return paths
    tails = _files_by_name(source.images_of_table)
    found = {row: match for row in missing if (match := _find_by_tail(names[row], tails)) is not None}
    if found:
        logger.info("%s: %d files were found below %s by the last parts of their paths", table, len(found), folder)
    lost = [row for row in missing if row not in found]
    if lost:
        logger.warning(
            "%s: %d of %d files do not exist, for example %s; if they are in another folder, pass --images FOLDER",
            table,
            len(lost),
            len(paths),
            paths[lost[0]],
        )
    return paths.where(~paths.index.isin(list(found)), paths.index.map(found).astype(object))


def _with_slashes(name: str, folder: str) -> str:
    r"""Return a path of any operating system with slashes; `\xNN` stays in the name of a file that is not UTF-8."""
    if "\\x" in name and source_exists(os.path.join(folder, name)):
        return name
    return name.replace("\\", "/")


def _existing(paths: Iterable[str]) -> set[str]:
    """Return the paths that exist, by listing each folder once."""
    paths = set(paths)
    existing: set[str] = set()
    for folder in {os.path.dirname(path) for path in paths}:
        try:
            existing |= {os.path.join(folder, path_to_text(name)) for name in os.listdir(path_on_disk(folder))}
        except OSError:  # the folder does not exist
            continue
    return paths & existing


def _files_by_name(files: Iterable[str]) -> dict[str, list[list[str]]]:
    """Return the files, each as the list of its parts from the last to the first, by their names in lower case."""
    by_name: dict[str, list[list[str]]] = {}
    for file in files:
        by_name.setdefault(os.path.basename(file).lower(), []).append(file.split(os.sep)[::-1])
    return by_name


def _find_by_tail(name: str, files: dict[str, list[list[str]]]) -> str | None:
    """Return the one file that shares the most last parts with `name`, or None if there is none or several."""
    parts = [part.lower() for part in name.split("/")][::-1]
    candidates = files.get(parts[0], [])
    shared = [_count_shared(parts, candidate) for candidate in candidates]
    if not shared or shared.count(max(shared)) > 1:
        return None
    return os.sep.join(candidates[int(np.argmax(shared))][::-1])


def _count_shared(parts: list[str], candidate: list[str]) -> int:
    """Return the number of first elements that two lists share, in any case."""
    count = 0
    for part, other in zip(parts, candidate, strict=False):
        if part != other.lower():
            break
        count += 1
    return count
