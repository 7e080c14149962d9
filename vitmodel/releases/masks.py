"""Boxes of lesions from the masks that a release has next to its films."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from vitmodel.data.lesions import boxes_to_text
from vitmodel.errors import ImageRefusedError
from vitmodel.jobs.parallel import parallel_map
from vitmodel.pixels.header import ImageFile, ImageHeader
from vitmodel.pixels.open import open_image

logger = logging.getLogger(__name__)

ASPECT_TOLERANCE = 0.02
"""Greatest relative difference of the aspect ratios of a mask and its film."""
MAX_GREY_SHARE = 0.01
"""Greatest share of pixels that are neither black nor white in a mask; a mask saved as JPEG has a few at its edges."""
MAX_MASK_SHARE = 0.5
"""Greatest share of a film that a mask covers; a picture that is brighter is no mask."""
MIN_PART_SHARE = 0.01
"""Parts of a mask that are smaller, relative to its largest part, are artefacts of its compression."""

Box = tuple[float, float, float, float]


class FilmMask(NamedTuple):
    """The mask of a film.

    Args:
        film: Path of the film.
        candidates: Paths of pictures of which one is the mask; the others may be crops of the lesion.
        malignant: Whether the mask shows proven cancers.
    """

    film: str
    candidates: tuple[str, ...]
    malignant: bool


def read_boxes(masks: Sequence[FilmMask], release: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the cells of the columns `lesions` and `finding_boxes` by the path of the film.

    The masks are decoded in parallel. Those that cannot be used are left out and counted in a warning.

    Args:
        masks: Masks of films that exist; a film may have several.
        release: Name of the release in the warning.
    """
    boxes: dict[bool, dict[str, list[Box]]] = {True: defaultdict(list), False: defaultdict(list)}
    unused = 0
    for mask, found in zip(masks, parallel_map(find_boxes, masks, "masks", unit="mask"), strict=True):
        if found is None:
            unused += 1
        elif found:
            boxes[mask.malignant][mask.film] += found
    if unused:
        logger.warning(
            "%s: %d of %d masks give no box, because they cannot be read or do not have the shape of their film; "
            "download them again if you need the boxes",
            release,
            unused,
            len(masks),
        )
    lesions, finding_boxes = (
        {film: boxes_to_text(found) for film, found in boxes[malignant].items()} for malignant in (True, False)
    )
    return lesions, finding_boxes


def find_boxes(mask: FilmMask) -> list[Box] | None:
    """Return the box of each part of a mask in pixels of its film, ends exclusive; None if there is no usable mask.

    The mask is the largest candidate that has the film's aspect ratio and is black and white.
    """
    film = _open(mask.film)
    if film is None:
        return None
    candidates = [file for file in map(_open, mask.candidates) if file is not None]
    for file in sorted(candidates, key=lambda file: file.header.rows * file.header.columns, reverse=True):
        if not _same_aspect(file.header, film.header):
            continue
        try:
            pixels = file.read_stored()
        except ImageRefusedError:
            continue
        white = pixels > pixels.max() / 2
        if _is_mask(pixels, white):
            return _boxes_of_parts(white, film.header)
    return None


def _open(path: str) -> ImageFile | None:
    try:
        return open_image(path, for_processing="log")
    except ImageRefusedError:
        return None


def _same_aspect(first: ImageHeader, second: ImageHeader) -> bool:
    ratio = (first.rows * second.columns) / (first.columns * second.rows)
    return abs(ratio - 1) <= ASPECT_TOLERANCE


def _is_mask(pixels: np.ndarray, white: np.ndarray) -> bool:
    """Return whether a picture has only black and white pixels, and more black ones."""
    top = float(pixels.max())
    grey = (pixels > 0.1 * top) & (pixels < 0.9 * top)
    return bool(grey.mean() <= MAX_GREY_SHARE and white.mean() <= MAX_MASK_SHARE)


def _boxes_of_parts(white: np.ndarray, film: ImageHeader) -> list[Box]:
    """Return the box of each connected part of a mask `(H, W)`, in pixels of the film."""
    _, _, parts, _ = cv2.connectedComponentsWithStats(white.astype(np.uint8))
    x0, y0, width, height, area = parts[1:].T  # the first part is the background
    scale_x = film.columns / white.shape[1]
    scale_y = film.rows / white.shape[0]
    corners = np.stack([x0 * scale_x, y0 * scale_y, (x0 + width) * scale_x, (y0 + height) * scale_y], axis=1)
    kept = corners[area >= MIN_PART_SHARE * area.max(initial=0)]
    return [(float(left), float(top), float(right), float(bottom)) for left, top, right, bottom in kept]
