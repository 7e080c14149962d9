"""The manifest: unknown values stay unknown, writing and reading loses nothing, and errors name their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from vitmodel.data.manifest import (
    COLUMNS,
    REQUIRED_COLUMNS,
    as_manifest,
    breast_ids,
    find_duplicates,
    find_leaks,
    merge_manifests,
    read_manifest,
    read_manifests,
    usable_rows,
    write_manifest,
)
from vitmodel.errors import UsageError


def table(images: int = 4, **columns: Any) -> pd.DataFrame:
    """Return a manifest of the images 0, 1, ... of patients 00 (images 0, 1), 01 (2, 3), ..., all of side L."""
    numbers = range(images)
    frame = pd.DataFrame(
        {
            "image_id": [str(number) for number in numbers],
            "patient_id": [f"0{number // 2}" for number in numbers],
            "laterality": "L",
            "view": [("CC", "MLO")[number % 2] for number in numbers],
            "path": [f"/data/{number}.png" for number in numbers],
        }
    )
    return as_manifest(frame.assign(**columns), "table")


def test_column_names_are_unique_and_targets_are_not_inputs() -> None:
    names = [column.name for column in COLUMNS]
    assert len(set(names)) == len(names)
    assert REQUIRED_COLUMNS == ("image_id", "patient_id", "laterality", "view", "path")
    roles = {column.name: column.role for column in COLUMNS}
    assert {name for name, role in roles.items() if role == "input"} == {"age", "implant"}
    targets = ("cancer", "biopsy", "invasive", "birads", "density", "difficult_negative_case")
    assert {roles[name] for name in targets} == {"target"}


def test_unknown_values_are_nan_and_never_zero() -> None:
    manifest = table()
    assert manifest.cancer.isna().all()
    assert manifest.cancer.dtype == float
    assert manifest[["density", "site_id", "split", "status"]].isna().all().all()
    assert len(usable_rows(manifest)) == 4, "an image without a status is usable"


def test_a_manifest_is_the_same_after_writing_and_reading(tmp_path: Path) -> None:
    paths_below = [str(tmp_path / "images" / f"{number}.png") for number in range(3)]
    manifest = table(
        path=[*paths_below, ""],
        status=["ok", "warned", np.nan, "refused"],
        cancer=[0, 1, np.nan, 0],
        difficult_negative_case=[True, False, np.nan, np.nan],
        spacing_row=[0.1, 1 / 3, 0.0941, np.nan],
        machine_id=["49", "007", np.nan, "x, y"],
        source_path=["/elsewhere/a.dcm", np.nan, np.nan, np.nan],
        comment=['say "no"', "two\nlines", "ö", np.nan],
    )
    write_manifest(manifest, tmp_path / "manifest.csv")
    pd.testing.assert_frame_equal(read_manifest(tmp_path / "manifest.csv"), manifest, check_dtype=False)
    text = (tmp_path / "manifest.csv").read_text()
    assert ",images/0.png," in text, "paths below the folder are relative"
    assert ",/elsewhere/a.dcm," in text, "other paths are absolute"

    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "manifest.csv").rename(moved / "manifest.csv")
    assert read_manifest(moved / "manifest.csv").path[0] == str(moved / "images" / "0.png")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"image_id": ["0", "1", "1", "3"]}, ["image_id", "row 3", "earlier row"]),
        ({"image_id": ["0", "", "2", "3"]}, ["image_id", "row 2", "empty"]),
        ({"patient_id": ["a", "a", "b", np.nan]}, ["patient_id", "row 4", "empty"]),
        ({"cancer": [0, 1, 2, 3]}, ["cancer", "row 3", "neither 0 nor 1"]),
        ({"cancer": [0, "yes", 1, 1]}, ["cancer", "row 2", "not a number"]),
        ({"laterality": ["L", "R", "", "left"]}, ["laterality", "row 4", "not one of"]),
        ({"density": ["A", np.nan, "E", "B"]}, ["density", "row 3", "not one of"]),
        ({"path": ["a.png", "b.png", "b.png", "c.png"]}, ["path", "row 3", "earlier row"]),
        ({"path": ["a.png", "", "b.png", "c.png"]}, ["path", "row 2", "empty"]),
        ({"age": ["61", "?", "1", "2"]}, ["age", "row 2", "not a number"]),
    ],
)
def test_an_invalid_value_is_reported_with_file_column_and_row(columns: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        as_manifest(table().assign(**columns), "my.csv")
    assert all(word in str(error.value) for word in ["my.csv", *words])


@pytest.mark.parametrize("column", ["cancer", "laterality", "density", "age"])
def test_a_message_does_not_quote_a_cell_which_may_be_a_misplaced_name(column: str) -> None:
    with pytest.raises(UsageError, match=f"column {column}, row 2") as error:
        as_manifest(table().assign(**{column: [np.nan, "QZMARKER", np.nan, np.nan]}), "my.csv")
    assert "QZMARKER" not in str(error.value)


def test_files_that_are_not_manifests_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "manifest.csv"
    contents = {
        b"image_id,patient_id,laterality,path\n1,2,L,a.png\n": "view",
        b"image_id,patient_id,laterality,view,path\n": "no rows",
        b"": "not a table",
        b"a,b\n1,2\n1,2,3\n": "not a table",
        b"\xff\xfe\x00\x81": "image_id is missing",
    }
    for content, word in contents.items():
        path.write_bytes(content)
        with pytest.raises(UsageError, match=word) as error:
            read_manifest(path)
        assert str(path) in str(error.value)
        assert error.value.status == 2
    with pytest.raises(UsageError, match="absent"):
        read_manifest(tmp_path / "absent.csv")


def test_merged_releases_keep_their_rows_and_unknown_values() -> None:
    ours = table(dataset="ours", cancer=1, extra="x")
    theirs = table(6, dataset="theirs", density="B", path=[f"/other/{number}.png" for number in range(6)])
    theirs["image_id"] = ["0", "b", "c", "d", "e", "f"]
    merged = merge_manifests([ours, theirs])
    assert len(merged) == 10
    assert merged.cancer.tolist()[:4] == [1] * 4
    assert merged.cancer[4:].isna().all()
    assert merged.density[:4].isna().all()
    assert set(merged.density[4:]) == {"B"}
    assert merged.image_id.tolist() == ["ours-0", "1", "2", "3", "theirs-0", "b", "c", "d", "e", "f"]
    assert set(merged.patient_id) == {"ours-00", "ours-01", "theirs-00", "theirs-01", "02"}, (
        "patient 00 of one release differs from the other's"
    )


def test_several_manifests_are_merged(tmp_path: Path) -> None:
    one = tmp_path / "one.csv"
    other = tmp_path / "other.csv"
    write_manifest(as_manifest(table(dataset="ours", cancer=1), "ours"), one)
    write_manifest(as_manifest(table(dataset="theirs", density="B", path=list("pqrs")), "theirs"), other)
    assert read_manifests([other]).equals(read_manifest(other))
    assert read_manifests([one, other]).equals(merge_manifests([read_manifest(one), read_manifest(other)]))
    with pytest.raises(UsageError, match=r"absent\.csv"):
        read_manifests([one, tmp_path / "absent.csv"])


def test_a_release_merged_with_itself_is_refused() -> None:
    with pytest.raises(UsageError, match="image_id"):
        merge_manifests([table(dataset="ours"), table(dataset="ours", path=list("abcd"))])


def test_copies_of_a_file_are_logged_and_found(caplog: pytest.LogCaptureFixture) -> None:
    ours = table(dataset="ours", source_sha256=list("abcd"))
    theirs = table(dataset="theirs", source_sha256=["x", "a", np.nan, np.nan], path=list("pqrs"))
    merged = merge_manifests([ours, theirs])
    assert "2 images" in caplog.text
    assert "1 files" in caplog.text
    assert find_duplicates(merged).image_id.tolist() == ["ours-0", "theirs-1"]


def test_leaks_are_patients_and_files_in_two_parts() -> None:
    clean = table(split=["train", "train", "test", np.nan], source_sha256=["a", "a", "b", "c"])
    assert find_leaks(clean).empty
    leaking = table(split=["train", "test", "test", "test"], source_sha256=["a", "b", "a", "c"])
    assert find_leaks(leaking).values.tolist() == [
        ["patient_id", "00", "test, train", 2],
        ["source_sha256", "a", "test, train", 2],
    ]
    assert find_leaks(table(fold=[0, 0, 1, 2]), by="fold").value.tolist() == ["01"]


def test_a_breast_is_a_patient_and_a_side() -> None:
    assert breast_ids(table(laterality=["L", "R", "L", ""])).tolist() == ["00_L", "00_R", "01_L", "01"]
