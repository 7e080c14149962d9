"""Contact sheet of the ETL report: thumbnails of selected images, with their crop boxes and crops."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd

from vitmodel.config import Preprocessing
from vitmodel.errors import ImageRefusedError
from vitmodel.jobs.parallel import parallel_map
from vitmodel.pixels.open import open_as_cropped
from vitmodel.pixels.verdict import REFUSAL_REASONS

THUMBNAIL_SIDE = 320
"""Longest side of a thumbnail in pixels: twice its size on the page, for sharp screens and print."""
BOX_COLOUR = (0, 159, 230)
"""Orange of the palette of Okabe and Ito, as blue, green, red."""
CropBox = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels of the source image."""


@dataclass(frozen=True)
class ContactSheetEntry:
    """One image of the contact sheet."""

    row: Any
    """The image's manifest row, as a named tuple."""
    source: str
    """Data URL of the source's thumbnail with the crop box drawn; empty if the source can no longer be read."""
    crop: str
    """Data URL of the crop's thumbnail; empty if the crop no longer exists."""
    problem: str
    """Why the source cannot be shown; empty if it can."""


def contact_sheet(table: pd.DataFrame, jobs: int) -> list[ContactSheetEntry]:
    """Return one entry per row of a manifest, in its order.

    Args:
        table: Manifest rows, without refused images.
        jobs: Number of threads; 0 = one per core.
    """
    return list(parallel_map(make_entry, list(table.itertuples(index=False)), "contact sheet", jobs))


def refused_thumbnails(table: pd.DataFrame, jobs: int) -> list[str]:
    """Return the data URL of a thumbnail of each refused image, or of its crop; '' where nothing can be shown.

    Args:
        table: Manifest rows of refused images.
        jobs: Number of threads; 0 = one per core.
    """
    return list(parallel_map(_refused_thumbnail, list(table.itertuples(index=False)), "refused images", jobs))


def _refused_thumbnail(row: Any) -> str:
    try:
        preprocessing = Preprocessing.from_json(row.preprocessing)
        return _data_url(source_thumbnail(Path(row.source_path), None, preprocessing))
    except Exception:  # noqa: BLE001 (a picture that was refused may fail in any way; the report goes on without it)
        crop = cv2.imread(row.path, cv2.IMREAD_GRAYSCALE) if row.path and Path(row.path).is_file() else None
        return "" if crop is None else _data_url(_shrink(crop))


def redact_message(row: Any) -> str:
    """Return an image's message with "the file" in place of its path, which may contain a patient id."""
    return "" if pd.isna(row.remark) else row.remark.replace(str(row.source_path), "the file")


def explode_codes(manifest: pd.DataFrame) -> pd.Series:
    """Return the reason codes by the manifest's index: one entry per image and code, '' for an image without a code."""
    reasons = manifest["reason"].fillna("")
    return reasons.map(lambda reason: sorted(set(reason.split(";")))).explode()


def sample_by_reason(table: pd.DataFrame, most: int) -> pd.DataFrame:
    """Return a selection of manifest rows in which frequent reasons do not displace rare ones.

    The groups of images with the same rarest reason contribute in turn, each in a random order with a fixed seed.

    Args:
        table: Manifest rows.
        most: Maximum number of rows to return.

    Returns:
        The selected rows with a new column `group`, the image's rarest reason or '' for none. They are sorted by
        group: rarest reason first, images without a reason last.
    """
    codes = explode_codes(table)
    frequency = codes.map(codes.value_counts()).where(codes != "", math.inf)
    by_code = pd.DataFrame({"group": codes, "frequency": frequency})
    rarest = by_code.sort_values(["frequency", "group"]).groupby(level=0).first()
    rows = table.join(rarest).sample(frac=1, random_state=0)
    rows["turn"] = rows.groupby("group").cumcount()
    chosen = rows.sort_values(["turn", "frequency", "group"]).head(most)
    return chosen.sort_values(["frequency", "group", "turn"]).drop(columns=["frequency", "turn"])


def make_entry(row: Any) -> ContactSheetEntry:
    """Return the contact sheet's entry for one manifest row."""
    source = ""
    problem = ""
    try:
        box = (int(row.box_x0), int(row.box_y0), int(row.box_x1), int(row.box_y1))
        preprocessing = Preprocessing.from_json(row.preprocessing)
        source = _data_url(source_thumbnail(Path(row.source_path), box, preprocessing, row.voi))
    except ImageRefusedError as refusal:
        problem = REFUSAL_REASONS[refusal.code]
    except Exception as error:  # noqa: BLE001 (no picture may cost the report)
        problem = f"{REFUSAL_REASONS['failed']} ({type(error).__name__})"
    crop = cv2.imread(row.path, cv2.IMREAD_GRAYSCALE) if Path(row.path).exists() else None
    return ContactSheetEntry(row, source, "" if crop is None else _data_url(_shrink(crop)), problem)


def source_thumbnail(
    path: Path, box: CropBox | None, preprocessing: Preprocessing, voi: str | None = None
) -> np.ndarray:
    """Return a thumbnail of an image as decoded, with its crop box drawn.

    Args:
        path: The source image.
        box: The crop box in pixels of the source; None = draw none.
        preprocessing: The settings with which the image is decoded.
        voi: The grey range that is recorded for the crop; see `open_as_cropped`.

    Returns:
        The picture, `(H, W, 3)` uint8 in the order blue, green, red; no side exceeds `THUMBNAIL_SIDE` pixels.

    Raises:
        ImageRefusedError: The image cannot be read.
    """
    file = open_as_cropped(path, preprocessing, voi)
    rows, columns = file.header.rows, file.header.columns
    level = min(file.levels, max(0, int(math.log2(max(rows, columns) / THUMBNAIL_SIDE))))
    grey = file.to_grey(_shrink(file.read_stored(level)))
    picture = cv2.cvtColor(np.rint(grey * 255).astype(np.uint8), cv2.COLOR_GRAY2BGR)
    if box is None:
        return picture
    scale_y, scale_x = picture.shape[0] / rows, picture.shape[1] / columns
    left, top, right, bottom = (round(edge * scale) for edge, scale in zip(box, (scale_x, scale_y) * 2, strict=True))
    # The line is two pixels thick and drawn inside the box, because at the chest wall the box ends with the picture.
    for inset in (0, 1):
        cv2.rectangle(picture, (left + inset, top + inset), (right - 1 - inset, bottom - 1 - inset), BOX_COLOUR)
    return picture


def _shrink(picture: np.ndarray) -> np.ndarray:
    """Return the picture reduced so that no side exceeds `THUMBNAIL_SIDE` pixels."""
    factor = min(1.0, THUMBNAIL_SIDE / max(picture.shape))
    height, width = (max(1, round(length * factor)) for length in picture.shape)
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)


def _data_url(picture: np.ndarray) -> str:
    """Return the picture as a data URL in JPEG format."""
    jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 80])[1]
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.tobytes()).decode()
