"""The header of an image file and the interface that every file format implements."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from vitmodel.pixels.identity import ImageIdentity
from vitmodel.pixels.verdict import ImageWarning


@dataclass(frozen=True)
class ImageHeader:
    """The header of an image; '' and None mark unknown values.

    Attributes:
        rows: Height in pixels.
        columns: Width in pixels.
        bits: Bits stored per pixel.
        photometric: DICOM PhotometricInterpretation.
        transfer_syntax: UID of the DICOM transfer syntax.
        voi: Name of the VOI LUT, window or range that is applied.
        identity: Whom and what the image shows.
        spacing: Distance of pixel centres (between rows, between columns) in mm, in the plane of the detector or, if
            the file states the magnification, of the breast.
        warnings: Warnings about the header.
    """

    rows: int
    columns: int
    bits: int
    photometric: str
    transfer_syntax: str
    voi: str = ""
    identity: ImageIdentity = field(default_factory=ImageIdentity)
    spacing: tuple[float, float] | None = None
    warnings: tuple[ImageWarning, ...] = ()


class ImageFile(Protocol):
    """An opened image: its header is available at once, its pixels on demand, at full size or reduced."""

    @property
    def header(self) -> ImageHeader:
        """The header of the image."""

    @property
    def levels(self) -> int:
        """Number of times the codec can halve the size for less than a full decode: mostly 0, 5 for JPEG 2000."""

    @property
    def decoder(self) -> str:
        """Name of the decoder that gave the pixels; known after `read_stored`."""

    def read_stored(self, level: int = 0) -> np.ndarray:
        """Return the stored values at a reduced size.

        Args:
            level: Number of times to halve the size.

        Returns:
            Values `(H, W)`, where H and W are rows and columns divided by 2^level and rounded up.

        Raises:
            ImageRefusedError: The pixels cannot be read.
        """

    def to_grey(self, stored: np.ndarray) -> np.ndarray:
        """Return the grey values of stored values.

        Args:
            stored: Stored values or averages of them, `(H, W)` of any size.

        Returns:
            float32 `(H, W)` in [0, 1], brighter = denser, padding = 0.
        """

    def use_own_range(self) -> str:
        """Show the range of the image's own values instead of the stated one.

        Returns:
            The range as text; '' if nothing changes, because the own range is shown already or the user chose another.
        """
