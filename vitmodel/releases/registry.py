"""Detect which release a source is, and read it as a manifest with the release's adapter."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, cast

import pandas as pd

from vitmodel.archives import check_readable, is_archive, open_archive, source_exists
from vitmodel.errors import InputRefusedError, UsageError
from vitmodel.releases.source import Source

logger = logging.getLogger(__name__)


class ReleaseAdapter(Protocol):
    """Interface of a module that reads one kind of release.

    An image that the release lists but whose file is missing keeps its row.
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
    "inbreast": adapter("inbreast"),
    "cmmd": adapter("cmmd"),
    "mias": adapter("mias"),
    "rsna": adapter("rsna"),
    "listing": adapter("custom_table"),
    "class_folders": adapter("class_folders"),
    "dicom_folder": adapter("dicom_folder"),
}
"""Adapters by their value of `--dataset`. `detect` is called in this order, so the most specific comes first."""
WITHOUT_TABLE = ("class_folders", "dicom_folder")
"""Adapters that read images without a table."""


def read_release(root: Path | str, dataset: str = "auto") -> pd.DataFrame:
    """Return the manifest of a source, with absolute paths.

    Args:
        root: A release's folder or table, a folder of images, a zip or tar of either, one image, or a manifest.
        dataset: A key of `RELEASE_ADAPTERS`, or "auto" for the first adapter that recognises the source.

    Raises:
        UsageError: The source does not exist, no adapter recognises it, or its table is not valid.
    """
    root = Path(os.path.abspath(root))
    if dataset not in ("auto", *RELEASE_ADAPTERS):
        raise UsageError(f"dataset: {dataset!r} is unknown; choose auto, {', '.join(RELEASE_ADAPTERS)}")
    try:
        check_readable(root)
        if not source_exists(root):
            raise UsageError(f"{root} does not exist; check the path")
        if is_archive(root):
            for note in open_archive(root).notes:
                logger.warning("%s: %s", root, note)
    except InputRefusedError as refusal:
        raise UsageError(refusal.message) from refusal
    candidates = RELEASE_ADAPTERS if dataset == "auto" else {dataset: RELEASE_ADAPTERS[dataset]}
    source = Source(root)
    name = detect_release(source, candidates)
    if name is None or (dataset == "auto" and name in WITHOUT_TABLE):
        with_neighbours = _read_with_neighbours(Source(root, with_neighbours=True), candidates)
        if with_neighbours is not None:
            return with_neighbours
    if name is None:
        expected = "".join(f"\n  {name}: {adapter.EXPECTED_FILES}" for name, adapter in candidates.items())
        raise UsageError(f"{root} contains nothing to read; it must contain one of:{expected}")
    table = RELEASE_ADAPTERS[name].read(source)
    logger.info("%s: %d images, read as %s", root, len(table), name)
    return table


def detect_release(source: Source, candidates: Iterable[str]) -> str | None:
    """Return the first of `candidates` whose adapter recognises the source."""
    return next((name for name in candidates if RELEASE_ADAPTERS[name].detect(source)), None)


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
