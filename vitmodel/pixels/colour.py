"""Reduce colour pixels of a DICOM file to grey where they are grey: equal channels, or a grey palette.

Secondary captures and exports of film digitisers store grey mammograms as RGB, YBR or PALETTE COLOR (PS3.3
C.7.6.3.1.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from vitmodel.errors import ImageRefusedError
from vitmodel.pixels.tags import TagReader

MONOCHROME = ("MONOCHROME1", "MONOCHROME2", "")
PALETTE = "PALETTE COLOR"
COLOUR_SPACES = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
"""Values of PhotometricInterpretation with three samples per pixel that are read if the image is grey."""
TOLERANCE = 2
"""Greatest difference of the channels in grey levels of 255, as lossy compression leaves it."""


@dataclass(frozen=True, eq=False)
class Palette:
    """The grey values of a palette.

    Attributes:
        first: Index of the first entry; smaller indices are shown like it, larger ones than the last like the last.
        entries: Grey values, uint8 or uint16.
    """

    first: int
    entries: np.ndarray

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Return the grey values of palette indices of any shape."""
        return self.entries[np.clip(indices.astype(np.int32) - self.first, 0, len(self.entries) - 1)]


def read_palette(tags: TagReader) -> Palette:
    """Return the palette of a PALETTE COLOR image (PS3.3 C.7.6.3.1.5 and C.7.6.3.1.6).

    Raises:
        ImageRefusedError: The palette is missing, damaged or has colours.
    """
    tables = []
    for name in ("Red", "Green", "Blue"):
        descriptor = [int(number) for number in tags.numbers(f"{name}PaletteColorLookupTableDescriptor")]
        data = next(iter(tags.values(f"{name}PaletteColorLookupTableData")), None)
        if len(descriptor) != 3 or not isinstance(data, bytes):
            raise ImageRefusedError(
                "colour", "the image is PALETTE COLOR, but its palette is missing or segmented; export it in greyscale"
            )
        size = descriptor[0] & 0xFFFF or 65536
        wide = descriptor[2] > 8 and len(data) >= 2 * size
        entries = np.frombuffer(data, "<u2" if wide or len(data) >= 2 * size else np.uint8)[:size]
        if not len(entries):
            raise ImageRefusedError(
                "colour", "the image is PALETTE COLOR, but its palette is empty; export it in greyscale"
            )
        tables.append(entries if wide else entries.astype(np.uint8))
    red, green, blue = tables
    if not are_equal(red, green, blue):
        raise ImageRefusedError("colour", "the image is in colour: its palette has colours; use the original mammogram")
    return Palette(int(tags.numbers("RedPaletteColorLookupTableDescriptor")[1]), red)


def are_equal(*channels: np.ndarray) -> bool:
    """Return whether channels of one type are equal: integers within `TOLERANCE`, other numbers exactly."""
    first, *others = channels
    tolerance = TOLERANCE * int(np.iinfo(first.dtype).max) // 255 if first.dtype.kind == "u" else 0
    return all(first.shape == other.shape and cv2.absdiff(first, other).max() <= tolerance for other in others)


def grey_channel(pixels: np.ndarray, photometric: str, bits: int) -> np.ndarray:
    """Return the grey values of a decoded colour image.

    Args:
        pixels: The image, unsigned `(H, W, 3)`; whether a decoder converts YBR to RGB depends on the decoder.
        photometric: PhotometricInterpretation.
        bits: Bits stored per sample.

    Raises:
        ImageRefusedError: The image has colours.
    """
    first, second, third = (pixels[..., channel] for channel in range(3))
    if are_equal(first, second, third):
        return np.ascontiguousarray(second)
    neutral = np.full(second.shape, 1 << (bits - 1), pixels.dtype)
    if photometric.startswith("YBR") and are_equal(neutral, second, third):  # luminance, two differences of colour
        return np.ascontiguousarray(first)
    raise ImageRefusedError(
        "colour", "the image is in colour: its red, green and blue differ; use the original mammogram"
    )
