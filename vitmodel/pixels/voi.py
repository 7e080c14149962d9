"""From stored values to shown grey: modality LUT, VOI LUT or window, presentation (DICOM PS3.4 N.2). Knows no pixels, only values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vitmodel.pixels.tags import TagReader

ForProcessing = Literal["refuse", "log"]
VoiFunction = Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"]


@dataclass(frozen=True, eq=False)
class Lut:
    """A lookup table (PS3.3 C.11.1.1): inputs below `first` take the first entry, inputs beyond the end the last."""

    first: int
    entries: np.ndarray
    bits: int

    def __call__(self, values: np.ndarray) -> np.ndarray:
        index = np.rint(values - self.first).clip(0, len(self.entries) - 1)
        return self.entries[index.astype(np.intp)]


@dataclass(frozen=True)
class Rescale:
    """Slope and intercept (PS3.3 C.11.1)."""

    slope: float = 1.0
    intercept: float = 0.0

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return values * self.slope + self.intercept


def log_exposure(values: np.ndarray) -> np.ndarray:
    """Raw detector counts to a scale on which tissue thickness is linear; counts below one are dead pixels."""
    return np.log(np.maximum(values, 1.0))


@dataclass(frozen=True)
class Window:
    """A window (PS3.3 C.11.2.1.2 and .3) whose output range is [0, 1]."""

    center: float
    width: float
    function: VoiFunction = "LINEAR"

    def __call__(self, values: np.ndarray) -> np.ndarray:
        if self.function == "SIGMOID":
            exponent = (-4 * (values - self.center) / self.width).clip(-700, 700)  # exp(710) overflows
            return 1 / (1 + np.exp(exponent))
        if self.function == "LINEAR_EXACT":
            return ((values - self.center) / self.width + 0.5).clip(0, 1)
        if self.width == 1:
            return (values > self.center - 0.5).astype(float)
        return ((values - (self.center - 0.5)) / (self.width - 1) + 0.5).clip(0, 1)

    @property
    def valid(self) -> bool:
        """Whether the standard allows the width."""
        return self.width >= 1 if self.function == "LINEAR" else self.width > 0


@dataclass(frozen=True)
class DisplayPipeline:
    """The whole chain; `voi` None means that the file has none and that the image's own range must be given by `with_range`."""

    modality: Callable[[np.ndarray], np.ndarray]
    voi: Lut | Window | None
    presentation: Lut | None
    inverse: bool
    padding: tuple[int, int] | None
    name: str
    """What was chosen for the VOI, for the table."""

    def with_range(self, low: float, high: float) -> DisplayPipeline:
        """This chain with the stored values `low`..`high` spread over the whole range of grey."""
        ends = self.modality(np.array([low, high], float))
        bottom, width = float(ends.min()), float(np.ptp(ends)) or 1.0
        return dataclasses.replace(self, voi=Window(bottom + width / 2, width, "LINEAR_EXACT"))

    def __call__(self, stored: np.ndarray) -> np.ndarray:
        """Whole stored values as float64 in [0, 1], brighter = denser, before padding is blanked."""
        assert self.voi is not None
        grey = self.voi(self.modality(np.asarray(stored, float)))
        if isinstance(self.voi, Lut):
            grey = grey / (2**self.voi.bits - 1)
        if self.presentation is not None:
            table = self.presentation
            grey = table(table.first + grey * (len(table.entries) - 1)) / (2**table.bits - 1)
        return 1 - grey if self.inverse else grey

    def is_padding(self, stored: np.ndarray) -> np.ndarray:
        """Where stored values are Pixel Padding Value or within its range (PS3.3 C.7.5.1.1.2)."""
        if self.padding is None:
            return np.zeros(stored.shape, bool)
        return (stored >= self.padding[0]) & (stored <= self.padding[1])


def read_display_pipeline(tags: TagReader, signed: bool, allocated: int, raw: bool, wanted: int) -> DisplayPipeline:
    """The chain that the header describes. Several VOIs: the `wanted`th LUT, else window, from 1. Doubts become remarks.

    `raw`: FOR PROCESSING data, whose VOI tags mean nothing; shown as the inverted logarithm of the exposure.
    """
    photometric, shape = tags.code("PhotometricInterpretation"), tags.code("PresentationLUTShape")
    if photometric == "MONOCHROME1" and shape == "IDENTITY":
        tags.add_warning("MONOCHROME1 contradicts PresentationLUTShape IDENTITY; inverted as MONOCHROME1 asks")
    inverse = photometric == "MONOCHROME1" or shape == "INVERSE"
    padding = read_padding(tags, signed, allocated)
    if raw:
        logarithmic = tags.code("PixelIntensityRelationship") == "LOG"
        sign = tags.integer("PixelIntensityRelationshipSign")  # +1: more exposure, larger value (PS3.3 C.8.11.3.1.2)
        modality = Rescale() if logarithmic else log_exposure
        return DisplayPipeline(
            modality, None, None, sign != -1, padding, "for processing: " + ("range" if logarithmic else "log, range")
        )
    voi, name = read_voi(tags, signed, wanted)
    presentation = next((read_lut(item, False) for item in tags.items("PresentationLUTSequence")), None)
    return DisplayPipeline(read_modality(tags, signed), voi, presentation, inverse, padding, name)


