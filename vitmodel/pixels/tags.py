"""Read the tags of a DICOM data set; a damaged tag counts as missing and adds a warning."""

from __future__ import annotations

import math
from typing import Any

from pydicom import Dataset
from pydicom.valuerep import PersonName

from vitmodel.pixels.verdict import ImageWarning


class TagReader:
    """Access to a pydicom data set whose tags may be damaged.

    Args:
        dataset: The data set.
        warnings: List to which warnings are added; the items of sequences share it.
    """

    def __init__(self, dataset: Dataset, warnings: list[ImageWarning]) -> None:
        self.dataset = dataset
        self.warnings = warnings

    def add_warning(self, message: str, code: str = "assumed_values") -> None:
        """Add a warning unless it has been added before."""
        warning = ImageWarning(code, message)
        if warning not in self.warnings:
            self.warnings.append(warning)

    def values(self, keyword: str) -> list[Any]:
        """Return all values of a tag; [] if it is absent, empty or damaged."""
        try:
            value = self.dataset.get(keyword)
        except Exception:  # noqa: BLE001 (pydicom converts here; damaged values raise anything)
            self.add_warning(f"{keyword} is damaged: it cannot be read as its value type, and counts as missing")
            return []
        if value is None or value == "":
            return []
        return (
            list(value) if not isinstance(value, str | bytes | PersonName) and hasattr(value, "__iter__") else [value]
        )

    def text(self, keyword: str) -> str:
        """Return the first value as stripped text; '' if there is none."""
        return next((str(value).strip() for value in self.values(keyword)), "")

    def codes(self, keyword: str) -> list[str]:
        """Return all values in upper case, for the comparison of code strings."""
        return [str(value).strip().upper() for value in self.values(keyword)]

    def code(self, keyword: str) -> str:
        """Return the first value in upper case; '' if there is none."""
        return next(iter(self.codes(keyword)), "")

    def numbers(self, keyword: str) -> list[float]:
        """Return all values as finite numbers; [] if one of them is not."""
        values = self.values(keyword)
        try:
            numbers = [float(value) for value in values]
        except (TypeError, ValueError, OverflowError):
            numbers = [math.nan]
        if all(map(math.isfinite, numbers)):
            return numbers
        self.add_warning(f"{keyword} is not a number and counts as missing")
        return []

    def number(self, keyword: str) -> float | None:
        """Return the first value as a finite number; None if there is none."""
        return next(iter(self.numbers(keyword)), None)

    def integer(self, keyword: str) -> int | None:
        """Return the first value as an integer, rounded towards zero; None if there is none."""
        number = self.number(keyword)
        return None if number is None else int(number)

    def items(self, keyword: str) -> list[TagReader]:
        """Return the items of a sequence."""
        return [TagReader(item, self.warnings) for item in self.values(keyword) if isinstance(item, Dataset)]
