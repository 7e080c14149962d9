"""Patient-wise, stratified splits and folds. Knows the manifest's columns, no pixels and no model.

Two images of one patient look alike, so that a split by images measures memory; here a patient is never divided. Within each class
(patients with a cancer, without, unknown) the patients lie in order of site and machine, shuffled inside by a hash of seed and id, and
are dealt out one by one to the part that is furthest behind its share (a divisor method of apportionment, Adams'). So every part gets
its share of the classes, sites and machines, whatever the order of the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd

from vitmodel.data.manifest import as_manifest, read_table, usable_rows
from vitmodel.errors import UsageError
from vitmodel.utils import atomic_path, derive_seed

SPLIT_FRACTIONS: Mapping[str, float] = MappingProxyType({"train": 0.7, "val": 0.15, "test": 0.15})


def assign_splits(table: pd.DataFrame, fractions: Mapping[str, float] = SPLIT_FRACTIONS, seed: int = 0) -> pd.DataFrame:
    """`table` with `split` filled in. A split that a patient already has (an official one) is kept, with one exception: a part of
    `shares` that the given split lacks, as official splits lack 'val', is taken out of its 'train'.

    Patients whose images are all refused stay as they are. Raises UsageError where a class has fewer patients than there are parts to fill.
    """
    if any(share <= 0 for share in fractions.values()):
        raise UsageError(f"splits: every share must be positive, not {dict(fractions)}")
    patients = _patients(table)
    given = patients.split.dropna()
    absent = {part: share for part, share in fractions.items() if part not in set(given)}
    dealt = _deal(patients[patients.split.isna()], fractions, seed)
    if len(given) and absent and "train" in fractions:
        divided = {"train": fractions["train"]} | absent
        dealt = dealt | _deal(patients[patients.split == "train"], divided, seed)
    split = table.patient_id.map(given.to_dict() | dealt).astype(object)
    return table.assign(split=split.where(split.notna(), table.split))


def assign_folds(table: pd.DataFrame, folds: int, seed: int = 0) -> pd.DataFrame:
    """`table` with `fold` 0 ... folds - 1 for cross-validation; patients of the split 'test' and those without a usable image get none.

    Raises UsageError where a class has fewer patients than folds.
    """
    if folds < 2:
        raise UsageError(f"folds: must be at least 2, not {folds}")
    patients = _patients(table)
    dealt = _deal(patients[patients.split != "test"], dict.fromkeys(range(folds), 1 / folds), seed)
    return table.assign(fold=table.patient_id.map(dealt).astype(float))


def _patients(table: pd.DataFrame) -> pd.DataFrame:
    """One row per patient with a usable image: site, machine, split, and cancer (1 if any image shows one). Raises UsageError."""
    groups = usable_rows(table).sort_values(["site_id", "machine_id"]).groupby("patient_id")
    divided = groups.split.nunique() > 1
    if divided.any():
        raise UsageError(
            f"column split: {divided.sum()} patients stand in two splits (the first is {divided.idxmax()!r})"
        )
    return groups[["site_id", "machine_id", "split"]].first().assign(cancer=groups.cancer.max())


def _deal(patients: pd.DataFrame, fractions: Mapping[Any, float], seed: int) -> dict[str, Any]:
    """A part for every patient. Raises UsageError where some are labelled, and either class has fewer patients than there are parts."""
    sick, healthy = (patients.cancer == 1).sum(), (patients.cancer == 0).sum()
    if sick + healthy and min(sick, healthy) < len(fractions):
        remedy = "use fewer parts or more patients" if min(sick, healthy) else "one class alone cannot be learned"
        raise UsageError(
            f"cannot split {len(patients)} patients, {sick} with a cancer and {healthy} without, into {len(fractions)} parts that all hold "
            f"both: {remedy}"
        )
    ranked = patients.assign(hash=[derive_seed(seed, patient) for patient in patients.index]).sort_values(
        ["site_id", "machine_id", "hash"]
    )
    return {
        patient: part
        for _, same in ranked.groupby("cancer", dropna=False)
        for patient, part in _rounds(same.index, fractions)
    }


def _rounds(patients: Iterable[str], fractions: Mapping[Any, float]) -> list[tuple[str, Any]]:
    """Deal the patients in their order, each to the part that holds the fewest for its share, and so one to every part at first."""
    held = dict.fromkeys(fractions, 0)
    dealt = []
    for patient in patients:
        part = min(fractions, key=lambda name: held[name] / fractions[name])
        held[part] += 1
        dealt.append((patient, part))
    return dealt


def hold_out_group(table: pd.DataFrame, column: str, value: str) -> pd.DataFrame:
    """`table` with the split `test` for every patient who has an image with `value` in `column`, and `train` for all others.

    `assign_splits` then takes a `val` out of `train`. Raises UsageError where the table has no such value.
    """
    held = table.patient_id.isin(table.loc[table[column] == value, "patient_id"])
    if not held.any():
        raise UsageError(f"column {column}: no row has the value {value!r}")
    return table.assign(split=held.map({True: "test", False: "train"}).astype(object))


def select_split(table: pd.DataFrame, split: str, name: str) -> tuple[pd.DataFrame, str]:
    """The rows of a split and its name; `auto` = test where the table has it, else `all`. `name` stands in the message.

    Raises UsageError where there are none.
    """
    if split == "auto":
        split = "test" if (table["split"] == "test").any() else "all"
    chosen = table if split == "all" else table[table["split"] == split]
    if chosen.empty:
        known = ", ".join(sorted(table["split"].dropna().unique())) or "none"
        raise UsageError(f"split: {name} has no rows with split {split!r}; it has {known}")
    return chosen, split


def write_splits(table: pd.DataFrame, path: Path | str, column: str = "split") -> None:
    """Write patient_id and `column` (split or fold), one row per patient, as a CSV file that a person may edit."""
    parts = table[["patient_id", column]].dropna().drop_duplicates().sort_values("patient_id")
    if column == "fold":
        parts = parts.astype({"fold": int})
    with atomic_path(path) as temporary:
        parts.to_csv(temporary, index=False)


def read_splits(table: pd.DataFrame, path: Path | str, column: str = "split") -> pd.DataFrame:
    """`table` with `column` as the file says; patients that it does not name get none. Raises UsageError naming file and column."""
    parts = read_table(path, ["patient_id", column]).drop_duplicates()
    twice = parts.patient_id[parts.patient_id.duplicated()]
    if len(twice):
        raise UsageError(f"{path}: column {column}: patient {twice.iloc[0]!r} stands in two parts")
    dealt = table.patient_id.map(parts.set_index("patient_id")[column])
    if dealt.isna().all():
        raise UsageError(f"{path}: column patient_id: no patient of the table is named")
    return as_manifest(table.assign(**{column: dealt}), str(path))
