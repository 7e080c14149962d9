"""The storage format of the pixels of a DICOM file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pydicom import uid

MAX_PIXELS = 100_000_000
"""More pixels than any mammogram has: a film of 24 x 30 cm scanned at 30 um has 80 million."""
NATIVE_SYNTAXES = (
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.DeflatedExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
)
"""Transfer syntaxes of uncompressed pixels."""


@dataclass(frozen=True)
class PixelFormat:
    """The storage format of the pixels as stated in the DICOM header (PS3.3 C.7.6.3)."""

    syntax: str
    rows: int
    columns: int
    bits_allocated: int = 16
    bits_stored: int = 12
    signed: bool = False
    photometric: str = "MONOCHROME2"
    overlay_bits: bool = False
    """Whether the unused high bits contain overlay planes (retired from the standard, found in old files)."""
    shift: int = 0
    """Number of bits below the lowest bit of a value: HighBit + 1 - BitsStored."""
    samples: int = 1
    """Samples per pixel: 1, or 3 for grey stored as colour."""
    planar: bool = False
    """Whether each colour channel is stored as a plane of its own."""

    @property
    def dtype(self) -> np.dtype:
        """Type of the stored values: int or uint of 8 or 16 bits."""
        return np.dtype(f"{'i' if self.signed else 'u'}{self.bits_allocated // 8}")

    @property
    def frame_bytes(self) -> int:
        """Bytes of an uncompressed frame; YBR_FULL_422 has two differences of colour for two pixels."""
        samples = 2 if self.subsampled else self.samples
        return self.rows * self.columns * samples * self.bits_allocated // 8

    @property
    def subsampled(self) -> bool:
        """Whether an uncompressed frame has its pixels as Y Y Cb Cr (PS3.3 C.7.6.3.1.2)."""
        return self.photometric == "YBR_FULL_422" and self.syntax in NATIVE_SYNTAXES

    @property
    def unsigned_dtype(self) -> np.dtype:
        """Unsigned type of the same size."""
        return np.dtype(f"u{self.bits_allocated // 8}")
