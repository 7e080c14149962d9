"""Manifest rows as typed objects for scoring, and their crops: those made by ETL, or new ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import cv2
import pandas as pd

from vitmodel.config import Preprocessing, Size
from vitmodel.data.cropping import CropResult, ProvenanceRecord, SourceImage, crop_image
from vitmodel.data.dataset import read_crop
from vitmodel.errors import VitmodelError
from vitmodel.pixels.picture_range import GreyRange
from vitmodel.pixels.preprocessing import CropGeometry


class ManifestRow(NamedTuple):
    """The columns of a manifest's row that scoring needs; None = unknown."""

    path: str
    source_path: str | None
    source_sha256: str | None
    laterality: str
    status: str | None
    reason: str | None
    remark: str | None
    preprocessing: str | None
    voi: str | None
    box_x0: float | None
    box_y0: float | None
    box_x1: float | None
    box_y1: float | None
    flipped: float | None
    source_height: float | None
    source_width: float | None
    spacing_row: float | None

    @property
    def source_file(self) -> Path:
        """The original image, not its crop."""
        return Path(self.source_path or self.path)

    @property
    def picture_range(self) -> str:
        """The grey range LOW:HIGH that is recorded for the picture; '' if there is none."""
        return self.voi if self.voi and GreyRange.parse(self.voi) else ""

    def geometry(self, canvas: Size) -> CropGeometry | None:
        """Return the position of the crop, of size `canvas`, in its source, or None if it is unknown."""
        if self.box_x0 is None or self.box_y0 is None or self.box_x1 is None or self.box_y1 is None:
            return None
        box = (int(self.box_x0), int(self.box_y0), int(self.box_x1), int(self.box_y1))
        return CropGeometry(box, bool(self.flipped), canvas)


def to_manifest_rows(table: pd.DataFrame) -> list[ManifestRow]:
    """Return the rows of a manifest; unknown values are None."""
    columns = table[list(ManifestRow._fields)].astype(object).where(table.notna(), None)
    return [ManifestRow(*values) for values in columns.itertuples(index=False)]


def load_crop(row: ManifestRow, preprocessing: Preprocessing) -> CropResult:
    """Return the crop of a manifest row.

    This is the crop made by ETL if its preprocessing is the same. If there is none or it cannot be read, a new one is
    made from the source. A row that was refused before any crop was made stays refused.
    """
    cv2.setNumThreads(1)
    record: ProvenanceRecord = {
        "status": row.status,
        "reason": row.reason,
        "remark": row.remark,
        "source_sha256": row.source_sha256,
    }
    if row.status == "refused" and row.preprocessing in (None, preprocessing.to_json()):
        return CropResult(record)
    # A crop that passed the check of plausibility is also valid without the check.
    valid = {preprocessing.to_json(), replace(preprocessing, implausible="refuse").to_json()}
    try:
        crop = read_crop(row.path) if row.preprocessing in valid else None
    except VitmodelError:  # the crop is lost: make it again from the source
        crop = None
    if crop is None:
        return crop_image(SourceImage(row.source_file, row.laterality, row.picture_range), preprocessing)
    for column in ("source_height", "source_width", "spacing_row", "box_x0", "box_y0", "box_x1", "box_y1"):
        record[column] = getattr(row, column)
    return CropResult(record, crop, row.geometry(Size(*crop.shape)))


def mm_per_pixel(spacing_row: str | float | None, geometry: CropGeometry | None) -> float:
    """Return the side of a crop's pixel in mm; NaN if the source's spacing or the crop's position in it is unknown."""
    return float("nan") if spacing_row is None or geometry is None else float(spacing_row) / geometry.scale
