"""A manifest's row as far as scoring needs it, and its crop: the one that ETL made, or a new one. Knows no model and no label."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import cv2
import pandas as pd

from vitmodel.config import Preprocessing, Size
from vitmodel.data.cropping import Cropped, Record, Source, crop_source
from vitmodel.data.dataset import read_crop
from vitmodel.pixels.preprocessing import Geometry


class Row(NamedTuple):
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

    @property
    def source(self) -> Path:
        """The image as it came, not its crop."""
        return Path(self.source_path or self.path)


def rows_of(table: pd.DataFrame) -> list[Row]:
    """The rows of a manifest; what is not known is None."""
    return [Row(*values) for values in table[list(Row._fields)].astype(object).where(table.notna(), None).itertuples(index=False)]


def load_crop(row: Row, preprocessing: Preprocessing) -> Cropped:
    """The crop of a manifest row: the one that ETL made in just this way, or a new one from the source.

    A row that is refused before any crop was made stays so.
    """
    cv2.setNumThreads(1)
    known: Record = {"status": row.status, "reason": row.reason, "remark": row.remark, "source_sha256": row.source_sha256}
    if row.status == "refused" and row.preprocessing in (None, preprocessing.to_json()):
        return Cropped(known)
    if row.preprocessing != preprocessing.to_json():
        return crop_source(Source(row.source, row.laterality), preprocessing)
    crop = read_crop(row.path)
    geometry = None
    if row.box_x0 is not None and row.box_y0 is not None and row.box_x1 is not None and row.box_y1 is not None:
        box = (int(row.box_x0), int(row.box_y0), int(row.box_x1), int(row.box_y1))
        geometry = Geometry(box, bool(row.flipped), Size(*crop.shape))
    return Cropped(known | {"source_height": row.source_height, "source_width": row.source_width}, crop, geometry)
