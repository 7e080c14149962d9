"""Map stored values to displayed grey: modality LUT, VOI LUT or window, presentation (DICOM PS3.4 N.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vitmodel.pixels.tags import TagReader

ForProcessing = Literal["refuse", "log"]
VoiFunction = Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"]


@dataclass(frozen=True, eq=False)
class Lut:
    """A lookup table (PS3.3 C.11.1.1).

    Inputs below `first` map to the first entry, inputs beyond the end to the last one.

    Attributes:
        first: Input value of the first entry.
        entries: Output values.
        bits: Bits of the output values.
    """

    first: int
    entries: np.ndarray
    bits: int

    def __call__(self, values: np.ndarray) -> np.ndarray:
        index = np.rint(values - self.first).clip(0, len(self.entries) - 1)
        return self.entries[index.astype(np.intp)]


@dataclass(frozen=True)
class Rescale:
    """Rescale slope and intercept (PS3.3 C.11.1)."""

    slope: float = 1.0
    intercept: float = 0.0

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return values * self.slope + self.intercept


def log_exposure(values: np.ndarray) -> np.ndarray:
    """Return the logarithm of raw detector counts, linear in tissue thickness; counts below 1 are dead pixels."""
    return np.log(np.maximum(values, 1.0))


@dataclass(frozen=True)
class Window:
    """A window (PS3.3 C.11.2.1.2 and C.11.2.1.3) with the output range [0, 1]."""

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
        """Whether the DICOM standard allows the width."""
        return self.width >= 1 if self.function == "LINEAR" else self.width > 0


@dataclass(frozen=True)
class DisplayPipeline:
    """All steps from stored values to grey.

    Attributes:
        modality: Modality LUT, rescale or logarithm.
        voi: VOI LUT or window. None if the file has none; `with_range` then has to supply the range of the image.
        presentation: Presentation LUT, if any.
        inverse: Whether large values are dark.
        padding: Lowest and highest stored value of padding, if any.
        name: Name of the VOI that was chosen, for the table.
    """

    modality: Callable[[np.ndarray], np.ndarray]
    voi: Lut | Window | None
    presentation: Lut | None
    inverse: bool
    padding: tuple[int, int] | None
    name: str

    def with_range(self, low: float, high: float) -> DisplayPipeline:
        """Return this pipeline with the stored values from `low` to `high` spread over the whole range of grey."""
        ends = self.modality(np.array([low, high], float))
        width = float(np.ptp(ends)) or 1.0
        center = float(ends.min()) + width / 2
        return dataclasses.replace(self, voi=Window(center, width, "LINEAR_EXACT"))

    def __call__(self, stored: np.ndarray) -> np.ndarray:
        """Return integer stored values as float64 in [0, 1], brighter = denser; padding is not yet blanked."""
        assert self.voi is not None, "the file has no VOI: call with_range first"
        grey = self.voi(self.modality(np.asarray(stored, float)))
        if isinstance(self.voi, Lut):
            grey = grey / (2**self.voi.bits - 1)
        if self.presentation is not None:
            table = self.presentation
            grey = table(table.first + grey * (len(table.entries) - 1)) / (2**table.bits - 1)
        return 1 - grey if self.inverse else grey

    def is_padding(self, stored: np.ndarray) -> np.ndarray:
        """Return where stored values lie in the range of Pixel Padding Value (PS3.3 C.7.5.1.1.2)."""
        if self.padding is None:
            return np.zeros(stored.shape, bool)
        return (stored >= self.padding[0]) & (stored <= self.padding[1])


def read_display_pipeline(tags: TagReader, signed: bool, allocated: int, raw: bool, wanted: int) -> DisplayPipeline:
    """Return the pipeline that the header describes; contradictions add warnings.

    Args:
        tags: The header.
        signed: Whether stored values are signed.
        allocated: Bits allocated per pixel.
        raw: Whether the image is FOR PROCESSING, whose VOI tags are meaningless. It is shown as the inverted logarithm
        of
            the exposure.
        wanted: Which of several VOI LUTs, or else windows, to use, counted from 1.
    """
    photometric = tags.code("PhotometricInterpretation")
    shape = tags.code("PresentationLUTShape")
    if photometric == "MONOCHROME1" and shape == "IDENTITY":
        tags.add_warning(
            "PhotometricInterpretation MONOCHROME1 contradicts PresentationLUTShape IDENTITY; "
            "the image was inverted as MONOCHROME1 requires"
        )
    inverse = photometric == "MONOCHROME1" or shape == "INVERSE"
    padding = read_padding(tags, signed, allocated)
    if raw:
        logarithmic = tags.code("PixelIntensityRelationship") == "LOG"
        sign = tags.integer("PixelIntensityRelationshipSign")  # +1: more exposure, larger value (PS3.3 C.8.11.3.1.2)
        modality = Rescale() if logarithmic else log_exposure
        name = "for processing: range" if logarithmic else "for processing: log, range"
        return DisplayPipeline(modality, None, None, sign != -1, padding, name)
    voi, name = read_voi(tags, signed, wanted)
    presentation = next((read_lut(item, False) for item in tags.items("PresentationLUTSequence")), None)
    presentation = presentation and with_bits_in_use(presentation, tags)
    return DisplayPipeline(read_modality(tags, signed), voi, presentation, inverse, padding, name)


def read_modality(tags: TagReader, signed: bool) -> Lut | Rescale:
    """Return the modality LUT, or else slope and intercept, or else the identity."""
    for item in tags.items("ModalityLUTSequence"):
        lut = read_lut(item, signed)
        if lut is not None:
            return lut
    slope = tags.number("RescaleSlope")
    intercept = tags.number("RescaleIntercept")
    if slope == 0:
        tags.add_warning("RescaleSlope is 0; 1 is assumed")
    return Rescale(slope or 1.0, intercept or 0.0)


def read_voi(tags: TagReader, signed: bool, wanted: int) -> tuple[Lut | Window | None, str]:
    """Return the VOI and its name for the table.

    Args:
        tags: The header.
        signed: Whether stored values are signed.
        wanted: Which VOI to use, counted from 1.

    Returns:
        The LUT with this number or, if the file has no valid LUT, the valid window with this number or, if there is
        none, None; the name of the VOI.
    """
    luts = []
    for item in tags.items("VOILUTSequence"):
        lut = read_lut(item, signed)
        if lut is not None:
            luts.append((item, with_bits_in_use(lut, tags)))
    windows = read_windows(tags)
    count = len(luts) or len(windows)
    if not count:
        return None, "range"
    if wanted > count:
        tags.add_warning(f"VOI {wanted} was requested but the file has {count}; the first is used")
        wanted = 1
    if luts:
        item, lut = luts[wanted - 1]
        return lut, f"lut {wanted}/{count} {item.text('LUTExplanation')}".strip()
    window = windows[wanted - 1]
    return window, f"{window.function.lower()} {window.center:g}/{window.width:g} {wanted}/{count}"


def read_windows(tags: TagReader) -> list[Window]:
    """Return the valid windows in the order of the file."""
    centers = tags.numbers("WindowCenter")
    widths = tags.numbers("WindowWidth")
    if len(centers) != len(widths):
        tags.add_warning(
            f"the number of WindowCenter ({len(centers)}) and WindowWidth ({len(widths)}) values differs; "
            "values without a partner are ignored"
        )
    name = tags.code("VOILUTFunction") or "LINEAR"
    function: VoiFunction
    match name:
        case "LINEAR" | "LINEAR_EXACT" | "SIGMOID":
            function = name
        case _:
            tags.add_warning("VOILUTFunction has an unknown value; LINEAR is assumed")
            function = "LINEAR"
    windows = [Window(center, width, function) for center, width in zip(centers, widths, strict=False)]
    for window in windows:
        if not window.valid:
            tags.add_warning("WindowWidth is too small for its VOILUTFunction; the window is ignored")
    return [window for window in windows if window.valid]


def read_lut(item: TagReader, signed: bool) -> Lut | None:
    """Return the LUT of one item of a LUT sequence; if it is damaged, add a warning and return None."""
    descriptor = [int(number) for number in item.numbers("LUTDescriptor")]
    data = item.values("LUTData")
    if len(descriptor) != 3 or not data:
        item.add_warning("a lookup table without LUTDescriptor or LUTData is ignored")
        return None
    size = descriptor[0] & 0xFFFF or 65536
    first, bits = descriptor[1:]
    if signed and first > 0x7FFF:  # written with the unsigned value representation
        first -= 0x10000
    entries = _lut_entries(data, size, big_endian=item.dataset.original_encoding[1] is False)
    if not 1 <= bits <= 16 or len(entries) < size:
        item.add_warning(
            f"a lookup table is ignored: it has {len(entries)} entries, but LUTDescriptor states {size} of {bits} bits"
        )
        return None
    needed = int(entries[:size].max()).bit_length()
    if needed > bits:
        item.add_warning(f"a lookup table of {bits} bits has entries of {needed} bits; {needed} bits are assumed")
    return Lut(first, entries[:size].astype(float), max(bits, needed))


def with_bits_in_use(lut: Lut, tags: TagReader) -> Lut:
    """Return the LUT with the bits that its entries use, if these are at least two fewer than it states.

    Some devices (Agfa and others) state the 16 bits in which the entries are stored, not the 12 of their values; the
    image would be nearly black.
    """
    used = max(int(lut.entries.max()).bit_length(), 1)
    if used > lut.bits - 2:
        return lut
    tags.add_warning(f"a lookup table of {lut.bits} bits has entries of {used} bits; {used} bits are assumed")
    return dataclasses.replace(lut, bits=used)


def _lut_entries(data: list[Any], size: int, big_endian: bool) -> np.ndarray:
    """Return the entries of LUTData, given as numbers (US) or bytes (OW); two 8-bit entries may share a word of OW."""
    if not isinstance(data[0], bytes):
        return np.asarray(data) & 0xFFFF
    if len(data[0]) < 2 * size:
        return np.frombuffer(data[0], np.uint8)
    return np.frombuffer(data[0], ">u2" if big_endian else "<u2")


def read_padding(tags: TagReader, signed: bool, allocated: int) -> tuple[int, int] | None:
    """Return the lowest and highest stored value of padding; None if the file states none."""
    value = tags.integer("PixelPaddingValue")
    limit = tags.integer("PixelPaddingRangeLimit")
    if value is None:
        return None
    ends = [value] if limit is None else [value, limit]
    if signed:  # they may be written with the unsigned value representation
        ends = [_to_signed(end, allocated) for end in ends]
    return min(ends), max(ends)


def _to_signed(value: int, bits: int) -> int:
    """Return the value of an unsigned number that is read as two's complement of `bits` bits."""
    return value - (1 << bits) if value >= 1 << (bits - 1) else value
