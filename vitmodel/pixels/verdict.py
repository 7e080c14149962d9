"""Reason codes of images that are refused or used with a warning."""

from __future__ import annotations

from dataclasses import dataclass

REFUSAL_REASONS = {
    "missing_file": "the file does not exist",
    "unreadable": "the file cannot be opened, or it is cut short or damaged",
    "not_an_image": "the file is neither DICOM nor a PNG, JPEG, TIFF, JPEG 2000, BMP or PGM image",
    "no_pixels": "the DICOM object contains no pixel data",
    "bad_header": "header fields that decoding needs are missing or contradict each other",
    "too_large": "the file declares more pixels or larger values than any mammogram has",
    "undecodable": "no available decoder can read the pixels",
    "not_mammography": "the header does not describe a mammogram (Modality, SOP class, body part and view)",
    "quality_control": "the header states an image for quality control, such as a phantom or a uniform field",
    "specimen": "the header states a specimen, which is excised tissue",
    "subtraction": "the image is a subtraction or high-energy image of contrast mammography; use the low-energy image",
    "both_breasts": "the header states that the image shows both breasts; use the images of the single breasts",
    "colour": "the image is in colour or has a palette; a mammogram is greyscale",
    "multi_frame": "the file contains several frames or a tomosynthesis slice; a mammogram is a single frame",
    "for_processing": "the image is raw detector data (FOR PROCESSING); use its FOR PRESENTATION version, "
    "or run etl with --for-processing log",
    "mask": "the image has only two grey levels: it is a mask or a drawing, not a mammogram",
    "blank": "nearly all pixels have the same value",
    "failed": "the program failed unexpectedly on this file; please report it with the error message",
    "no_breast": "no region of the image is large and bright enough to be a breast",
    "not_a_mammogram": "what was found in the image does not look like a breast in a screening mammogram; "
    "if it is one, run etl or predict with --implausible warn",
    "rotated": "the chest wall is at the upper or lower edge, or the header states that the image is upside down; "
    "turn the image",
    "atypical": "to the model, the image is unlike those that it was trained on (see its typicality); "
    "score it nevertheless with --keep-atypical",
    "no_spacing": "the pixel spacing, which --mm-per-pixel needs, is missing or implausible",
    "not_finite": "the network's output for the image is NaN or infinite; verify the package with `vitmodel verify`",
    "unfit": "the crop contains only air, is smaller than one patch, or has more patches than --tokens allows",
}
"""Meaning of each code of a refused image."""
WARNING_REASONS = {
    "laterality_mismatch": "the chest wall is not on the side that the stated laterality implies; check the laterality",
    "unknown_modality": "the header does not state that the image is a mammogram (Modality MG)",
    "inverted": "the background was brighter than the breast, so the image was inverted",
    "assumed_values": "header fields were missing or contradictory and were replaced by assumed values",
    "low_contrast": "the breast uses little of the grey range, or the stated range does not fit its values; "
    "check the grey values of the crop",
    "lossy": "the pixels were compressed with loss",
    "doubtful_crop": "the breast box may be wrong: air, arm or belly could not be separated; check the crop",
    "implausible": "what was found in the image does not look like a breast in a screening mammogram, "
    "but --implausible warn keeps it; check the crop",
    "kept_atypical": "to the model, the image is unlike those that it was trained on, but --keep-atypical scores it; "
    "its score may mean nothing",
    "special_view": "the header states a special view, such as magnification, spot compression, stereotaxy, "
    "contrast or a screen capture; the model was trained on screening views",
    "synthetic_2d": "the 2D image was computed from a tomosynthesis; the model may have been trained on exposures",
    "small_field": "the image shows a field of only a few centimetres, as spot and stereotactic views do; "
    "the model was trained on whole breasts",
    "doubtful_side": "the side of the chest wall is uncertain; check the orientation of the crop",
    "duplicate": "the same file or DICOM instance occurs more than once in this breast; it counts once",
    "no_laterality": "several images of the patient have no laterality, so left and right may be scored as one breast; "
    "add the laterality to the header or the table",
    "mixed_exam": "images of one breast have the chest wall on different sides, "
    "or images of one patient state different ages; check how images are assigned to breasts and patients",
    "shared_study": "files of several patients state the same StudyInstanceUID, so the patients are kept apart by "
    "their ids and get no DICOM report; correct the headers",
    "one_view": "only one view of the breast is available",
    "unseen_source": "the source of the image, such as its machine, was not seen in training",
    "low_resolution": "the breast has fewer pixels than the requested size and was enlarged",
}
"""Meaning of each code of an image that is used with a warning."""


@dataclass(frozen=True)
class ImageWarning:
    """A warning about an image that is used nevertheless.

    Attributes:
        code: A key of `WARNING_REASONS`.
        message: The cause in this particular image.
    """

    code: str
    message: str

    def __post_init__(self) -> None:
        assert self.code in WARNING_REASONS, f"{self.code!r} is not a key of WARNING_REASONS"
