"""The one road from a source to a manifest: tells which release lies there and lets its adapter read it."""

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
    """A module that reads one kind of release. `read` raises UsageError; a listed image that is not there stays a row."""

    EXPECTED_FILES: str

    def detect(self, root: Path) -> bool: ...

    def read(self, root: Path) -> pd.DataFrame: ...


def adapter(module: str) -> ReleaseAdapter:
    """Return the adapter in the file `module`.py beside this one."""
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
"""Adapters by the name that `--dataset` takes. `detect` is called in this order, so the most specific release comes first."""


def read_release(root: Path | str, dataset: str = "auto") -> pd.DataFrame:
    """The manifest of `source`: a release's folder or table, a folder of images, one image, or a manifest; paths are absolute.

    Raises UsageError where nothing is there, nothing is recognised, or the table is at fault.
    """
    root = Path(os.path.abspath(root))
    if dataset not in ("auto", *RELEASE_ADAPTERS):
        raise UsageError(f"dataset: {dataset!r} is unknown; choose auto, {', '.join(RELEASE_ADAPTERS)}")
    if not root.exists():
        raise UsageError(f"{root} does not exist")
    wanted = RELEASE_ADAPTERS if dataset == "auto" else {dataset: RELEASE_ADAPTERS[dataset]}
    name = next((name for name, adapter in wanted.items() if adapter.detect(root)), None)
    if name is None:
        looked_for = "".join(f"\n  {name}: {adapter.EXPECTED_FILES}" for name, adapter in wanted.items())
        raise UsageError(f"{root} holds nothing to read; looked for{looked_for}")
    table = RELEASE_ADAPTERS[name].read(root)
    logger.info("%s: %d images, read as %s", root, len(table), name)
    return table
