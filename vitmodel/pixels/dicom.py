"""DICOM mammograms: the header read and judged at once, pixels when asked. Knows no crop."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
from pydicom import uid
from pydicom.encaps import get_frame

from vitmodel.errors import ImageRefusedError
from vitmodel.pixels import decoding
from vitmodel.pixels.dicom_header import check_image_object, read_header, read_pixel_format, read_syntax_and_class
from vitmodel.pixels.dicom_reading import has_pixel_data_tag, read_dataset
from vitmodel.pixels.tags import TagReader
from vitmodel.pixels.verdict import ImageWarning
from vitmodel.pixels.voi import DisplayPipeline, ForProcessing, read_display_pipeline

MAX_PADDING_GREY = 0.05
"""Padding up to this grey bleeds no visible rim into an average; a sigmoid's foot lies near 0.01."""


class DicomFile:
    """One DICOM file as an `ImageFile`. Raises ImageRefusedError where its header tells that it is no readable mammogram.

    `voi`: which of several stored VOI LUTs or windows to use, from 1. `for_processing`: what to do with raw detector data: refuse it,
    or show the inverted logarithm ("log").
    """

    def __init__(self, path: Path | str, voi: int = 1, for_processing: ForProcessing = "refuse") -> None:
        self.path = Path(path)
        warnings: list[ImageWarning] = []
        dataset = read_dataset(self.path)
        tags = TagReader(dataset, warnings)
        try:
            syntax, sop_class = read_syntax_and_class(dataset, tags)
            raw = check_image_object(tags, sop_class, for_processing)
            self.pixel_format = read_pixel_format(tags, syntax)
            self.display = read_display_pipeline(
                tags, self.pixel_format.signed, self.pixel_format.bits_allocated, raw, voi
            )
            self.header = read_header(tags, self.pixel_format, self.display.name, warnings)
        except ImageRefusedError:
            raise
        except Exception as error:  # what pydicom raises on damaged bytes has no common type
            raise ImageRefusedError("bad_header", f"the header cannot be understood: {error}") from error
        self.decoder = ""

    @functools.cached_property
    def levels(self) -> int:
        """Resolution levels to leave out: JPEG 2000's, or 0."""
        return 0 if self._bright_padding else decoding.available_levels(self.frame, self.pixel_format)

    def read_stored(self, level: int = 0) -> np.ndarray:
        """The stored values, H W, int or uint of 8 or 16 bits, at `level`'s grid (see `decoding.grid_offset`). Raises ImageRefusedError.

        Padding that would show bright is replaced by the darkest value, so that averages over its border stay dark.
        """
        if not 0 <= level <= (self.levels if level else 0):
            raise ValueError(f"level {level} is not between 0 and {self.levels}")
        patterns, self.decoder = decoding.decode(self.frame, self.pixel_format, level)
        values, assumed = decoding.to_stored_values(patterns, self.pixel_format)
        if (
            assumed and level == 0
        ):  # at a lower level the wavelet's low pass overshoots, which says nothing about BitsStored
            self._add_warning(assumed)
        if self._bright_padding:
            air = self._domain[self._chain(self._domain).argmin()]
            values = np.where(self.display.is_padding(values), air, values)
        return values

    def to_grey(self, stored: np.ndarray) -> np.ndarray:
        """Stored values, whole or averaged, H W, as float32 in [0, 1] of the VOI's output range, brighter = denser, padding 0.

        Whole values are looked up; averages are interpolated between the two nearest whole values.
        """
        table, low = self._table, int(self._domain[0])
        if stored.dtype == self.pixel_format.dtype:
            return table[stored.astype(np.int32) - low] if low else table[stored]
        position = np.clip(stored.astype(np.float32) - low, 0, len(table) - 1)
        below = np.minimum(position.astype(np.int32), len(table) - 2)
        fraction = position - below
        return table[below] * (1 - fraction) + table[below + 1] * fraction

    @functools.cached_property
    def _domain(self) -> np.ndarray:
        """Every value that a stored pixel can have, ascending."""
        info = np.iinfo(self.pixel_format.dtype)
        return np.arange(info.min, info.max + 1).astype(self.pixel_format.dtype)

    @functools.cached_property
    def _chain(self) -> DisplayPipeline:
        """`display`; without a VOI, over the image's own range at full size, as viewers do, so that every part shows alike."""
        if self.display.voi is not None:
            return self.display
        pixels, _ = decoding.to_stored_values(decoding.decode(self.frame, self.pixel_format)[0], self.pixel_format)
        pixels = pixels[~self.display.is_padding(pixels)]
        return self.display.with_range(pixels.min(), pixels.max()) if pixels.size else self.display.with_range(0, 1)

    @functools.cached_property
    def _table(self) -> np.ndarray:
        """The grey of every value in `_domain`, float32."""
        return np.where(self.display.is_padding(self._domain), 0, self._chain(self._domain)).astype(np.float32)

    @functools.cached_property
    def _bright_padding(self) -> bool:
        """Whether padding would show bright, were it not blanked."""
        padding = self.display.padding
        return padding is not None and bool(self._chain(np.array(padding)).max() > MAX_PADDING_GREY)

    @functools.cached_property
    def frame(self) -> bytes:
        """The frame's bytes as they lie in the file."""
        expected = self.pixel_format.rows * self.pixel_format.columns * self.pixel_format.bits_allocated // 8
        dataset = read_dataset(self.path, 2 * expected)  # a codec that does not compress still needs little more
        data = next(iter(TagReader(dataset, []).values("PixelData")), None)
        if not isinstance(data, bytes) or not data:
            if has_pixel_data_tag(self.path):
                raise ImageRefusedError("unreadable", "the file is cut short within its pixel data")
            raise ImageRefusedError("no_pixels", "the file has no pixel data, or ends before it")
        if not uid.UID(self.pixel_format.syntax).is_encapsulated:
            if len(data) < expected:
                raise ImageRefusedError(
                    "unreadable", f"the file is cut short: {len(data)} of {expected} bytes of pixels"
                )
            if (
                self.pixel_format.syntax == uid.ExplicitVRBigEndian
                and self.pixel_format.bits_allocated == 8
                and dataset["PixelData"].VR == "OW"
            ):
                data = np.frombuffer(data, np.uint16).byteswap().tobytes()  # bytes travel in words (PS3.5 D.1)
            return data[:expected]
        try:
            return get_frame(data, 0, number_of_frames=1)
        except Exception as error:  # damaged item lengths raise any of pydicom's exceptions
            raise ImageRefusedError("unreadable", f"the compressed pixels are cut short or damaged: {error}") from error

    def _add_warning(self, message: str) -> None:
        warning = ImageWarning("assumed_values", message)
        if warning not in self.header.warnings:
            self.header = dataclasses.replace(self.header, warnings=(*self.header.warnings, warning))
