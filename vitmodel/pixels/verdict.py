"""Reason codes for images that are refused or used with a warning."""

from __future__ import annotations

from dataclasses import dataclass

REFUSAL_REASONS = {
    "missing_file": "the file does not exist",
    "unreadable": "the file cannot be opened or is cut short",
    "not_an_image": "the file is neither DICOM nor a PNG, JPEG or TIFF image",
    "no_pixels": "the DICOM object has no pixel data",
    "bad_header": "tags that decoding needs are missing or contradict each other",
    "too_large": "the file announces more pixels, or larger values, than any mammogram has",
    "undecodable": "no decoder can read the compressed pixels",
    "not_mammography": "the modality or SOP class is not that of a projection X-ray image of the breast",
    "colour": "the image is in colour or has a palette",
    "multi_frame": "the file holds several frames (tomosynthesis); a mammogram has one",
    "for_processing": "the image is raw detector data (FOR PROCESSING)",
    "blank": "all pixels have nearly the same value",
    "failed": "the program failed on this file in a way that no rule foresaw; please report it",
    "no_breast": "no region of the image looks like a breast",
    "no_spacing": "the distance of the pixels in millimetres, which --mm-per-pixel needs, is unknown or impossible",
    "unfit": "the crop shows air alone, is smaller than a patch, or has more patches than --tokens allows",
}
WARNING_REASONS = {
    "laterality_mismatch": "the side seen in the pixels contradicts the stated laterality",
    "unknown_modality": "the modality is not stated as mammography (MG)",
    "inverted": "the picture's polarity was wrong (bright background) and has been inverted",
    "assumed_values": "tags were missing or contradictory and a stated assumption replaced them",
    "lossy": "the pixels went through lossy compression",
    "doubtful_crop": "the breast box is unusual in size, shape or position",
    "doubtful_side": "the chest wall cannot be told from the pixels",
    "duplicate": "the same file stands twice in this breast; it counts once",
    "no_laterality": "several images of the patient have no laterality: left and right may count as one breast",
    "mixed_exam": "images of one breast have the chest wall at both sides, or images of one patient state several ages",
    "one_view": "the breast was seen in one view only",
    "unseen_source": "the image is of a source, such as a machine, that the model did not learn apart",
    "low_resolution": "the picture is smaller than the requested size and was enlarged",
}


@dataclass(frozen=True)
class ImageWarning:
    """One doubt about an image that is used all the same: a code of `WARNING_REASONS` and a sentence with its particulars."""

    code: str
    message: str

    def __post_init__(self) -> None:
        assert self.code in WARNING_REASONS, self.code
