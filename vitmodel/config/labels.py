"""Label rules: which values of which columns of the manifest are positive, such as `cancer` or `birads>=4`.

Here is their syntax; `vitmodel.data.labels` applies them to a manifest.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from vitmodel.errors import UsageError

CANCER = "cancer"
"""The default rule, and that of packages that do not name theirs."""
PATHOLOGY_NAMES: Mapping[str, str] = {CANCER: "cancer", "invasive": "invasive cancer"}
"""Rules by pathology -> what they call positive. Reports name all others by their text and never call them cancer."""
OPERATORS: Mapping[str, Callable[[Any, float], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
GRADES = "ABCD"
"""Values of ordered grades such as density, from the lowest."""
_COMPARISON = r"\s*(>=|<=|==|>|<)\s*([^<>=!:]+?)\s*"
_TERM = re.compile(rf"\s*([^<>=!:]+?)\s*(?:{_COMPARISON}(?::{_COMPARISON})?)?")
_SYNTAX = "write a column of 0 and 1 (cancer), a comparison (birads>=4), or positive:negative (birads>=4:<=2)"


@dataclass(frozen=True)
class Comparison:
    """A condition on a number or a grade, such as `>=4` or `>=C`."""

    sign: str
    """Key of `OPERATORS`."""
    value: str
    """A number, or one of `GRADES`."""

    @property
    def is_grade(self) -> bool:
        """Return whether the value is a grade and no number."""
        return self.value in GRADES

    @property
    def threshold(self) -> float:
        """The value as a number; grades count from 0."""
        return GRADES.index(self.value) if self.is_grade else float(self.value)

    def holds(self, numbers: Any) -> Any:
        """Return whether the condition holds for a number, or for each of a series."""
        return OPERATORS[self.sign](numbers, self.threshold)

    def __str__(self) -> str:
        return f"{self.sign}{self.value}"


@dataclass(frozen=True)
class LabelTerm:
    """A rule on one column."""

    column: str
    positive: Comparison | None = None
    """None = the column is a flag, whose values are the label."""
    negative: Comparison | None = None
    """None = all known values that are not positive are negative."""

    def __str__(self) -> str:
        comparisons = [str(comparison) for comparison in (self.positive, self.negative) if comparison]
        return self.column + ":".join(comparisons)


@dataclass(frozen=True)
class LabelRule:
    """Terms in order of preference: the first one whose value is known for a row gives its label."""

    terms: tuple[LabelTerm, ...]

    @classmethod
    def parse(cls, text: str) -> LabelRule:
        """Return the rule that `text` states: terms separated by commas.

        Raises:
            UsageError: A term is malformed, or calls one value both positive and negative.
        """
        return cls(tuple(_parse_term(term) for term in text.split(",")))

    @property
    def text(self) -> str:
        """The rule in its shortest spelling. It is also the name of the label's column."""
        return ",".join(map(str, self.terms))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the rule reads."""
        return tuple(term.column for term in self.terms)

    @property
    def flags(self) -> tuple[str, ...]:
        """The columns whose values are the label."""
        return tuple(term.column for term in self.terms if term.positive is None)


def _parse_term(text: str) -> LabelTerm:
    match = _TERM.fullmatch(text)
    if match is None:
        raise UsageError(f"label: {text!r} is no rule; {_SYNTAX}")
    column, sign, value, negative_sign, negative_value = match.groups()
    if sign is None:
        return LabelTerm(column)
    positive = Comparison(sign, _canonical(value, text))
    if negative_sign is None:
        return LabelTerm(column, positive)
    negative = Comparison(negative_sign, _canonical(negative_value, text))
    if positive.is_grade != negative.is_grade:
        raise UsageError(f"label: {text!r} compares with a number and with a grade; {_SYNTAX}")
    if _overlap(positive, negative):
        raise UsageError(f"label: {text!r} calls the same value positive and negative; {_SYNTAX}")
    return LabelTerm(column, positive, negative)


def _canonical(value: str, text: str) -> str:
    """Return a value in its shortest spelling."""
    if value.upper() in tuple(GRADES):
        return value.upper()
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"label: {text!r} compares with {value!r}, which is no number and no grade A to D; {_SYNTAX}")
    return f"{number:g}"


def _overlap(first: Comparison, second: Comparison) -> bool:
    """Return whether a number exists for which both hold: at, between, below or above their thresholds."""
    low, high = sorted([first.threshold, second.threshold])
    points = [low - 1, low, high, high + 1]
    points += [(below + above) / 2 for below, above in pairwise(points)]
    return any(first.holds(point) and second.holds(point) for point in points)


def target_name(rule: str) -> str:
    """Return what is positive by a rule, for reports: `cancer` or `invasive cancer` by pathology, else the rule."""
    return PATHOLOGY_NAMES.get(rule, rule)


def target_title(rule: str) -> str:
    """Return `target_name` for the start of a sentence; the spelling of a rule is not changed."""
    name = target_name(rule)
    return name.capitalize() if rule in PATHOLOGY_NAMES else name
