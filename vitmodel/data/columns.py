"""The columns of the manifest: their kinds, roles, meanings and allowed values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ManifestColumn:
    """A column of the manifest.

    Args:
        name: Name of the column.
        kind: How its cells are read; a flag is 0 or 1.
        role: What it may be used for. A target never becomes a model's input.
        meaning: Description for the documentation.
        required: Whether every manifest must have it.
        choices: Allowed values; empty = any.
    """

    name: str
    kind: Literal["text", "number", "flag", "path"]
    role: Literal["id", "input", "target", "provenance"]
    meaning: str
    required: bool = False
    choices: tuple[str, ...] = ()


COLUMNS: tuple[ManifestColumn, ...] = (
    ManifestColumn("image_id", "text", "id", "unique name of the image", required=True),
    ManifestColumn(
        "patient_id",
        "text",
        "id",
        "the patient, unique across the releases in the table; never an input",
        required=True,
    ),
    ManifestColumn(
        "exam_id",
        "text",
        "id",
        "the examination (study) of the patient; empty = all images of the patient are one examination; never an input",
    ),
    ManifestColumn("laterality", "text", "id", "side of the breast", required=True, choices=("L", "R", "")),
    ManifestColumn(
        "view", "text", "id", "projection: CC, MLO, ML, LM, LMO, AT, XCCL ... (DICOM PS3.16 CID 4014)", required=True
    ),
    ManifestColumn(
        "path",
        "path",
        "id",
        "the image to use; relative to the manifest's folder in the file, absolute in memory",
        required=True,
    ),
    ManifestColumn("dataset", "text", "provenance", "the release that the image comes from"),
    ManifestColumn(
        "split", "text", "provenance", "part of the data that all images of the patient belong to: train, val, test"
    ),
    ManifestColumn("fold", "number", "provenance", "cross-validation fold of the patient, from 0"),
    ManifestColumn("cancer", "flag", "target", "1 = cancer in this breast (by pathology), 0 = none"),
    ManifestColumn("invasive", "flag", "target", "1 = the cancer is invasive"),
    ManifestColumn("biopsy", "flag", "target", "1 = the breast was biopsied"),
    ManifestColumn("birads", "number", "target", "BI-RADS assessment, 0 to 6; 4A, 4B and 4C count as 4"),
    ManifestColumn("density", "text", "target", "breast density, ACR category", choices=("A", "B", "C", "D")),
    ManifestColumn("difficult_negative_case", "flag", "target", "1 = a negative case that is difficult to assess"),
    ManifestColumn(
        "lesions", "text", "target", "boxes of proven cancers in source pixels: x0 y0 x1 y1 each, separated by ';'"
    ),
    ManifestColumn("findings", "text", "target", "names of the findings in the image, separated by ';'"),
    ManifestColumn(
        "finding_boxes",
        "text",
        "target",
        "boxes of findings that are not proven cancers, in source pixels: x0 y0 x1 y1 each, separated by ';'",
    ),
    ManifestColumn("age", "number", "input", "age of the patient in years"),
    ManifestColumn("implant", "flag", "input", "1 = the breast has an implant"),
    ManifestColumn("site_id", "text", "provenance", "hospital"),
    ManifestColumn("machine_id", "text", "provenance", "imaging device"),
    ManifestColumn("source_path", "path", "provenance", "the image file as released"),
    ManifestColumn("source_sha256", "text", "provenance", "SHA-256 of that file's bytes"),
    ManifestColumn(
        "instance_uid",
        "text",
        "provenance",
        "DICOM SOPInstanceUID, unless files with other pixels share it; a repeated one counts once",
    ),
    ManifestColumn(
        "shared_study",
        "flag",
        "provenance",
        "1 = files of several patients state the StudyInstanceUID of this one; such a study gets no DICOM report",
    ),
    ManifestColumn("status", "text", "provenance", "verdict on the image", choices=("ok", "warned", "refused")),
    ManifestColumn("reason", "text", "provenance", "codes of pixels/verdict.py, separated by ';'"),
    ManifestColumn("remark", "text", "provenance", "explanation of each reason for this image, separated by ';'"),
    ManifestColumn("source_height", "number", "provenance", "rows of the source image"),
    ManifestColumn("source_width", "number", "provenance", "columns of the source image"),
    ManifestColumn("box_x0", "number", "provenance", "crop box in source pixels: left, inclusive"),
    ManifestColumn("box_y0", "number", "provenance", "crop box in source pixels: top, inclusive"),
    ManifestColumn("box_x1", "number", "provenance", "crop box in source pixels: right, exclusive"),
    ManifestColumn("box_y1", "number", "provenance", "crop box in source pixels: bottom, exclusive"),
    ManifestColumn("spacing_row", "number", "provenance", "distance between the source's rows in mm"),
    ManifestColumn("spacing_column", "number", "provenance", "distance between the source's columns in mm"),
    ManifestColumn("flipped", "flag", "provenance", "1 = mirrored to bring the chest wall to its canonical side"),
    ManifestColumn(
        "chest_wall_side",
        "text",
        "provenance",
        "side of the chest wall in the source image",
        choices=("left", "right"),
    ),
    ManifestColumn("photometric", "text", "provenance", "PhotometricInterpretation of the source"),
    ManifestColumn("transfer_syntax", "text", "provenance", "TransferSyntaxUID of the source"),
    ManifestColumn("voi", "text", "provenance", "values-of-interest (VOI) transform that was applied"),
    ManifestColumn("decoder", "text", "provenance", "decoder of the pixels"),
    ManifestColumn(
        "decode_level", "number", "provenance", "number of resolution reductions (halvings) at decoding; 0 = full size"
    ),
    ManifestColumn("preprocessing", "text", "provenance", "settings of the crop: JSON of config.Preprocessing"),
)
REQUIRED_COLUMNS = tuple(column.name for column in COLUMNS if column.required)
PATH_COLUMNS = tuple(column.name for column in COLUMNS if column.kind == "path")
