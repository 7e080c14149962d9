"""The images most worth a look, each with its crop box drawn and its crop beside it, small. Knows the manifest, not the page."""

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
from vitmodel.pixels.open import open_image
from vitmodel.pixels.verdict import REFUSAL_REASONS

THUMBNAIL_SIDE = 320  # longest side of a thumbnail in pixels: twice what the page shows, for sharp screens and print
BOX_COLOUR = (0, 159, 230)  # orange (Okabe and Ito) as blue, green, red
CropBox = tuple[int, int, int, int]


@dataclass(frozen=True)
class ContactSheetEntry:
    """One image of the contact sheet."""

    row: Any
    """Its row of the manifest, as a named tuple."""
    source: str
    """Address that holds the source's thumbnail with the crop box drawn; '' where the source cannot be read any more."""
    crop: str
    """Address that holds the crop's thumbnail; '' where the crop is gone."""
    problem: str
    """Why the source cannot be shown."""


def contact_sheet(table: pd.DataFrame, jobs: int) -> list[ContactSheetEntry]:
    """A card per row of `table` (a manifest without refused images), in its order, made by `jobs` threads (0 = one per core)."""
    return list(parallel_map(make_entry, list(table.itertuples(index=False)), "contact sheet", jobs))


def explode_codes(manifest: pd.DataFrame) -> pd.Series:
    """The reasons' codes, '' for an image without one; an image stands once for each of its codes, by the manifest's index."""
    return manifest["reason"].fillna("").map(lambda reason: sorted(set(reason.split(";")))).explode()


def sample_by_reason(table: pd.DataFrame, most: int) -> pd.DataFrame:
    """At most `most` rows of a manifest, grouped by the new column `group`, doubtful ones first.

    `group` is the image's rarest reason, or '' where it has none. The groups take turns, each in a random but fixed order, so that no
    frequent reason hides a rare one; the rarest comes first, and images without a reason come last.
    """
    codes = explode_codes(table)
    doubts = pd.DataFrame({"group": codes, "frequency": codes.map(codes.value_counts()).where(codes != "", math.inf)})
    rarest = doubts.sort_values(["frequency", "group"]).groupby(level=0).first()
    rows = table.join(rarest).sample(frac=1, random_state=0)
    rows["turn"] = rows.groupby("group").cumcount()
    chosen = rows.sort_values(["turn", "frequency", "group"]).head(most)
    return chosen.sort_values(["frequency", "group", "turn"]).drop(columns=["frequency", "turn"])


def make_entry(row: Any) -> ContactSheetEntry:
    """The thumbnails of one row of the manifest."""
    source, problem = "", ""
    try:
        box = (int(row.box_x0), int(row.box_y0), int(row.box_x1), int(row.box_y1))
        source = _inline(source_thumbnail(Path(row.source_path), box, Preprocessing.from_json(row.preprocessing)))
    except ImageRefusedError as refusal:
        problem = REFUSAL_REASONS[refusal.code]
    crop = cv2.imread(row.path, cv2.IMREAD_GRAYSCALE) if Path(row.path).exists() else None
    return ContactSheetEntry(row, source, "" if crop is None else _inline(_shrink(crop)), problem)


def source_thumbnail(path: Path, box: CropBox, preprocessing: Preprocessing) -> np.ndarray:
    """The image at `path` as decoded, H W 3 (blue, green, red), at most SIDE pixels long, with `box` (x0, y0, x1, y1 in its pixels) drawn.

    Raises ImageRefusedError.
    """
    file = open_image(path, preprocessing.voi, preprocessing.for_processing)
    rows, columns = file.header.rows, file.header.columns
    level = min(file.levels, max(0, int(math.log2(max(rows, columns) / THUMBNAIL_SIDE))))
    grey = file.to_grey(_shrink(file.read_stored(level)))
    picture = cv2.cvtColor(np.rint(grey * 255).astype(np.uint8), cv2.COLOR_GRAY2BGR)
    scale_y, scale_x = picture.shape[0] / rows, picture.shape[1] / columns
    left, top, right, bottom = (round(edge * scale) for edge, scale in zip(box, (scale_x, scale_y) * 2, strict=True))
    for inset in (0, 1):  # two pixels thick, and inside the box: at the chest wall its edge is the picture's
        cv2.rectangle(picture, (left + inset, top + inset), (right - 1 - inset, bottom - 1 - inset), BOX_COLOUR)
    return picture


def _shrink(picture: np.ndarray) -> np.ndarray:
    """`picture` at most SIDE pixels long."""
    factor = min(1.0, THUMBNAIL_SIDE / max(picture.shape))
    height, width = (max(1, round(length * factor)) for length in picture.shape)
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)


def _inline(picture: np.ndarray) -> str:
    """An image's address that holds the image."""
    jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 80])[1]
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.tobytes()).decode()
