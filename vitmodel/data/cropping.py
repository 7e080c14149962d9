"""One manifest row to a crop and its provenance columns: the unit of work that ETL and prediction share. Writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitmodel.config import Preprocessing
from vitmodel.errors import ImageRefusedError, VitmodelError
from vitmodel.pixels.preprocessing import CropGeometry, PreprocessedImage, preprocess
from vitmodel.utils import sha256_file

ProvenanceRecord = dict[str, str | float | None]


@dataclass(frozen=True)
class SourceImage:
    """An image to crop: its file, and the side that the table states (L, R or '')."""

    path: Path
    laterality: str = ""


@dataclass(frozen=True)
class CropResult:
    """The manifest's provenance columns of one image and, unless it was refused, its crop (H W) and geometry."""

    record: ProvenanceRecord
    crop: np.ndarray | None = None
    geometry: CropGeometry | None = None


def crop_image(source: SourceImage, preprocessing: Preprocessing) -> CropResult:
    """Crop one image; a refusal is a record too, and so is a failure that no rule foresaw, so that one file never ends a run."""
    try:
        prepared = preprocess(source.path, preprocessing, source.laterality)
        digest = sha256_file(source.path)
    except ImageRefusedError as refusal:
        return CropResult(refusal_record(source, preprocessing, refusal.code, refusal.message))
    except VitmodelError:
        raise
    except Exception as error:  # noqa: BLE001 (the bulkhead between one file and the run: the error becomes the file's verdict)
        return CropResult(refusal_record(source, preprocessing, "failed", f"{type(error).__name__}: {error}"))
    record = base_record(source, preprocessing) | {"source_sha256": digest} | crop_record(prepared)
    return CropResult(record, prepared.crop, prepared.geometry)


def base_record(source: SourceImage, preprocessing: Preprocessing) -> ProvenanceRecord:
    """The columns that every image has, refused or not."""
    return {"source_path": str(source.path), "preprocessing": preprocessing.to_json()}


def refusal_record(source: SourceImage, preprocessing: Preprocessing, code: str, message: str) -> ProvenanceRecord:
    """The provenance columns of an image that is not used: a code of `verdict.REFUSAL_REASONS` and what happened."""
    return base_record(source, preprocessing) | {"status": "refused", "reason": code, "remark": message}


def crop_record(prepared: PreprocessedImage) -> ProvenanceRecord:
    """The provenance columns of a crop."""
    header, geometry = prepared.header, prepared.geometry
    spacing = header.spacing or (None, None)
    return {
        "status": "warned" if prepared.warnings else "ok",
        "reason": ";".join(dict.fromkeys(warning.code for warning in prepared.warnings)) or None,
        "remark": "; ".join(warning.message for warning in prepared.warnings) or None,
        **dict(zip(("box_x0", "box_y0", "box_x1", "box_y1"), geometry.box, strict=True)),
        "source_height": header.rows,
        "source_width": header.columns,
        "spacing_row": spacing[0],
        "spacing_column": spacing[1],
        "flipped": int(geometry.flipped),
        "chest_wall_side": prepared.breast.chest_wall,
        "photometric": header.photometric,
        "transfer_syntax": header.transfer_syntax,
        "voi": header.voi,
        "decoder": prepared.decoder,
        "decode_level": prepared.decode_level,
    }
