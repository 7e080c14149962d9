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


class Adapter(Protocol):
    """A module that reads one kind of release. `read` raises UsageError; a listed image that is not there stays a row."""

    LOOKS_FOR: str

    def detect(self, source: Path) -> bool: ...

    def read(self, source: Path) -> pd.DataFrame: ...


def adapter(module: str) -> Adapter:
    """Return the adapter in the file `module`.py beside this one."""
    return cast(Adapter, importlib.import_module(f"{__package__}.{module}"))


ADAPTERS: dict[str, Adapter] = {
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


def read_release(source: Path | str, dataset: str = "auto") -> pd.DataFrame:
    """The manifest of `source`: a release's folder or table, a folder of images, one image, or a manifest; paths are absolute.

    Raises UsageError where nothing is there, nothing is recognised, or the table is at fault.
    """
    source = Path(os.path.abspath(source))
    if dataset not in ("auto", *ADAPTERS):
        raise UsageError(f"dataset: {dataset!r} is unknown; choose auto, {', '.join(ADAPTERS)}")
    if not source.exists():
        raise UsageError(f"{source} does not exist")
    wanted = ADAPTERS if dataset == "auto" else {dataset: ADAPTERS[dataset]}
    name = next((name for name, adapter in wanted.items() if adapter.detect(source)), None)
    if name is None:
        looked_for = "".join(f"\n  {name}: {adapter.LOOKS_FOR}" for name, adapter in wanted.items())
        raise UsageError(f"{source} holds nothing to read; looked for{looked_for}")
    table = ADAPTERS[name].read(source)
    logger.info("%s: %d images, read as %s", source, len(table), name)
    return table
