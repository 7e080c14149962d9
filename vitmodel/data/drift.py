"""Drift: the distributions of what images look like, compared with those of the training set.

A package stores the distributions as histograms. They hold no value of a single patient: outer bins are open, and names
of machines and views that few images have are pooled.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vitmodel.data.appearance import CATEGORIES, NUMBERS
from vitmodel.data.tables import read_table, write_csv
from vitmodel.errors import UsageError
from vitmodel.metrics.stability import Stability, population_stability

DISTRIBUTIONS = "distributions.csv"
"""Name of the file that predict and evaluate write."""
TITLES = {"typicality": "typicality", **NUMBERS, **CATEGORIES}
"""Compared columns -> what they hold."""
TYPICALITY_EDGES = (0.01, 0.1, 0.25, 0.5, 0.75)
"""Edges of the bins of typicality, which is uniform for images like those of the validation set."""
MAX_BINS = 10
IMAGES_PER_BIN = 10
"""Least number of training images per bin of numbers, and per name that is not pooled."""
OTHER, UNKNOWN = "other", "unknown"


@dataclass(frozen=True)
class Distribution:
    """Histogram of one column in the training and validation images of a package."""

    bins: tuple[str, ...]
    """Names of the bins: ranges of numbers, or categories with "other" and "unknown" last."""
    counts: tuple[int, ...]
    """Number of images per bin."""
    patients: int
    """Number of patients with a known value."""
    edges: tuple[float, ...] | None = None
    """Inner edges of the bins of numbers; None for categories."""

    def count(self, values: pd.Series) -> np.ndarray:
        """Return the number of values per bin, `(B,)`; unknown numbers are left out."""
        if self.edges is not None:
            numbers = pd.to_numeric(values, errors="coerce").dropna().to_numpy(float)
            return np.bincount(np.searchsorted(self.edges, numbers, side="right"), minlength=len(self.bins))
        names = _names(values)
        names = names.where(names.isin(self.bins), OTHER)
        return np.array([int((names == name).sum()) for name in self.bins])

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Distribution:
        """Return the distribution that `asdict` turned into plain values."""
        edges = values.get("edges")
        return cls(
            tuple(values["bins"]), tuple(values["counts"]), values["patients"], None if edges is None else tuple(edges)
        )


Reference = dict[str, Distribution]
"""Column -> its distribution in the training and validation images."""


def fit_reference(images: pd.DataFrame) -> Reference:
    """Return the distributions of a table of images; columns of which too little is known are left out.

    Args:
        images: The columns `TITLES` and patient_id.
    """
    reference = {}
    for column in TITLES:
        found = (_fit_names if column in CATEGORIES else _fit_numbers)(images[column], images["patient_id"])
        if found is not None:
            reference[column] = found
    return reference


def _fit_numbers(values: pd.Series, patients: pd.Series) -> Distribution | None:
    known = values.dropna().astype(float)
    edges: tuple[float, ...] = TYPICALITY_EDGES
    if values.name != "typicality":
        bins = min(MAX_BINS, len(known) // IMAGES_PER_BIN)
        if bins < 2:
            return None
        quantiles = np.quantile(known, np.arange(1, bins) / bins)
        edges = tuple(sorted({float(f"{edge:.3g}") for edge in quantiles}))
    if known.empty:
        return None
    names = [f"below {edges[0]:g}"]
    names += [f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges)]
    names.append(f"{edges[-1]:g} and above")
    empty = Distribution(tuple(names), (), patients[known.index].nunique(), edges)
    return Distribution(empty.bins, tuple(empty.count(known).tolist()), empty.patients, edges)


def _fit_names(values: pd.Series, patients: pd.Series) -> Distribution | None:
    names = _names(values)
    counts = names[names != UNKNOWN].value_counts()
    common = sorted(counts.index[counts >= IMAGES_PER_BIN])
    if not common:
        return None
    empty = Distribution((*common, OTHER, UNKNOWN), (), patients[names != UNKNOWN].nunique())
    return Distribution(empty.bins, tuple(empty.count(values).tolist()), empty.patients)


def _names(values: pd.Series) -> pd.Series:
    """Return the values as text, with "unknown" for empty ones."""
    return values.astype(object).where(values.notna() & (values != ""), UNKNOWN).astype(str)


def reference_to_json(reference: Reference) -> dict[str, Any]:
    """Return the distributions as plain values for config.json."""
    return {column: asdict(distribution) for column, distribution in reference.items()}


def reference_from_json(values: Mapping[str, Any]) -> Reference:
    """Return the distributions that `reference_to_json` wrote."""
    return {column: Distribution.from_json(value) for column, value in values.items()}


@dataclass(frozen=True)
class ColumnDrift:
    """The distribution of one column in scored images and in the training set."""

    column: str
    title: str
    bins: tuple[str, ...]
    reference: tuple[int, ...]
    """Images of the training set per bin."""
    observed: tuple[int, ...]
    """Scored images per bin."""
    patients: int
    """Number of patients of the scored images."""
    stability: Stability

    @property
    def sentence(self) -> str:
        """Return what differs most, with the index."""
        before, now = (np.array(counts) / max(1, sum(counts)) for counts in (self.reference, self.observed))
        most = int(np.argmax(np.abs(now - before)))
        return (
            f"{self.title}: {now[most]:.0%} of the images are {self.bins[most]} instead of {before[most]:.0%} "
            f"(stability index {self.stability.index:.2f}, by chance about {self.stability.chance:.2f})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain values."""
        values = asdict(self)
        stability = values.pop("stability")
        return values | stability | {"verdict": self.stability.verdict}


