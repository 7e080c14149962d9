"""Turn one manifest row into a crop and its provenance columns: the unit of work that ETL and prediction share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitmodel.archives import sha256_source
from vitmodel.config import Preprocessing
from vitmodel.errors import ImageRefusedError, VitmodelError
from vitmodel.pixels.preprocessing import CropGeometry, PreprocessedImage, preprocess
from vitmodel.utils import describe_failure

ProvenanceRecord = dict[str, str | float | None]


@dataclass(frozen=True)
class SourceImage:
    """An image to crop.

    Attributes:
        path: The file.
        laterality: The side that the table states: L, R or '' (unknown).
        picture_range: LOW:HIGH, if the file is one of several pictures with the same grey range.
    """

    path: Path
    laterality: str = ""
    picture_range: str = ""


@dataclass(frozen=True)
class CropResult:
    """The manifest's provenance columns of one image and, unless it was refused, its crop `(H, W)` and geometry."""

    record: ProvenanceRecord
    crop: np.ndarray | None = None
    geometry: CropGeometry | None = None


def crop_image(source: SourceImage, preprocessing: Preprocessing) -> CropResult:
    """Crop one image.

    A refused image gives a record with status refused. So does any unexpected exception (reason "failed"), so that one
    file never ends a run.

    Raises:
        VitmodelError: A failure that concerns the whole run, not this image.
    """
    try:
        prepared = preprocess(source.path, preprocessing, source.laterality, source.picture_range)
        digest = sha256_source(source.path)
    except ImageRefusedError as refusal:
        return CropResult(refusal_record(source, preprocessing, refusal.code, refusal.message))
    except VitmodelError:
        raise
    except Exception as error:  # noqa: BLE001 (an unexpected error in one file must not end the run)
        return CropResult(refusal_record(source, preprocessing, "failed", describe_failure(error)))
    record = base_record(source, preprocessing) | {"source_sha256": digest} | crop_record(prepared)
    return CropResult(record, prepared.crop, prepared.geometry)


def base_record(source: SourceImage, preprocessing: Preprocessing) -> ProvenanceRecord:
    """Return the provenance columns that every image has, refused or not."""
    return {"source_path": str(source.path), "preprocessing": preprocessing.to_json()}


def refusal_record(source: SourceImage, preprocessing: Preprocessing, code: str, message: str) -> ProvenanceRecord:
    """Return the provenance columns of a refused image.

    Args:
        source: The image.
        preprocessing: How it was to be cropped.
        code: A key of `pixels.verdict.REFUSAL_REASONS`.
        message: The cause in this particular image.
    """
    return base_record(source, preprocessing) | {"status": "refused", "reason": code, "remark": message}


def crop_record(prepared: PreprocessedImage) -> ProvenanceRecord:
    """Return the provenance columns of a crop."""
    header = prepared.header
    geometry = prepared.geometry
    spacing_row, spacing_column = header.spacing or (None, None)
    return {
        "status": "warned" if prepared.warnings else "ok",
        "reason": ";".join(dict.fromkeys(warning.code for warning in prepared.warnings)) or None,
        "remark": "; ".join(warning.message for warning in prepared.warnings) or None,
        **dict(zip(("box_x0", "box_y0", "box_x1", "box_y1"), geometry.box, strict=True)),
        "source_height": header.rows,
        "source_width": header.columns,
        "spacing_row": spacing_row,
        "spacing_column": spacing_column,
        "flipped": int(geometry.flipped),
        "chest_wall_side": prepared.breast.chest_wall,
        "photometric": header.photometric,
        "transfer_syntax": header.transfer_syntax,
        "voi": header.voi,
        "decoder": prepared.decoder,
        "decode_level": prepared.decode_level,
    }
