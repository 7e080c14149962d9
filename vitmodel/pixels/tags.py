"""Read a dataset's tags so that a damaged one counts as missing and is remarked upon. Knows no meaning of any tag."""

from __future__ import annotations

import math
from typing import Any

from pydicom import Dataset

from vitmodel.pixels.verdict import ImageWarning


class TagReader:
    """A pydicom dataset of doubtful quality; every doubt goes to `warnings`, which the items of its sequences share."""

    def __init__(self, dataset: Dataset, warnings: list[ImageWarning]) -> None:
        self.dataset = dataset
        self.warnings = warnings

    def add_warning(self, message: str, code: str = "assumed_values") -> None:
        """Remember what was assumed, once."""
        warning = ImageWarning(code, message)
        if warning not in self.warnings:
            self.warnings.append(warning)

    def values(self, keyword: str) -> list[Any]:
        """All values of a tag, [] where it is absent, empty or damaged."""
        try:
            value = self.dataset.get(keyword)
        except Exception as error:  # noqa: BLE001 - pydicom converts lazily, and a damaged value raises nearly any exception here
            self.add_warning(f"{keyword} cannot be read ({error}) and counts as missing")
            return []
        if value is None or value == "":
            return []
        return list(value) if not isinstance(value, str | bytes) and hasattr(value, "__iter__") else [value]

    def text(self, keyword: str) -> str:
        """The first value as stripped text, '' where there is none."""
        return next((str(value).strip() for value in self.values(keyword)), "")

    def codes(self, keyword: str) -> list[str]:
        """All values in upper case, as code strings are compared."""
        return [str(value).strip().upper() for value in self.values(keyword)]

    def code(self, keyword: str) -> str:
        """The first value in upper case, '' where there is none."""
        return next(iter(self.codes(keyword)), "")

    def numbers(self, keyword: str) -> list[float]:
        """All values as finite numbers; [] where one of them is not."""
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
        """The first value as a finite number."""
        return next(iter(self.numbers(keyword)), None)

    def integer(self, keyword: str) -> int | None:
        """The first value as a whole number."""
        number = self.number(keyword)
        return None if number is None else int(number)

    def items(self, keyword: str) -> list[TagReader]:
        """The items of a sequence."""
        return [TagReader(item, self.warnings) for item in self.values(keyword) if isinstance(item, Dataset)]
