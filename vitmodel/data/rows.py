"""A manifest's row as far as scoring needs it, and its crop: the one that ETL made, or a new one. Knows no model and no label."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import cv2
import pandas as pd

from vitmodel.config import Preprocessing, Size
from vitmodel.data.cropping import CropResult, ProvenanceRecord, SourceImage, crop_image
from vitmodel.data.dataset import read_crop
from vitmodel.errors import VitmodelError
from vitmodel.pixels.preprocessing import CropGeometry


class ManifestRow(NamedTuple):
    """What the manifest says of an image; None = unknown."""

    path: str
    source_path: str | None
    source_sha256: str | None
    laterality: str
    status: str | None
    reason: str | None
    remark: str | None
    preprocessing: str | None
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
        """The image as it came, not its crop."""
        return Path(self.source_path or self.path)

    def geometry(self, canvas: Size) -> CropGeometry | None:
        """Where the crop, of size `canvas`, lies in its source, if that is known."""
        if self.box_x0 is None or self.box_y0 is None or self.box_x1 is None or self.box_y1 is None:
            return None
        return CropGeometry(
            (int(self.box_x0), int(self.box_y0), int(self.box_x1), int(self.box_y1)), bool(self.flipped), canvas
        )


def to_manifest_rows(table: pd.DataFrame) -> list[ManifestRow]:
    """The rows of a manifest; what is not known is None."""
    return [
        ManifestRow(*values)
        for values in table[list(ManifestRow._fields)].astype(object).where(table.notna(), None).itertuples(index=False)
    ]


def load_crop(row: ManifestRow, preprocessing: Preprocessing) -> CropResult:
    """The crop of a manifest row: the one that ETL made in just this way or, where there is none or it cannot be read, a new one from
    the source. A row that is refused before any crop was made stays so.
    """
    cv2.setNumThreads(1)
    known: ProvenanceRecord = {
        "status": row.status,
        "reason": row.reason,
        "remark": row.remark,
        "source_sha256": row.source_sha256,
    }
    if row.status == "refused" and row.preprocessing in (None, preprocessing.to_json()):
        return CropResult(known)
    try:
        crop = read_crop(row.path) if row.preprocessing == preprocessing.to_json() else None
    except VitmodelError:  # the source's verdict takes the place of the crop that is lost
        crop = None
    if crop is None:
        return crop_image(SourceImage(row.source_file, row.laterality), preprocessing)
    known |= {"source_height": row.source_height, "source_width": row.source_width, "spacing_row": row.spacing_row}
    return CropResult(known, crop, row.geometry(Size(*crop.shape)))


def mm_per_pixel(spacing_row: str | float | None, geometry: CropGeometry | None) -> float:
    """Side of a crop's pixel in mm; NaN where its source's spacing or its place there is unknown."""
    return float("nan") if spacing_row is None or geometry is None else float(spacing_row) / geometry.scale
