"""Splits: no patient is divided, every part gets its share, and the order of the rows has no influence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitmodel.data.manifest import as_manifest, find_leaks
from vitmodel.data.splits import SPLIT_FRACTIONS, assign_folds, assign_splits, read_splits, write_splits
from vitmodel.errors import UsageError


def cohort(patients: int, positives: int, seed: int = 0) -> pd.DataFrame:
    """Return a manifest with shuffled rows, two sites and three machines.

    Each patient has 2 to 8 images. One breast of each of the first `positives` patients has a cancer.
    """
    rng = np.random.default_rng(seed)
    rows = [
        {
            "patient_id": f"p{patient}",
            "laterality": "LR"[image % 2],
            "cancer": int(patient < positives and image % 2),
            "site_id": patient % 2,
        }
        for patient in range(patients)
        for image in range(rng.integers(2, 9))
    ]
    frame = pd.DataFrame(rows).assign(
        view="CC", machine_id=lambda rows: rows.patient_id.str[-1].map(lambda digit: f"m{int(digit) % 3}")
    )
    names = [f"image{number}" for number in range(len(frame))]
    return as_manifest(frame.assign(image_id=names, path=names).sample(frac=1, random_state=seed), "cohort")


@settings(max_examples=30, deadline=None)
@given(st.integers(10, 120), st.floats(0.1, 0.9), st.integers(0, 10**6))
def test_no_patient_is_divided_and_every_part_gets_its_share(patients: int, fraction: float, seed: int) -> None:
    positives = min(max(3, round(patients * fraction)), patients - 3)
    table = assign_splits(cohort(patients, positives, seed), seed=seed)
    assert find_leaks(table).empty
    assert table.split.notna().all()
    patient_table = table.groupby("patient_id").agg(split=("split", "first"), cancer=("cancer", "max"))
    for cancer, count in ((1, positives), (0, patients - positives)):
        part_counts = patient_table.split[patient_table.cancer == cancer].value_counts()
        for part, share in SPLIT_FRACTIONS.items():
            assert part_counts[part] >= 1
            assert abs(part_counts[part] - share * count) < 2


def test_an_image_wise_split_leaks_and_a_patient_wise_one_does_not() -> None:
    table = cohort(60, 20)
    shares = list(SPLIT_FRACTIONS.values())
    image_wise = np.random.default_rng(0).choice(list(SPLIT_FRACTIONS), len(table), p=shares)
    assert len(find_leaks(table.assign(split=image_wise))) > 40
    assert find_leaks(assign_splits(table)).empty
    assert find_leaks(assign_folds(table, 5), by="fold").empty


@pytest.mark.parametrize("column", ["split", "fold"])
def test_the_order_of_rows_does_not_matter_and_the_seed_does(column: str) -> None:
    def parts(table: pd.DataFrame, seed: int) -> pd.Series:
        assigned = assign_splits(table, seed=seed) if column == "split" else assign_folds(table, 5, seed)
        return assigned.set_index("image_id")[column].sort_index()

    table = cohort(60, 20)
    for order in range(3):
        pd.testing.assert_series_equal(parts(table, 7), parts(table.sample(frac=1, random_state=order), 7))
    assert (parts(table, 7) != parts(table, 8)).any()


def test_sites_and_machines_are_spread_over_the_parts() -> None:
    table = assign_folds(cohort(300, 90), 5)
    patient_table = table.groupby("patient_id").agg(
        {"fold": "first", "cancer": "max", "site_id": "first", "machine_id": "first"}
    )
    for keys in (["cancer"], ["cancer", "site_id"], ["cancer", "site_id", "machine_id"]):
        counts = patient_table.groupby(keys).fold.value_counts().unstack("fold")
        assert (counts.max(axis=1) - counts.min(axis=1) <= 2).all(), keys


def test_official_splits_are_kept() -> None:
    table = cohort(60, 20)
    official = assign_splits(table)
    pd.testing.assert_frame_equal(assign_splits(official, seed=99), official)
    refused = official.assign(status=np.where(official.patient_id == "p7", "refused", "ok"))
    pd.testing.assert_frame_equal(assign_splits(refused), refused)

    without_val = assign_splits(table, {"train": 0.8, "test": 0.2})
    completed = assign_splits(without_val)
    assert (completed.split[without_val.split == "test"] == "test").all(), "the official test split is not changed"
    assert set(completed.split[without_val.split == "train"]) == {"train", "val"}, "a missing val comes out of train"

    partial = official.assign(split=official.split.where(official.site_id == "1"))
    filled = assign_splits(partial)
    assert (filled.split == partial.split)[partial.split.notna()].all()
    assert filled.split.notna().all()
    assert find_leaks(filled).empty


def test_the_test_split_and_refused_patients_get_no_fold() -> None:
    table = assign_splits(cohort(60, 20))
    table["status"] = np.where(table.patient_id == table.patient_id[table.split == "train"].iloc[0], "refused", "ok")
    folds = assign_folds(table, 3)
    assert (folds.fold.isna() == ((table.split == "test") | (table.status == "refused"))).all()


def test_unlabelled_patients_are_spread_over_the_parts() -> None:
    table = cohort(60, 20)
    table.loc[table.patient_id.str.endswith("5"), "cancer"] = np.nan
    assert set(assign_splits(table).split[table.cancer.isna()]) == set(SPLIT_FRACTIONS)


@pytest.mark.parametrize(("patients", "positives"), [(20, 0), (20, 20), (20, 2), (20, 18)])
def test_an_impossible_split_is_refused_with_the_counts(patients: int, positives: int) -> None:
    with pytest.raises(UsageError, match=f"{positives} with a cancer and {patients - positives} without"):
        assign_splits(cohort(patients, positives))
    with pytest.raises(UsageError, match=f"{positives} with a cancer"):
        assign_folds(cohort(patients, positives), 3)


def test_invalid_shares_and_divided_patients_are_refused() -> None:
    table = cohort(20, 10)
    with pytest.raises(UsageError, match="share"):
        assign_splits(table, {"train": 1.0, "test": 0.0})
    with pytest.raises(UsageError, match="folds"):
        assign_folds(table, 1)
    with pytest.raises(UsageError, match=r"in two splits \(the first is that of row \d+\)"):
        assign_splits(table.assign(split=["train", "test"] * (len(table) // 2) + ["train"] * (len(table) % 2)))


@pytest.mark.parametrize("column", ["split", "fold"])
def test_written_splits_are_read_back_and_invalid_files_are_refused(tmp_path: Path, column: str) -> None:
    table = cohort(20, 10)
    path = tmp_path / "splits.csv"
    assigned = assign_splits(table) if column == "split" else assign_folds(table, 4)
    write_splits(assigned, path, column)
    pd.testing.assert_series_equal(read_splits(table, path, column)[column], assigned[column], check_dtype=False)

    path.write_text(f"patient_id,{column}\np0,1\np0,2\n")
    with pytest.raises(UsageError, match=f"column {column}, row 2: the patient is in two parts"):
        read_splits(table, path, column)
    path.write_text(f"patient_id,{column}\nnobody,1\n")
    with pytest.raises(UsageError, match="patient_id"):
        read_splits(table, path, column)
    path.write_text("patient_id,part\np0,1\n")
    with pytest.raises(UsageError, match=column):
        read_splits(table, path, column)