def measure_drift(reference: Reference, images: pd.DataFrame) -> list[ColumnDrift]:
    """Return the drift of each column that the reference and the images have.

    Args:
        reference: The distributions of the training set.
        images: A table of scores per image; images without a crop are left out.
    """
    seen = images[images["grey_mean"].notna()]
    result = []
    for column, distribution in reference.items():
        observed = distribution.count(seen[column])
        known = seen[column].notna() & (seen[column] != "")
        if not known.any():
            continue
        patients = seen.loc[known, "patient_id"].nunique()
        stability = population_stability(
            np.array(distribution.counts), observed, (distribution.patients, max(1, patients))
        )
        result.append(
            ColumnDrift(
                column,
                TITLES[column],
                distribution.bins,
                distribution.counts,
                tuple(observed.tolist()),
                patients,
                stability,
            )
        )
    return result


def large_drift_messages(drift: list[ColumnDrift]) -> list[str]:
    """Return a sentence for each column whose distribution differs much, and one on those that cannot be judged."""
    messages = [f"drift, {column.sentence}" for column in drift if column.stability.verdict == "large"]
    undecided = [column.title for column in drift if column.stability.verdict == "undecided"]
    if undecided:
        messages.append(f"drift cannot be judged with so few patients: {', '.join(undecided)}")
    return messages


def distribution_table(drift: Sequence[ColumnDrift]) -> pd.DataFrame:
    """Return one row per column and bin, with the numbers of training images and of scored ones."""
    rows = [
        {
            "column": column.column,
            "bin": name,
            "training_images": before,
            "images": now,
            "index": column.stability.index,
            "by_chance": column.stability.chance,
            "verdict": column.stability.verdict,
        }
        for column in drift
        for name, before, now in zip(column.bins, column.reference, column.observed, strict=True)
    ]
    return pd.DataFrame(rows)


def write_distributions(drift: Sequence[ColumnDrift], path: Path) -> None:
    """Write `distribution_table` as CSV, atomically."""
    write_csv(distribution_table(drift), path)


def read_scored_images(path: Path) -> pd.DataFrame:
    """Return a score table per image for `measure_drift`.

    Raises:
        UsageError: The file cannot be read, or it is no scores.csv of this or a later version.
    """
    table = read_table(path, ("image_id", "patient_id"))
    missing = [column for column in TITLES if column not in table]
    if missing:
        raise UsageError(
            f"{path}: column {missing[0]} is missing; name the scores.csv of `vitmodel predict` or `evaluate`, and run "
            "it again if an earlier version wrote the file"
        )
    numbers = {column: pd.to_numeric(table[column], errors="coerce") for column in ("typicality", *NUMBERS)}
    return table.assign(**numbers)
