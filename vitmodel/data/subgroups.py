"""Divide the images into subgroups by site, machine, view, side, age, density, implant and findings.

Some targets exist in one class only (`invasive`: positives; `difficult_negative_case`: negatives). A subgroup of one
class cannot be ranked, so each subgroup by such a target is compared with all units of the other class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd

AGE_EDGES = (0, 40, 50, 60, 70, 200)
AGE_BANDS = ("below 40", "40 to 49", "50 to 59", "60 to 69", "70 and above")


class Subgroup(NamedTuple):
    """The images with one value of one attribute; `mask`, `(N,)`, is true for their rows of the table."""

    attribute: str
    value: str
    mask: np.ndarray


def yes_or_no(values: pd.Series) -> pd.Series:
    """Return yes for 1, no for 0, and NaN for other values."""
    return values.map({1.0: "yes", 0.0: "no"})


def age_band(values: pd.Series) -> pd.Series:
    """Return the one of `AGE_BANDS` that contains each age in years."""
    return pd.cut(values, AGE_EDGES, right=False, labels=AGE_BANDS).astype(object)


def blank_to_nan(values: pd.Series) -> pd.Series:
    """Return the values with NaN in place of ''."""
    return values.replace("", np.nan)


SUBGROUP_ATTRIBUTES: dict[str, tuple[str, Callable[[pd.Series], pd.Series]]] = {
    "Data set": ("dataset", blank_to_nan),
    "Site": ("site_id", blank_to_nan),
    "Machine": ("machine_id", blank_to_nan),
    "View": ("view", blank_to_nan),
    "Side": ("laterality", blank_to_nan),
    "Age": ("age", age_band),
    "Density": ("density", blank_to_nan),
    "Implant": ("implant", yes_or_no),
    "BI-RADS": ("birads", lambda values: values.map("{:.0f}".format, na_action="ignore")),
}
"""Attribute -> its column, and the function that names the column's values."""
ONE_CLASS_ATTRIBUTES: dict[str, tuple[str, int, dict[float, str]]] = {
    "Positives, against all negatives": ("invasive", 1, {1.0: "invasive", 0.0: "not invasive"}),
    "Negatives, against all positives": ("difficult_negative_case", 0, {1.0: "difficult to tell", 0.0: "other"}),
}
"""Attribute -> its column, the class that it divides, and the names of its values."""


def subgroups(table: pd.DataFrame, label: str) -> tuple[list[Subgroup], list[str]]:
    """Return the subgroups of a manifest's rows, and a message for each attribute that has only one value.

    Rows with an unknown value are a subgroup of their own, so that the counts of an attribute add up.

    Args:
        table: A manifest.
        label: Column of the label, 0 or 1.
    """
    groups: list[Subgroup] = []
    undivided: list[str] = []
    for attribute, (column, name_values) in SUBGROUP_ATTRIBUTES.items():
        values = name_values(table[column]).astype(object).fillna("unknown")
        if values.nunique() == 1:
            undivided.append(f"{attribute}: {values.iloc[0]} for all images")
            continue
        groups += [Subgroup(attribute, value, (values == value).to_numpy()) for value in sort_values(values)]
    for attribute, (column, divided_class, names) in ONE_CLASS_ATTRIBUTES.items():
        values = table[column].map(names).where(table[label] == divided_class)
        if values.isna().all():
            undivided.append(f"{attribute} ({column}): unknown for all images")
            continue
        other_class = (table[label] == 1 - divided_class).to_numpy()
        present = [value for value in names.values() if (values == value).any()]
        groups += [Subgroup(attribute, value, (values == value).to_numpy() | other_class) for value in present]
    return groups, undivided


def sort_values(values: pd.Series) -> list[str]:
    """Return the distinct values: age bands by age, then numbers by size, text alphabetically, and `unknown` last."""

    def sort_key(value: str) -> tuple[bool, float, str]:
        is_number = value.replace(".", "", 1).isdecimal()
        return value == "unknown", float(value) if is_number else np.inf, value

    ages = [band for band in AGE_BANDS if (values == band).any()]
    return ages + sorted(set(values) - set(ages), key=sort_key)
