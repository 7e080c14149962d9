"""Patient-wise, stratified splits and folds.

Two images of one patient look alike, so a split by images would measure memory. Here a patient is never divided.
Patients are grouped by class (positive, negative, unknown). Within a class they are sorted by site and machine, and
shuffled inside each of these groups by a hash of seed and id. Then each patient in turn goes to the part that is
furthest behind its share (Adams' divisor method of apportionment). So every part gets its share of the classes, sites
and machines, whatever the order of the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from vitmodel.config.labels import CANCER, target_name
from vitmodel.data.manifest import as_manifest, usable_rows
from vitmodel.data.tables import read_table, write_csv
from vitmodel.errors import UsageError
from vitmodel.utils import derive_seed

SPLIT_FRACTIONS: Mapping[str, float] = MappingProxyType({"train": 0.7, "val": 0.15, "test": 0.15})


def assign_splits(
    table: pd.DataFrame, fractions: Mapping[str, float] = SPLIT_FRACTIONS, seed: int = 0, label: str = CANCER
) -> pd.DataFrame:
    """Return `table` with the column `split` filled in.

    A split that a patient already has (an official one) is kept, with one exception: if no patient has one of the parts
    of `fractions`, this part is taken out of the given train. (Official splits often lack val.) Patients whose images
    are all refused are not changed.

    Args:
        table: A manifest.
        fractions: Share of the patients in each part.
        seed: Seed of the shuffling.
        label: Column of the label, by which patients are grouped.

    Raises:
        UsageError: A share is not positive, a patient is in two splits, or a class has fewer patients than there are
            parts to fill.
    """
    if any(fraction <= 0 for fraction in fractions.values()):
        raise UsageError(f"splits: every share must be positive, not {dict(fractions)}; correct the shares")
    patients = _patients(table, label)
    given = patients.split.dropna()
    given_parts = set(given)
    absent = {part: fraction for part, fraction in fractions.items() if part not in given_parts}
    assigned = _assign_parts(patients[patients.split.isna()], fractions, seed, label)
    if len(given) and absent and "train" in fractions:
        divided = {"train": fractions["train"]} | absent
        assigned = assigned | _assign_parts(patients[patients.split == "train"], divided, seed, label)
    split = table.patient_id.map(given.to_dict() | assigned).astype(object)
    return table.assign(split=split.where(split.notna(), table.split))


def assign_folds(table: pd.DataFrame, folds: int, seed: int = 0, label: str = CANCER) -> pd.DataFrame:
    """Return `table` with the column `fold`, 0 to folds - 1, for cross-validation.

    Patients in the split test and those without a usable image get no fold (NaN).

    Raises:
        UsageError: There are fewer than 2 folds, a patient is in two splits, or a class has fewer patients than folds.
    """
    if folds < 2:
        raise UsageError(f"folds: must be at least 2, not {folds}; choose more")
    patients = _patients(table, label)
    fractions = dict.fromkeys(range(folds), 1 / folds)
    assigned = _assign_parts(patients[patients.split != "test"], fractions, seed, label)
    return table.assign(fold=table.patient_id.map(assigned).astype(float))


def _patients(table: pd.DataFrame, label: str) -> pd.DataFrame:
    """Return one row per patient with a usable image: site, machine, split, and positive (1 if any image is).

    Raises UsageError if a patient is in two splits.
    """
    groups = usable_rows(table).sort_values(["site_id", "machine_id"]).groupby("patient_id")
    divided = groups.split.nunique() > 1
    if divided.any():
        row = int(np.argmax(table.patient_id == divided.idxmax())) + 1
        raise UsageError(
            f"column split: {divided.sum()} patients are in two splits (the first is that of row {row}); "
            "put all images of a patient into one"
        )
    return groups[["site_id", "machine_id", "split"]].first().assign(positive=groups[label].max())


def _assign_parts(patients: pd.DataFrame, fractions: Mapping[Any, float], seed: int, label: str) -> dict[str, Any]:
    """Return a part for every patient.

    Raises UsageError if some patients are labelled and a class has fewer patients than there are parts.
    """
    positive = (patients.positive == 1).sum()
    negative = (patients.positive == 0).sum()
    if positive + negative and min(positive, negative) < len(fractions):
        remedy = "use fewer parts or more patients" if min(positive, negative) else "add patients of the other class"
        target = "a cancer" if label == CANCER else target_name(label)
        raise UsageError(
            f"splits: cannot split {len(patients)} patients, {positive} with {target} and {negative} without, "
            f"into {len(fractions)} parts that each contain both; {remedy}"
        )
    hashes = [derive_seed(seed, patient) for patient in patients.index]
    ordered = patients.assign(hash=hashes).sort_values(["site_id", "machine_id", "hash"])
    parts: dict[str, Any] = {}
    for _, same_class in ordered.groupby("positive", dropna=False):
        parts |= _apportion(same_class.index, fractions)
    return parts


def _apportion(patients: Iterable[str], fractions: Mapping[Any, float]) -> dict[str, Any]:
    """Assign each patient in turn to the part with the fewest patients relative to its share.

    The first patients therefore go to one part each.
    """
    counts = dict.fromkeys(fractions, 0)
    parts = {}
    for patient in patients:
        part = min(fractions, key=lambda name: counts[name] / fractions[name])
        counts[part] += 1
        parts[patient] = part
    return parts


def hold_out_group(table: pd.DataFrame, column: str, value: str) -> pd.DataFrame:
    """Return `table` with the split test for all patients who have an image with `value` in `column`, else train.

    `assign_splits` can then take val out of train.

    Raises:
        UsageError: No row has the value.
    """
    held_out = table.patient_id.isin(table.loc[table[column] == value, "patient_id"])
    if not held_out.any():
        raise UsageError(f"column {column}: no row has the value {value!r}; choose a value of this column")
    return table.assign(split=held_out.map({True: "test", False: "train"}).astype(object))


def select_split(table: pd.DataFrame, split: str, name: str) -> tuple[pd.DataFrame, str]:
    """Return the rows of a split, and its name.

    Args:
        table: A manifest.
        split: A value of the column `split`, "all", or "auto" = test if the table has it, else all.
        name: Name of the table in messages.

    Raises:
        UsageError: The split has no rows.
    """
    if split == "auto":
        split = "test" if (table["split"] == "test").any() else "all"
    selected = table if split == "all" else table[table["split"] == split]
    if selected.empty:
        choices = ", ".join(["all", *sorted(table["split"].dropna().unique())])
        raise UsageError(f"split: {name} has no rows with split {split!r}; choose one of {choices}")
    return selected, split


def write_splits(table: pd.DataFrame, path: Path | str, column: str = "split") -> None:
    """Write patient_id and `column` (split or fold) as a CSV file with one row per patient, which may be edited."""
    parts = table[["patient_id", column]].dropna().drop_duplicates().sort_values("patient_id")
    if column == "fold":
        parts = parts.astype({"fold": int})
    write_csv(parts, path)


def read_splits(table: pd.DataFrame, path: Path | str, column: str = "split") -> pd.DataFrame:
    """Return `table` with `column` (split or fold) from the file; patients that it does not list have none.

    Raises:
        UsageError: The file cannot be read, lacks a column, lists a patient with two parts, or lists no patient of the
            table.
    """
    parts = read_table(path, ["patient_id", column]).drop_duplicates()
    repeated = parts.index[parts.patient_id.duplicated()]
    if len(repeated):
        raise UsageError(f"{path}: column {column}, row {repeated[0] + 1}: the patient is in two parts; keep one")
    assigned = table.patient_id.map(parts.set_index("patient_id")[column])
    if assigned.isna().all():
        raise UsageError(f"{path}: column patient_id: no patient of the table is listed; check that the ids match")
    return as_manifest(table.assign(**{column: assigned}), str(path))
