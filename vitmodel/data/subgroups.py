"""Which images make up which subgroup: by site, machine, view, side, age, density, implant and what was found. Knows no score.

A target that only one class can have (`invasive`: cancers; `difficult_negative_case`: negatives) would make a subgroup of one class, in
which nothing can be ranked: its subgroups are those units against all of the other class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd

AGE_EDGES = (0, 40, 50, 60, 70, 200)
AGE_BANDS = ("below 40", "40 to 49", "50 to 59", "60 to 69", "70 and above")


class Subgroup(NamedTuple):
    """The images of one value of one attribute; `rows` (N) says which rows of the table they are."""

    attribute: str
    value: str
    mask: np.ndarray


def yes_or_no(values: pd.Series) -> pd.Series:
    return values.map({1.0: "yes", 0.0: "no"})


def age_band(values: pd.Series) -> pd.Series:
    return pd.cut(values, AGE_EDGES, right=False, labels=AGE_BANDS).astype(object)


def blank_to_nan(values: pd.Series) -> pd.Series:
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
ONE_CLASS_ATTRIBUTES: dict[str, tuple[str, int, dict[float, str]]] = {
    "Positives, against all negatives": ("invasive", 1, {1.0: "invasive", 0.0: "not invasive"}),
    "Negatives, against all positives": ("difficult_negative_case", 0, {1.0: "difficult to tell", 0.0: "other"}),
}
"""Attribute -> column, the class that is divided by it, and the names of its values."""


def subgroups(table: pd.DataFrame, label: str) -> tuple[list[Subgroup], list[str]]:
    """The subgroups of a manifest's rows, and a sentence for each attribute that divides them into none.

    Rows whose value is unknown make a subgroup of their own, so that an attribute's counts add up.
    """
    found: list[Subgroup] = []
    silent: list[str] = []
    for attribute, (column, name) in SUBGROUP_ATTRIBUTES.items():
        values = name(table[column]).astype(object).fillna("unknown")
        if values.nunique() == 1:
            silent.append(f"{attribute}: {values.iloc[0]} throughout")
            continue
        found += [Subgroup(attribute, value, (values == value).to_numpy()) for value in sort_values(values)]
    for attribute, (column, divided, names) in ONE_CLASS_ATTRIBUTES.items():
        values = table[column].map(names).where(table[label] == divided)
        if values.isna().all():
            silent.append(f"{attribute} ({column}): unknown throughout")
            continue
        others = (table[label] == 1 - divided).to_numpy()
        found += [
            Subgroup(attribute, value, (values == value).to_numpy() | others)
            for value in names.values()
            if (values == value).any()
        ]
    return found, silent


def sort_values(values: pd.Series) -> list[str]:
    """The distinct values, numbers by size and text by the alphabet, `unknown` last."""

    def place(value: str) -> tuple[bool, float, str]:
        return value == "unknown", float(value) if value.replace(".", "", 1).isdecimal() else np.inf, value

    ages = [band for band in AGE_BANDS if (values == band).any()]
    return ages + sorted(set(values) - set(ages), key=place)