def read_modality(tags: TagReader, signed: bool) -> Lut | Rescale:
    """Modality LUT Sequence, else slope and intercept, else identity."""
    for item in tags.items("ModalityLUTSequence"):
        lut = read_lut(item, signed)
        if lut is not None:
            return lut
    slope, intercept = tags.number("RescaleSlope"), tags.number("RescaleIntercept")
    if slope == 0:
        tags.add_warning("RescaleSlope is 0; 1 is assumed")
    return Rescale(slope or 1.0, intercept or 0.0)


def read_voi(tags: TagReader, signed: bool, wanted: int) -> tuple[Lut | Window | None, str]:
    """The VOI LUT, else the valid window, that is the `wanted`th (from 1) of its kind, else none; with its name for the table."""
    luts = [(item, lut) for item in tags.items("VOILUTSequence") if (lut := read_lut(item, signed)) is not None]
    windows = read_windows(tags)
    count = len(luts) or len(windows)
    if not count:
        return None, "range"
    if wanted > count:
        tags.add_warning(f"VOI {wanted} is wanted but {count} are stored; the first is used")
        wanted = 1
    if luts:
        item, lut = luts[wanted - 1]
        return lut, f"lut {wanted}/{count} {item.text('LUTExplanation')}".strip()
    window = windows[wanted - 1]
    return window, f"{window.function.lower()} {window.center:g}/{window.width:g} {wanted}/{count}"


def read_windows(tags: TagReader) -> list[Window]:
    """The valid windows, in the file's order."""
    centers, widths = tags.numbers("WindowCenter"), tags.numbers("WindowWidth")
    if len(centers) != len(widths):
        tags.add_warning(
            f"{len(centers)} WindowCenter and {len(widths)} WindowWidth values do not match; the pairs are used"
        )
    name = tags.code("VOILUTFunction") or "LINEAR"
    function: VoiFunction
    match name:
        case "LINEAR" | "LINEAR_EXACT" | "SIGMOID":
            function = name
        case _:
            tags.add_warning(f"VOILUTFunction {name} is unknown; LINEAR is assumed")
            function = "LINEAR"
    windows = [Window(center, width, function) for center, width in zip(centers, widths, strict=False)]
    for window in windows:
        if not window.valid:
            tags.add_warning(f"WindowWidth {window.width:g} is impossible; the window is ignored")
    return [window for window in windows if window.valid]


def read_lut(item: TagReader, signed: bool) -> Lut | None:
    """One item of a LUT sequence; None, with a remark, where it is damaged."""
    descriptor = [int(number) for number in item.numbers("LUTDescriptor")]
    data = item.values("LUTData")
    if len(descriptor) != 3 or not data:
        item.add_warning("a lookup table without LUTDescriptor or LUTData is ignored")
        return None
    size, first, bits = descriptor[0] & 0xFFFF or 65536, descriptor[1], descriptor[2]
    if signed and first > 0x7FFF:  # written with the unsigned value representation
        first -= 0x10000
    if isinstance(data[0], bytes):  # OW; two 8-bit entries may share a word
        big_endian = item.dataset.original_encoding[1] is False
        entries = np.frombuffer(data[0], np.uint8 if len(data[0]) < 2 * size else ">u2" if big_endian else "<u2")
    else:
        entries = np.asarray(data) & 0xFFFF
    if not 1 <= bits <= 16 or len(entries) < size:
        item.add_warning(f"a lookup table of {len(entries)} entries described as {size} of {bits} bits is ignored")
        return None
    needed = int(entries[:size].max()).bit_length()
    if needed > bits:
        item.add_warning(f"a lookup table of {bits} bits has entries of {needed} bits; {needed} is assumed")
    return Lut(first, entries[:size].astype(float), max(bits, needed))


def read_padding(tags: TagReader, signed: bool, allocated: int) -> tuple[int, int] | None:
    """The stored values that mean 'no pixel here', lowest and highest."""
    ends = [tags.integer(keyword) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if ends[0] is None:
        return None
    known = [end for end in ends if end is not None]
    if signed:  # written with the unsigned value representation
        known = [end - (1 << allocated) if end >= 1 << (allocated - 1) else end for end in known]
    return min(known), max(known)
