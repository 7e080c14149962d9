"""Open DICOM mammograms: the header is read and checked at once, the pixels on demand."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
from pydicom import uid

from vitmodel.errors import ImageRefusedError
from vitmodel.pixels import decoding
from vitmodel.pixels.colour import MONOCHROME, PALETTE, grey_channel, read_palette
from vitmodel.pixels.dicom_header import check_image_object, read_header, read_pixel_format, read_syntax_and_class
from vitmodel.pixels.dicom_reading import read_dataset
from vitmodel.pixels.frame import read_frame
from vitmodel.pixels.functional_groups import promote_functional_groups
from vitmodel.pixels.picture_range import own_range
from vitmodel.pixels.tags import TagReader
from vitmodel.pixels.verdict import ImageWarning
from vitmodel.pixels.voi import DisplayPipeline, ForProcessing, read_display_pipeline
from vitmodel.utils import describe_failure

MAX_PADDING_GREY = 0.05
"""Greatest grey value of padding that leaves no visible rim in averages; the foot of a sigmoid lies near 0.01."""


class DicomFile:
    """A DICOM file as an `ImageFile`.

    Args:
        path: The file.
        voi: Which of several stored VOI LUTs or windows to use, counted from 1.
        for_processing: Whether raw detector data is refused or shown as its inverted logarithm ("log").

    Raises:
        ImageRefusedError: According to its header, the file is not a readable mammogram.
    """

    def __init__(self, path: Path | str, voi: int = 1, for_processing: ForProcessing = "refuse") -> None:
        self.path = Path(path)
        warnings: list[ImageWarning] = []
        dataset = read_dataset(self.path)
        tags = TagReader(dataset, warnings)
        try:
            promote_functional_groups(dataset)
            syntax, sop_class = read_syntax_and_class(dataset, tags)
            raw = check_image_object(tags, sop_class, for_processing)
            self.pixel_format = read_pixel_format(tags, syntax)
            self.palette = read_palette(tags) if self.pixel_format.photometric == PALETTE else None
            self.display = read_display_pipeline(
                tags, self.pixel_format.signed, self.pixel_format.bits_allocated, raw, voi
            )
            if self.pixel_format.photometric not in MONOCHROME:  # windows and padding are those of grey images
                self.display = dataclasses.replace(self.display, voi=None, padding=None, name="full")
            self.header = read_header(tags, self.pixel_format, self.display.name, warnings)
        except ImageRefusedError:
            raise
        except Exception as error:  # pydicom's exceptions for damaged bytes have no common type
            raise ImageRefusedError(
                "bad_header", f"the DICOM header cannot be parsed ({describe_failure(error)}); export the image again"
            ) from error
        self.decoder = ""

    @functools.cached_property
    def levels(self) -> int:
        """Number of resolution levels that can be skipped: that of the JPEG 2000 stream, 0 for other codecs."""
        if self._bright_padding or self.palette is not None:
            return 0
        frame = self.frame  # may correct the transfer syntax
        return decoding.available_levels(frame, self.pixel_format)

    def read_stored(self, level: int = 0) -> np.ndarray:
        """Return the stored values.

        Padding that would be shown bright is replaced by the darkest value, so that averages across its border stay
        dark.

        Args:
            level: Number of resolution levels to skip; see `decoding.grid_offset` for the grid of the result.

        Returns:
            Values of int or uint with 8 or 16 bits, `(H, W)`.

        Raises:
            ImageRefusedError: The pixels are missing, damaged or cannot be decoded.
        """
        if not 0 <= level <= (self.levels if level else 0):
            raise ValueError(f"level must be between 0 and {self.levels}, not {level}")
        values, assumption = self._decode(level)
        # At a reduced level the low pass of the wavelet overshoots, which does not mean that BitsStored is wrong.
        if assumption and level == 0:
            self._add_warning(assumption)
        if self._bright_padding:
            darkest = self._domain[self._pipeline(self._domain).argmin()]
            values = np.where(self.display.is_padding(values), darkest, values)
        return values

    def _decode(self, level: int = 0) -> tuple[np.ndarray, str]:
        """Return the stored values `(H, W)` before padding is replaced, and a message about what was assumed."""
        frame = self.frame  # may correct the transfer syntax
        patterns, self.decoder = decoding.decode(frame, self.pixel_format, level)
        if patterns.ndim == 3:
            patterns = grey_channel(patterns, self.pixel_format.photometric, self.pixel_format.bits_stored)
        if self.palette is not None:
            return self.palette(patterns), ""
        return decoding.to_stored_values(patterns, self.pixel_format)

    def to_grey(self, stored: np.ndarray) -> np.ndarray:
        """Return the grey values of stored values or of averages of stored values.

        Whole values are looked up; averages are interpolated between the two nearest whole values.

        Args:
            stored: Values or averages, `(H, W)`.

        Returns:
            float32 `(H, W)` in [0, 1], the output range of the VOI; brighter = denser, padding = 0.
        """
        table = self._grey_table
        low = int(self._domain[0])
        if stored.dtype == self._stored_dtype:
            return table[stored.astype(np.int32) - low] if low else table[stored]
        position = np.clip(stored.astype(np.float32) - low, 0, len(table) - 1)
        below = np.minimum(position.astype(np.int32), len(table) - 2)
        fraction = position - below
        return table[below] * (1 - fraction) + table[below + 1] * fraction

    def use_own_range(self) -> str:
        """Show the range of the image's own values instead of its VOI and return it as text; '' if it is too narrow."""
        pixels, _ = self._decode()
        pixels = pixels[~self.display.is_padding(pixels)]
        own = own_range(pixels) if pixels.size else None
        if own is None:
            return ""
        for name in ("_pipeline", "_grey_table", "_bright_padding", "levels"):
            self.__dict__.pop(name, None)
        self.display = self.display.with_range(own.low, own.high)
        self.header = dataclasses.replace(self.header, voi=f"range {own}")
        return str(own)

    @functools.cached_property
    def _domain(self) -> np.ndarray:
        """All values that a stored pixel can have, in ascending order."""
        dtype = self._stored_dtype
        info = np.iinfo(dtype)
        return np.arange(info.min, info.max + 1).astype(dtype)

    @property
    def _stored_dtype(self) -> np.dtype:
        """Type of the stored values or, with a palette, of its entries."""
        return self.pixel_format.dtype if self.palette is None else self.palette.entries.dtype

    @functools.cached_property
    def _pipeline(self) -> DisplayPipeline:
        """`display` or, without a VOI, the image's own range.

        The range is that of the full-size image, as in viewers, so that any part of the image is shown the same.
        """
        if self.display.voi is not None:
            return self.display
        if self.pixel_format.photometric not in MONOCHROME:  # colours have no window: all their values are shown
            high = int(self._domain[-1]) if self.palette is not None else 2**self.pixel_format.bits_stored - 1
            return self.display.with_range(0, high)
        pixels, _ = self._decode()
        pixels = pixels[~self.display.is_padding(pixels)]
        return self.display.with_range(pixels.min(), pixels.max()) if pixels.size else self.display.with_range(0, 1)

    @functools.cached_property
    def _grey_table(self) -> np.ndarray:
        """The grey value of each value in `_domain`, float32."""
        return np.where(self.display.is_padding(self._domain), 0, self._pipeline(self._domain)).astype(np.float32)

    @functools.cached_property
    def _bright_padding(self) -> bool:
        """Whether padding would be shown bright if it were not blanked."""
        padding = self.display.padding
        return padding is not None and bool(self._pipeline(np.array(padding)).max() > MAX_PADDING_GREY)

    @functools.cached_property
    def frame(self) -> bytes:
        """The bytes of the frame as stored in the file."""
        frame, syntax = read_frame(self.path, self.pixel_format)
        if syntax != self.pixel_format.syntax:
            stated = uid.UID(self.pixel_format.syntax).name
            self._add_warning(
                f"TransferSyntaxUID is {stated}, but the pixels are not compressed; they are read as such"
            )
            self.pixel_format = dataclasses.replace(self.pixel_format, syntax=syntax)
        return frame

    def _add_warning(self, message: str) -> None:
        """Add a warning about assumed values to the header unless it is there already."""
        warning = ImageWarning("assumed_values", message)
        if warning not in self.header.warnings:
            self.header = dataclasses.replace(self.header, warnings=(*self.header.warnings, warning))
