"""Detect which release a source is, and read it as a manifest with the release's adapter."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, cast

import pandas as pd

from vitmodel.archives import check_readable, is_archive, open_archive, source_exists
from vitmodel.errors import InputRefusedError, UsageError
from vitmodel.releases.missing_tables import MissingTable
from vitmodel.releases.source import Source

logger = logging.getLogger(__name__)


class ReleaseAdapter(Protocol):
    """Interface of a module that reads one kind of release.

    An image that the release lists but whose file is missing keeps its row. A module may also have a constant
    `MISSING_TABLE`, which recognises the release by its images if no table was found, and names the missing table.
    """

    EXPECTED_FILES: str
    """The files by which the release is recognised, for error messages."""

    def detect(self, source: Source) -> bool:
        """Return whether `source` is a release of this kind, by its tables' names and headers and its files' names."""

    def read(self, source: Source) -> pd.DataFrame:
        """Return the release as a manifest; raise UsageError if a table is missing or not valid."""


def adapter(module: str) -> ReleaseAdapter:
    """Return the adapter in the file `module`.py of this package."""
    return cast(ReleaseAdapter, importlib.import_module(f"{__package__}.{module}"))


RELEASE_ADAPTERS: dict[str, ReleaseAdapter] = {
    "vindr": adapter("vindr"),
    "cbis_ddsm": adapter("cbis_ddsm"),
    "mini_ddsm": adapter("mini_ddsm"),
    "cdd_cesm": adapter("cdd_cesm"),
    "csaw_cc": adapter("csaw_cc"),
    "ddsm": adapter("ddsm"),
    "inbreast": adapter("inbreast"),
    "tompei_cmmd": adapter("tompei_cmmd"),
    "cmmd": adapter("cmmd"),
    "embed": adapter("embed"),
    "mias": adapter("mias"),
    "rsna": adapter("rsna"),
    "listing": adapter("custom_table"),
    "class_folders": adapter("class_folders"),
    "dicom_folder": adapter("dicom_folder"),
}
"""Adapters by their value of `--dataset`. `detect` is called in this order, so the most specific comes first."""
WITHOUT_TABLE = ("class_folders", "dicom_folder")
"""Adapters that read images without a table."""


def read_release(
    root: Path | str | Source,
    dataset: str = "auto",
    images: Path | None = None,
    columns: Mapping[str, str] = MappingProxyType({}),
) -> pd.DataFrame:
    """Return the manifest of a source, with absolute paths.

    Args:
        root: A release's folder or table, a folder of images, a zip or tar of either, one image, or a manifest; a
            `Source` is not listed again.
        dataset: A key of `RELEASE_ADAPTERS`, or "auto" for the first adapter that recognises the source.
        images: Folder of the images that the user's own table lists; None = the table's folder. Not for a `Source`.
        columns: Column of the manifest -> column of the user's own table. Not for a `Source`.

    Raises:
        UsageError: The source does not exist, no adapter recognises it, or its table is not valid.
    """
    source = root if isinstance(root, Source) else Source(root, images=images, columns=columns)
    root = source.root
    if dataset not in ("auto", *RELEASE_ADAPTERS):
        raise UsageError(f"dataset: {dataset!r} is unknown; choose auto, {', '.join(RELEASE_ADAPTERS)}")
    try:
        check_readable(root)
        if not source_exists(root):
            raise UsageError(f"{root} does not exist; check the path")
        if not (source.is_folder or source.is_file):
            raise UsageError(f"{root} is a pipe, a socket or a device; pass a regular file or a folder")
        if is_archive(root):
            for note in open_archive(root).notes:
                logger.warning("%s: %s", root, note)
    except InputRefusedError as refusal:
        raise UsageError(refusal.message) from refusal
    candidates = RELEASE_ADAPTERS if dataset == "auto" else {dataset: RELEASE_ADAPTERS[dataset]}
    if (source.given_images or source.columns) and dataset == "auto":
        candidates = {"listing": RELEASE_ADAPTERS["listing"]}
    name = detect_release(source, candidates)
    if name is None or (dataset == "auto" and name in WITHOUT_TABLE):
        with_neighbours = _read_with_neighbours(source.near(), candidates)
        if with_neighbours is not None:
            return with_neighbours
        name = _detect_by_images(source, candidates) or name
    if name is None:
        expected = "".join(f"\n  {name}: {adapter.EXPECTED_FILES}" for name, adapter in candidates.items())
        raise UsageError(f"{root} contains nothing to read; it must contain one of:{expected}")
    if name in WITHOUT_TABLE:
        _warn_of_missing_table(source)
    table = RELEASE_ADAPTERS[name].read(source)
    logger.info("%s: %d images, read as %s", root, len(table), name)
    return table


def detect_release(source: Source, candidates: Iterable[str]) -> str | None:
    """Return the first of `candidates` whose adapter recognises the source."""
    return next((name for name in candidates if RELEASE_ADAPTERS[name].detect(source)), None)


def _detect_by_images(source: Source, candidates: Iterable[str]) -> str | None:
    """Return the first of `candidates` whose adapter recognises the images of the source, which has no table."""
    tables = _missing_tables(candidates)
    return next((name for name, table in tables.items() if table.reads_names and table.has_images_in(source)), None)


def _warn_of_missing_table(source: Source) -> None:
    """Warn if the images, which are read without a table, are those of a release whose table was not found."""
    for table in _missing_tables(RELEASE_ADAPTERS).values():
        if not table.reads_names and table.has_images_in(source):
            table.warn(source)


def _missing_tables(names: Iterable[str]) -> dict[str, MissingTable]:
    tables = {name: getattr(RELEASE_ADAPTERS[name], "MISSING_TABLE", None) for name in names}
    return {name: table for name, table in tables.items() if table is not None}


def _read_with_neighbours(source: Source, candidates: Iterable[str]) -> pd.DataFrame | None:
    """Return the manifest by a table above or next to a folder of images, or None if no table lists these images."""
    if not source.is_folder or not source.images:
        return None
    name = detect_release(source, [name for name in candidates if name not in WITHOUT_TABLE])
    if name is None:
        return None
    try:
        table = RELEASE_ADAPTERS[name].read(source)
    except UsageError as error:
        logger.warning("%s: a table near this folder was not read: %s", source.root, error)
        return None
    if not table.path.isin(source.images).any():
        return None
    logger.info("%s: %d images, read as %s with a table near this folder", source.root, len(table), name)
    return table
