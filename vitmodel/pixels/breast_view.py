"""Find the breast in a reduced view of an image, and judge whether it can be one."""

from __future__ import annotations

from typing import Literal, NamedTuple

import cv2
import numpy as np

from vitmodel.errors import ImageRefusedError
from vitmodel.pixels.crop import BreastRegion, find_breast
from vitmodel.pixels.header import ImageFile, ImageHeader
from vitmodel.pixels.plausibility import judge_region
from vitmodel.pixels.verdict import REFUSAL_REASONS, ImageWarning

OVERVIEW_SIZE = 512
"""Longest side, in pixels, of the view in which the breast is searched."""
MIN_CONTRAST = 0.25
"""Least difference between the 1 % and 99 % quantiles of the breast's grey values; 0.42 or more in 1,000 images."""
MAX_SATURATED = 0.5
"""Largest share of the breast that may be black or white; at most 0.17 and 0.04 in 1,000 images."""
SMALL_FIELD_MM = 130
"""Longest side of the field of a spot or stereotactic view; the smallest receptor for whole breasts measures 180 mm."""
PLAUSIBLE_HEIGHT_MM = (20, 500)
"""Plausible lengths of a breast box along the chest wall; the largest detectors and films measure 300 mm."""


class BreastView(NamedTuple):
    """The breast in a reduced view of an image."""

    breast: BreastRegion
    stored: np.ndarray
    """The stored values from which the view was made."""
    level: int
    """Number of resolution levels that they skip."""
    overview: np.ndarray
    """The whole image at a low resolution."""
    warnings: tuple[ImageWarning, ...] = ()


def view_breast(file: ImageFile) -> BreastView:
    """Find the breast; if it uses too little of the grey range, show the range of the image's own values instead.

    Raises:
        ImageRefusedError: The image cannot be read, has only two grey levels, is blank or shows no breast.
    """
    refusal = None
    try:
        view, problem = _find_in_overview(file)
    except ImageRefusedError as error:
        if error.code not in ("blank", "no_breast"):
            raise
        refusal, problem = error, f"no breast can be seen ({error.code})"
    if not problem:
        return view
    stated = file.header.voi
    own = file.use_own_range()
    if own:
        view, _ = _find_in_overview(file)
        message = (
            f"with the grey range of the file ({stated}), {problem}; the range {own} of its values is used instead"
        )
    elif refusal is not None:
        raise refusal
    else:
        message = f"{problem} (range {stated}); check the grey values of the crop"
    return view._replace(warnings=(ImageWarning("low_contrast", message),))


def _find_in_overview(file: ImageFile) -> tuple[BreastView, str]:
    """Return the breast as it is found with the current grey range, and what is wrong with this range ('' = nothing).

    Raises:
        ImageRefusedError: The image cannot be read, has only two grey levels, is blank or shows no breast.
    """
    longest = max(file.header.rows, file.header.columns)
    level = min(file.levels, max(0, int(np.ceil(np.log2(longest / OVERVIEW_SIZE)))))
    stored = file.read_stored(level)
    if has_two_values(stored):
        raise ImageRefusedError("mask", REFUSAL_REASONS["mask"])
    overview = _grey_overview(file, stored)
    breast = find_breast(overview)
    sample = np.s_[::2, ::2]
    return BreastView(breast, stored, level, overview), describe_low_contrast(overview[sample][breast.mask[sample]])


def has_two_values(stored: np.ndarray) -> bool:
    """Return whether all pixels have one of two values, as in a mask."""
    for step in (8, 1):  # a coarse sample distinguishes a mammogram from a mask at once
        sample = stored[::step, ::step]
        low, high = sample.min(), sample.max()
        if low == high or not ((sample == low) | (sample == high)).all():
            return False
    return True


def describe_low_contrast(breast: np.ndarray) -> str:
    """Return why the grey values of the breast, `(N,)` in [0, 1], cannot be right; '' if they are plausible."""
    if not breast.size:
        return ""
    low, high = np.quantile(breast[::4], (0.01, 0.99))
    for name, share in (("black", np.mean(breast <= 0)), ("white", np.mean(breast >= 1))):
        if share > MAX_SATURATED:
            return f"{share:.0%} of the breast is {name}"
    if high - low < MIN_CONTRAST:
        return f"the breast uses only {high - low:.0%} of the grey range"
    return ""


def check_plausible(
    overview: np.ndarray, breast: BreastRegion, header: ImageHeader, implausible: Literal["refuse", "warn"]
) -> list[ImageWarning]:
    """Return the warnings about a region that may be no breast, or that shows only a part of one.

    Args:
        overview: The whole image at a low resolution.
        breast: The region found in it.
        header: Header of the image.
        implausible: Whether an image without a plausible breast is refused.

    Raises:
        ImageRefusedError: The region is not like a breast (`not_a_mammogram`), or only after the image is turned by 90
            degrees (`rotated`).
    """
    warnings = []
    rows_mm = None
    if header.spacing is not None:
        field = max(header.rows * header.spacing[0], header.columns * header.spacing[1])
        if PLAUSIBLE_HEIGHT_MM[0] < field < PLAUSIBLE_HEIGHT_MM[1]:
            rows_mm = header.rows * header.spacing[0] / overview.shape[0]
        if PLAUSIBLE_HEIGHT_MM[0] < field < SMALL_FIELD_MM:
            warnings.append(ImageWarning("small_field", f"the long side of the image measures {field:.0f} mm"))
    judgement = judge_region(overview, breast, rows_mm)
    if judgement.excess < 1:
        return warnings
    findings = "; ".join(judgement.findings)
    if implausible == "warn":
        return [*warnings, ImageWarning("implausible", f"the image does not look like a mammogram: {findings}")]
    if _is_plausible_when_turned(overview):
        raise ImageRefusedError(
            "rotated", "the chest wall is at the upper or lower edge of the image; turn the image by 90 degrees"
        )
    raise ImageRefusedError(
        "not_a_mammogram",
        f"the image does not look like a screening mammogram: {findings}; if it is one, use --implausible warn",
    )


def _is_plausible_when_turned(overview: np.ndarray) -> bool:
    """Return whether the view shows a plausible breast after a turn by 90 degrees."""
    turned = np.ascontiguousarray(np.rot90(overview))
    try:
        return judge_region(turned, find_breast(turned)).excess < 1
    except ImageRefusedError:
        return False


def _grey_overview(file: ImageFile, stored: np.ndarray) -> np.ndarray:
    """Return the grey values of the whole image, at most `OVERVIEW_SIZE` pixels long."""
    factor = max(1.0, max(stored.shape) / OVERVIEW_SIZE)
    if factor > 1:
        size = (max(1, round(stored.shape[1] / factor)), max(1, round(stored.shape[0] / factor)))
        stored = cv2.resize(stored, size, interpolation=cv2.INTER_AREA)
    return file.to_grey(stored)
