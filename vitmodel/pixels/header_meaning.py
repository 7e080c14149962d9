"""What the header of a mammography object says about the kind of its picture, as one table.

Each row is a pattern of the header, with its verdict: the image is refused, used with a warning, or used as it is. The
first row that refuses an image ends the search; the rows before it that warn add their warnings.

Sources: DICOM PS3.3 C.8.11.3 (DX image), C.8.11.7 (mammography image), C.8.21.1 (tomosynthesis image type), PS3.16
CID 4014 and 4015 (views and their modifiers), and the image types that vendors write.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from vitmodel.errors import ImageRefusedError
from vitmodel.pixels.side_and_view import BOTH_WORDS, fold
from vitmodel.pixels.tags import TagReader

TOMOSYNTHESIS_CLASS = "1.2.840.10008.5.1.4.1.1.13.1.3"
SECONDARY_CAPTURE_CLASS = "1.2.840.10008.5.1.4.1.1.7"
SYNTHETIC_TYPES = {"GENERATED_2D", "TOMO_2D"}
"""Values of ImageType of a 2D image that was computed from a tomosynthesis."""
SYNTHETIC_DESCRIPTION = re.compile(r"\b(c-?view|v-?preview|s-?view|(intelligent|insight) ?2d)\b", re.IGNORECASE)
"""Names of such images by Hologic, GE, Fujifilm and Siemens in SeriesDescription, where ImageType is silent."""
SUBTRACTION_TYPES = {"SUBTRACTION", "RECOMBINED", "HIGH_ENERGY"}
"""Values of ImageType of contrast-enhanced images that are no mammograms; the low-energy image is one."""
CONTRAST_TYPES = {"POST_CONTRAST", "LOW_ENERGY"}
SPECIMEN_CODES = {"127457009", "G-8310"}
PARTIAL_MODIFIERS = {
    "399163009": "magnification",
    "R-102D6": "magnification",
    "399055006": "spot compression",
    "R-102D7": "spot compression",
    "399110001": "tangential",
    "R-102C2": "tangential",
}
"""View modifiers of images that show a part of the breast. Rolled and implant-displaced views show the whole breast."""
MIN_MAGNIFICATION = 1.3
"""Least EstimatedRadiographicMagnificationFactor of a magnification view; contact views have 1.0 to 1.1."""


@dataclass(frozen=True)
class HeaderRule:
    """A pattern of the header and its verdict."""

    pattern: str
    """The pattern in words."""
    matches: Callable[[TagReader, str], bool]
    """Whether a header, given with the UID of its SOP class, has the pattern."""
    verdict: Literal["refused", "warned"]
    code: str
    """Key of `REFUSAL_REASONS` or `WARNING_REASONS`."""
    message: str
    """What it means and what to do; `{frames}` is replaced by NumberOfFrames."""


def _has_type(*words: str) -> Callable[[TagReader, str], bool]:
    """Return a pattern: one of the values of ImageType starts with one of the words."""
    return lambda tags, _: any(value.startswith(words) for value in tags.codes("ImageType"))


def is_synthetic(tags: TagReader) -> bool:
    """Return whether the image is a 2D image computed from a tomosynthesis."""
    described = SYNTHETIC_DESCRIPTION.search(tags.text("SeriesDescription")) is not None
    return described or not SYNTHETIC_TYPES.isdisjoint(tags.codes("ImageType"))


def view_modifiers(tags: TagReader) -> list[TagReader]:
    """Return the modifiers of the view; they are items of the view code or, in older files, of the image."""
    views = tags.items("ViewCodeSequence")
    return [item for holder in (tags, *views) for item in holder.items("ViewModifierCodeSequence")]


def _is_specimen(tags: TagReader, _: str) -> bool:
    words = [tags.code(keyword) for keyword in ("ViewPosition", "BodyPartExamined")] + tags.codes("ImageType")
    codes = {item.code("CodeValue") for item in tags.items("ViewCodeSequence") + tags.items("AnatomicRegionSequence")}
    return any("SPECIMEN" in word for word in words) or not SPECIMEN_CODES.isdisjoint(codes)


def _is_partial(tags: TagReader, _: str) -> bool:
    words = [item.text("CodeMeaning").lower() for item in view_modifiers(tags)]
    by_code = any(item.code("CodeValue") in PARTIAL_MODIFIERS for item in view_modifiers(tags))
    by_word = any(name in word for word in words for name in ("magnif", "spot", "tangential"))
    return by_code or by_word or tags.code("PartialView") == "YES"


def _is_magnified(tags: TagReader, _: str) -> bool:
    return (tags.number("EstimatedRadiographicMagnificationFactor") or 1) >= MIN_MAGNIFICATION


def _is_tomosynthesis(tags: TagReader, sop_class: str) -> bool:
    return not is_synthetic(tags) and (sop_class == TOMOSYNTHESIS_CLASS or _has_type("TOMO")(tags, sop_class))


def _is_screen_save(tags: TagReader, sop_class: str) -> bool:
    return sop_class == SECONDARY_CAPTURE_CLASS and _has_type("SCREEN")(tags, sop_class)


def _runs(axis: int, *directions: str) -> Callable[[TagReader, str], bool]:
    """Return a pattern: the rows (0) or columns (1) run towards one of the directions of the patient first of all."""

    def matches(tags: TagReader, _: str) -> bool:
        words = tags.codes("PatientOrientation")
        return len(words) == 2 and words[axis].startswith(directions)

    return matches


HEADER_RULES = (
    HeaderRule(
        "QualityControlImage is YES",
        lambda tags, _: tags.code("QualityControlImage") == "YES",
        "refused",
        "quality_control",
        "QualityControlImage is YES: the image shows a phantom or a uniform field, not a patient",
    ),
    HeaderRule(
        "view, body part or ImageType is that of a specimen",
        _is_specimen,
        "refused",
        "specimen",
        "the header states a specimen: the image shows excised tissue, not a breast",
    ),
    HeaderRule(
        "ImageType has SUBTRACTION, RECOMBINED or HIGH_ENERGY",
        _has_type(*SUBTRACTION_TYPES),
        "refused",
        "subtraction",
        "ImageType states a subtraction or high-energy image of contrast mammography; use the low-energy image",
    ),
    HeaderRule(
        "ImageLaterality or FrameLaterality is B or a word for both",
        lambda tags, _: not BOTH_WORDS.isdisjoint(fold(tags.text(f"{part}Laterality")) for part in ("Image", "Frame")),
        "refused",
        "both_breasts",
        "by its ImageLaterality or FrameLaterality, the image shows both breasts; use the images of the single breasts",
    ),
    HeaderRule(
        "PatientOrientation: columns run towards the head",
        _runs(1, "H"),
        "refused",
        "rotated",
        "PatientOrientation states that the image is upside down; turn it by 180 degrees",
    ),
    HeaderRule(
        "PatientOrientation: rows run towards head or feet",
        _runs(0, "H", "F"),
        "refused",
        "rotated",
        "PatientOrientation states that the image lies on its side; turn it by 90 degrees",
    ),
    HeaderRule(
        "NumberOfFrames above 1",
        lambda tags, _: (tags.integer("NumberOfFrames") or 1) > 1,
        "refused",
        "multi_frame",
        "NumberOfFrames is {frames}: the file is a tomosynthesis or a series; use the 2D mammogram of the exam",
    ),
    HeaderRule(
        "tomosynthesis class or ImageType TOMO..., without GENERATED_2D or TOMO_2D",
        _is_tomosynthesis,
        "refused",
        "multi_frame",
        "the image is a single slice or projection of a tomosynthesis; use the 2D mammogram of the exam",
    ),
    HeaderRule(
        "ImageType has GENERATED_2D or TOMO_2D, or SeriesDescription names such an image",
        lambda tags, _: is_synthetic(tags),
        "warned",
        "synthetic_2d",
        "the 2D image was computed from a tomosynthesis",
    ),
    HeaderRule(
        "ImageType has POST_CONTRAST or LOW_ENERGY",
        _has_type(*CONTRAST_TYPES),
        "warned",
        "special_view",
        "the image belongs to contrast mammography",
    ),
    HeaderRule(
        "view modifier magnification, spot compression or tangential; PartialView is YES",
        _is_partial,
        "warned",
        "special_view",
        "the header states a magnification, spot or partial view, which shows a part of the breast",
    ),
    HeaderRule(
        "EstimatedRadiographicMagnificationFactor is 1.3 or more",
        _is_magnified,
        "warned",
        "special_view",
        "EstimatedRadiographicMagnificationFactor states a magnification view, which shows a part of the breast",
    ),
    HeaderRule(
        "ImageType has STEREO",
        _has_type("STEREO"),
        "warned",
        "special_view",
        "ImageType states a stereotactic view, which shows a part of the breast",
    ),
    HeaderRule(
        "Laterality is B, ImageLaterality is missing",
        lambda tags, _: tags.code("Laterality") == "B" and not tags.code("ImageLaterality"),
        "warned",
        "special_view",
        "Laterality is B: the image may show both breasts",
    ),
    HeaderRule(
        "Secondary Capture with ImageType SCREEN SAVE",
        _is_screen_save,
        "warned",
        "special_view",
        "the image is a secondary capture of a screen; use the original mammogram",
    ),
)
"""The table, in the order in which it is searched."""


def check_meaning(tags: TagReader, sop_class: str) -> None:
    """Refuse an image whose header states that it is no single view of a breast; warn of special views.

    Args:
        tags: The header; warnings are added to it.
        sop_class: UID of the SOP class.

    Raises:
        ImageRefusedError: A row of `HEADER_RULES` refuses the image.
    """
    for rule in HEADER_RULES:
        if not rule.matches(tags, sop_class):
            continue
        if rule.verdict == "refused":
            raise ImageRefusedError(rule.code, rule.message.format(frames=tags.text("NumberOfFrames")))
        tags.add_warning(rule.message, rule.code)
