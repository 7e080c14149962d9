"""Detect which release a source is, and read it as a manifest with the release's adapter."""

from __future__ import annotations

import importlib
import logging
import os
from pathlib import Path
from typing import Protocol, cast

import pandas as pd

from vitmodel.errors import UsageError

logger = logging.getLogger(__name__)


class ReleaseAdapter(Protocol):
    """Interface of a module that reads one kind of release.

    An image that the release lists but whose file is missing keeps its row.
    """

    EXPECTED_FILES: str
    """The files by which the release is recognised, for error messages."""

    def detect(self, root: Path) -> bool:
        """Return whether `root` is a release of this kind."""

    def read(self, root: Path) -> pd.DataFrame:
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


def read_release(root: Path | str, dataset: str = "auto") -> pd.DataFrame:
    """Return the manifest of a source, with absolute paths.

    Args:
        root: A release's folder or table, a folder of images, one image, or a manifest.
        dataset: A key of `RELEASE_ADAPTERS`, or "auto" for the first adapter that recognises the source.

    Raises:
        UsageError: The source does not exist, no adapter recognises it, or its table is not valid.
    """
    root = Path(os.path.abspath(root))
    if dataset not in ("auto", *RELEASE_ADAPTERS):
        raise UsageError(f"dataset: {dataset!r} is unknown; choose auto, {', '.join(RELEASE_ADAPTERS)}")
    if not root.exists():
        raise UsageError(f"{root} does not exist; check the path")
    candidates = RELEASE_ADAPTERS if dataset == "auto" else {dataset: RELEASE_ADAPTERS[dataset]}
    name = next((name for name, adapter in candidates.items() if adapter.detect(root)), None)
    if name is None:
        expected = "".join(f"\n  {name}: {adapter.EXPECTED_FILES}" for name, adapter in candidates.items())
        raise UsageError(f"{root} contains nothing to read; it must contain one of:{expected}")
    table = RELEASE_ADAPTERS[name].read(root)
    logger.info("%s: %d images, read as %s", root, len(table), name)
    return table
