"""The header of an image file and the interface that every file format implements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vitmodel.pixels.verdict import ImageWarning


@dataclass(frozen=True)
class ImageHeader:
    """What a file says about its image; '' and None mean that it does not say.

    `laterality` is L or R, `view` one of the manifest's views, `spacing` the (row, column) distance of pixel centres in
    millimetres in the plane of the detector or, where the file corrects for magnification, of the breast.
    """

    rows: int
    columns: int
    bits: int
    photometric: str
    transfer_syntax: str
    voi: str = ""
    patient_id: str = ""
    image_id: str = ""
    laterality: str = ""
    view: str = ""
    machine_id: str = ""
    implant: int | None = None
    age: float | None = None
    spacing: tuple[float, float] | None = None
    warnings: tuple[ImageWarning, ...] = ()


class ImageFile(Protocol):
    """One opened image: a header at once, pixels when asked, at full size or at a power of two below it."""

    @property
    def header(self) -> ImageHeader: ...

    @property
    def levels(self) -> int:
        """How many reductions the codec offers for less than the price of a full decode: 0 for most, 5 for JPEG 2000."""

    @property
    def decoder(self) -> str:
        """The name of the decoder that gave the pixels, known after `stored`."""

    def read_stored(self, level: int = 0) -> np.ndarray:
        """The stored values, H W at rows / 2^level x columns / 2^level (rounded up). Raises ImageRefusedError."""

    def to_grey(self, stored: np.ndarray) -> np.ndarray:
        """Stored values (H W, any size, may be averages) as float32 in [0, 1], brighter = denser, padding = 0."""
