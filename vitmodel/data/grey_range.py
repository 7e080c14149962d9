"""Find the grey range that the 16-bit pictures of a release or folder have in common; see `pixels.picture_range`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from vitmodel.config import Preprocessing
from vitmodel.jobs.parallel import parallel_map
from vitmodel.pixels.picture_range import GreyRange, common_bits, range_of_bits, significant_bits
from vitmodel.pixels.raster import RasterFile

SUFFIXES = (".png", ".tif", ".tiff", ".jp2", ".pgm")
"""Suffixes of the pictures that can have 16 bits per pixel; other files are not opened to find out."""


def measure_bits(path: Path) -> int:
    """Return the significant bits of a 16-bit picture; 0 if the file is something else or cannot be read."""
    try:
        file = RasterFile(path, "full")
        if not file.needs_bits:
            return 0
        return significant_bits(file.maximum)
    except Exception:  # noqa: BLE001 (it is reported when the image is cropped)
        return 0


def measure_all_bits(
    paths: Sequence[Path], known: Sequence[int | None], jobs: int = 0, backend: str = "threads", scheduler: str = ""
) -> list[int]:
    """Return the significant bits of several files, 0 for those that are no 16-bit pictures.

    Args:
        paths: The files.
        known: The result for each file, None if it has to be measured.
        jobs: Number of workers; 0 = one per core.
        backend: Kind of workers, see `jobs.parallel.parallel_map`.
        scheduler: Address of the dask scheduler.
    """
    bits = [0 if path.suffix.lower() not in SUFFIXES else number for path, number in zip(paths, known, strict=True)]
    todo = [position for position, number in enumerate(bits) if number is None]
    measured = parallel_map(
        measure_bits, [paths[position] for position in todo], "grey range", jobs, backend, scheduler, on_lost=_no_bits
    )
    for position, number in zip(todo, measured, strict=True):
        bits[position] = number
    return [number or 0 for number in bits]


def _no_bits(path: Path, message: str) -> int:
    """Return the result for a file whose worker process died or hung; it is reported when the image is cropped."""
    return 0


def shared_ranges(bits: Sequence[int]) -> list[str]:
    """Return LOW:HIGH for each of several files with these significant bits; '' for those that have none."""
    pictures = [position for position, number in enumerate(bits) if number]
    ranges = [""] * len(bits)
    for position, number in zip(pictures, common_bits([bits[position] for position in pictures]), strict=True):
        ranges[position] = str(range_of_bits(number))
    return ranges


def add_shared_ranges(table: pd.DataFrame, preprocessing: Preprocessing, jobs: int = 0) -> pd.DataFrame:
    """Return a manifest whose column `voi` has the common range of the pictures that have to be cropped again.

    A range that ETL has recorded is kept. A single picture is left out: its own range is found when it is cropped.

    Args:
        table: The manifest.
        preprocessing: The preprocessing of the model; crops made with another one are not used.
        jobs: Number of workers; 0 = one per core.
    """
    if preprocessing.picture_range != "auto":
        return table
    sources = table["source_path"].where(table["source_path"].notna(), table["path"]).fillna("").astype(str)
    recorded = table["voi"].map(lambda name: isinstance(name, str) and GreyRange.parse(name) is not None)
    is_picture = sources.str.lower().str.endswith(SUFFIXES)
    open_rows = table[(table["preprocessing"] != preprocessing.to_json()) & ~recorded.astype(bool) & is_picture].index
    if len(open_rows) < 2:
        return table
    bits = measure_all_bits([Path(path) for path in sources[open_rows]], [None] * len(open_rows), jobs)
    ranges = pd.Series(shared_ranges(bits), index=open_rows)
    return table.assign(voi=ranges.where(ranges != "").combine_first(table["voi"]))
