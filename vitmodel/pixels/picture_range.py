"""Choose which values of a picture are shown black and white.

A DICOM header states how many bits its values use; PNG and TIFF do not. An export of 12-bit pixels therefore has the
values 0 to 4095 in a file of 16 bits, and would be nearly black if its values were divided by 65535.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vitmodel.config.images import range_ends

SIGNIFICANT_BITS = (8, 10, 12, 14, 16)
"""Numbers of bits that detectors and digitisers use."""
PERCENTILES = (0.1, 99.9)
"""Percentiles of the values that `--picture-range percentile` shows black and white."""
MIN_LEVELS = 64
"""Least number of grey levels that are stretched over the whole range."""


class GreyRange(NamedTuple):
    """The values that are shown black and white."""

    low: float
    high: float

    @classmethod
    def parse(cls, text: str) -> GreyRange | None:
        """Return the range written as LOW:HIGH; None if the text is something else."""
        ends = range_ends(text)
        return cls(*ends) if ends else None

    def __str__(self) -> str:
        return f"{_plain(self.low)}:{_plain(self.high)}"


def _plain(value: float) -> str:
    """Return a number without an exponent, with up to 6 decimal places."""
    return f"{value:.6f}".rstrip("0").rstrip(".")


def range_of_bits(bits: int) -> GreyRange:
    """Return the range of unsigned values of this many bits."""
    return GreyRange(0, 2**bits - 1)


def significant_bits(maximum: float) -> int:
    """Return the smallest of `SIGNIFICANT_BITS` that holds values up to `maximum`."""
    return next((bits for bits in SIGNIFICANT_BITS if maximum < 2**bits), SIGNIFICANT_BITS[-1])


def own_range(values: np.ndarray) -> GreyRange | None:
    """Return the range of an image's values without outliers; None if they are too few to be stretched.

    An image that is blank but for its noise thus stays blank.
    """
    chosen = percentile_range(values)
    return chosen if chosen.high - chosen.low >= MIN_LEVELS else None


def percentile_range(pixels: np.ndarray) -> GreyRange:
    """Return the range between two percentiles of the values, of any shape."""
    low, high = np.percentile(pixels.ravel()[::3], PERCENTILES)
    return GreyRange(float(low), float(high) if high > low else float(low) + 1)


def common_bits(bits: Sequence[int]) -> list[int]:
    """Return with how many bits each of several pictures is read that need `bits`.

    Pictures of one release usually come from one export: a dark one that needs fewer bits has the same range as the
    others. Therefore all are read with the number of bits that holds them all, if their numbers are neighbours in
    `SIGNIFICANT_BITS`. Otherwise the pictures come from different sources. Then the number that most of them need is
    used for these and for those that need one step less, and every other picture is read with the bits it needs.
    """
    if not bits:
        return []
    steps = [SIGNIFICANT_BITS.index(number) for number in bits]
    if max(steps) - min(steps) <= 1:
        return [max(bits)] * len(bits)
    step, count = max(Counter(steps).items(), key=lambda item: (item[1], item[0]))
    if 2 * count < len(bits):
        return list(bits)
    shared = SIGNIFICANT_BITS[step]
    return [shared if step - 1 <= own <= step else number for own, number in zip(steps, bits, strict=True)]
