"""CSAW-CC: a cancer counts in the examination that found it; earlier examinations are unknown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fixture_types import Draw

from vitmodel.releases.registry import read_release

TABLE = "CSAW-CC_breast_cancer_screening_data.csv"


def exam(patient: int, year: int, number: int, cancer_side: str = "", timing: object = "") -> list[dict[str, Any]]:
    """Return the rows of an examination with one image of each breast; no `cancer_side` = a woman without cancer."""
    return [
        {
            "anon_patientid": patient,
            "exam_year": year,
            "x_case": int(cancer_side != ""),
            "x_cancer_laterality": cancer_side,
            "x_type": 2,
            "rad_timing": timing,
            "x_age": 2,
            "imagelaterality": side,
            "viewposition": "CC",
            "dicom_manufacturer": "HOLOGIC, Inc.",
            "anon_filename": f"{patient:05d}_20990909_{side[0]}_CC_{number}.dcm",
        }
        for side in ("Left", "Right")
    ]


ROWS = [
    *exam(7, 2010, 1, "Left", 3),
    *exam(7, 2012, 2, "Left", 1),
    *exam(8, 2012, 1, "Right", "2.0"),
    *exam(9, 2012, 1),
    *exam(10, 2012, 1, "Both", 1),
    *exam(11, 2012, 1, "unknown", 1),
]


def named(column: pd.Series) -> dict[str, Any]:
    """Return the known values by <patient>_<side>_<number>."""
    keys = column.dropna().index.str.replace("_20990909", "").str.replace("_CC", "").str.lstrip("0")
    return dict(zip(keys, column.dropna(), strict=True))


@pytest.fixture
def table(tmp_path: Path, draw: Draw) -> pd.DataFrame:
    for row in ROWS[:4]:
        draw(f"release/images/batch1/{row['anon_filename'].replace('.dcm', '.png')}")
    draw("release/images/batch1/00007_20990909_L_CC_2_mask.png", (4, 6, 10, 20))
    draw("release/images/batch1/00007_20990909_L_CC_1_mask.png", (5, 6, 10, 20))
    pd.DataFrame(ROWS).to_csv(tmp_path / "release" / TABLE, index=False)
    return read_release(tmp_path / "release").set_index("image_id", drop=False)


def test_only_the_breast_with_a_cancer_found_at_screening_is_positive(table: pd.DataFrame) -> None:
    assert set(table.dataset) == {"csaw_cc"}
    assert len(table) == 12, "masks are no images, and images without a file have a row"
    assert named(table.cancer) == {
        "7_R_1": 0,
        "7_L_2": 1,
        "7_R_2": 0,
        "8_L_1": 0,
        "9_L_1": 0,
        "9_R_1": 0,
        "10_L_1": 1,
        "10_R_1": 1,
    }


def test_interval_cancers_are_positive_in_a_column_of_their_own(table: pd.DataFrame) -> None:
    assert named(table.cancer_within_2_years) == named(table.cancer) | {"8_R_1": 1}
    assert table.rad_timing.dropna().unique().tolist() == ["3", "1", "2"]


def test_examinations_of_a_woman_are_told_apart(table: pd.DataFrame) -> None:
    assert table.groupby("patient_id").exam_id.nunique().to_dict() == {"7": 2, "8": 1, "9": 1, "10": 1, "11": 1}
    assert table.exam_id.nunique() == 6


def test_the_mask_of_an_image_without_a_proven_cancer_is_a_finding(table: pd.DataFrame) -> None:
    assert named(table.lesions) == {"7_L_2": "4 6 10 20"}
    assert named(table.finding_boxes) == {"7_L_1": "5 6 10 20"}


def test_files_are_found_in_any_folder(table: pd.DataFrame, tmp_path: Path) -> None:
    row = table.loc["00007_20990909_R_CC_2"]
    assert row.path == str(tmp_path / "release/images/batch1/00007_20990909_R_CC_2.png")
    assert (row.laterality, row["view"], row.machine_id, row.age_group) == ("R", "CC", "HOLOGIC, Inc.", "over 55")


def test_without_the_table_a_warning_names_it(tmp_path: Path, draw: Draw, caplog: pytest.LogCaptureFixture) -> None:
    draw("release/x/00007_20990909_L_MLO_1.png")
    draw("release/x/00007_20990909_L_MLO_1_mask.png", (4, 6, 10, 20))
    table = read_release(tmp_path / "release")
    assert (table.patient_id[0], table.laterality[0], table["view"][0], len(table)) == ("00007", "L", "MLO", 1)
    assert table.cancer.isna().all()
    assert TABLE in caplog.text
