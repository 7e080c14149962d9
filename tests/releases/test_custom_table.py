"""The user's own table: other names, words, separators and paths, and labels that are joined to DICOM headers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from vitmodel.cli import main
from vitmodel.errors import UsageError
from vitmodel.pixels.identity import ImageIdentity
from vitmodel.releases import dicom_folder
from vitmodel.releases.registry import read_release
from vitmodel.releases.vocabulary import read_age, read_birads, read_density, read_flag, read_side, read_view

FILES = ["images/007/a.dcm", "images/007/b.dcm", "images/8/c.dcm"]
HEADERS = {
    "a": ImageIdentity(patient_id="007", laterality="L", view="CC", age=61),
    "b": ImageIdentity(patient_id="007", laterality="R", view="MLO", age=61),
    "c": ImageIdentity(patient_id="8", laterality="L", view="CC", age=50),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with three files; their headers are `HEADERS`."""
    for name in FILES:
        path = tmp_path / "own" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    monkeypatch.setattr(dicom_folder, "read_identity", lambda file: HEADERS[Path(file).stem])
    return tmp_path / "own"


def write(path: Path, *lines: str, encoding: str = "utf-8") -> Path:
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def test_a_hospitals_table_in_german_is_read_and_the_reading_is_logged(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = ["Patienten-ID;Seite;Ansicht;Diagnose;Alter;Datei", "007;links;lcc;gutartig;61,5;images\\007\\a.dcm"]
    rows += ["007;rechts;MLO;Bösartig;;images\\007\\b.dcm", "8;Li;CC;unbekannt;;images\\8\\c.dcm"]
    table = write(folder / "t.csv", *rows, encoding="cp1252")
    with caplog.at_level(logging.INFO):
        manifest = read_release(table)
    assert manifest.patient_id.tolist() == ["007", "007", "8"]
    assert manifest.laterality.tolist() == ["L", "R", "L"]
    assert manifest["view"].tolist() == ["CC", "MLO", "CC"]
    assert manifest.cancer.fillna(-1).tolist() == [0, 1, -1]
    assert manifest.age.tolist() == [61.5, 61, 50], "empty ages come from the headers"
    assert manifest.path.tolist() == [str(folder / name) for name in FILES]
    assert "Patienten-ID as patient_id" in caplog.text
    assert "gutartig = 0, Bösartig = 1" in caplog.text


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (read_side, {"Left": "L", "RIGHT": "R", "droite": "R", "izquierda": "L", "both": None}),
        (
            read_flag,
            {"TRUE": "1", "malignant": "1", "bénin": "0", "maligno": "1", "Normal": "0", "1.0": "1", "2": None},
        ),
        (
            read_view,
            {"cc": "CC", "RMLO": "MLO", "L-CC": "CC", "mediolateral oblique": "MLO", "XCCL": "XCCL", "LMO": "LMO"},
        ),
        (read_density, {"c": "C", "2": "B", "ACR d": "D", "4.0": "D", "IV": "D", "5": None}),
        (read_birads, {"4a": "4", "BI-RADS 5": "5", "0.0": "0", "7": None, "4-5": None}),
        (read_age, {"61,5": "61.5", "061Y": "61", "61": "61", "old": None}),
    ],
)
def test_words_of_a_column_become_its_values(read: Callable[[str], str | None], words: dict[str, str | None]) -> None:
    assert {word: read(word) for word in words} == words


def test_the_example_of_the_documentation_is_read_as_it_says(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    content = (root / "examples" / "own_table.csv").read_text()
    assert content in (root / "docs" / "how-to" / "your-own-table.md").read_text()
    manifest = read_release(write(tmp_path / "own_table.csv", content.rstrip()))
    assert manifest.laterality.tolist() == ["L", "R", "L"]
    assert manifest.cancer.fillna(-1).tolist() == [0, 1, -1]
    assert manifest.birads.tolist() == [2, 5, 1]
    assert manifest.age.tolist() == [61, 61, 54.5]
    assert manifest.path[0] == str(tmp_path / "images/0001/a.png")


def test_all_problems_of_a_table_are_listed_with_row_and_allowed_values(folder: Path) -> None:
    rows = [
        "patient_id,laterality,cancer,path",
        f"1.23457E+14,middle,maybe,{FILES[0]}",
        f"2,L,2,{FILES[1]}",
        f",L,1,{FILES[2]}",
    ]
    with pytest.raises(UsageError) as error:
        read_release(write(folder / "t.csv", *rows))
    message = str(error.value)
    for part in (
        "column patient_id, row 1: the value is an id that a spreadsheet has rounded to 1.23457E+14",
        "column laterality, row 1: the value is not L or R",
        "column cancer, row 1: the value is not 1 or 0",
        "column cancer, row 2: the value is not",
        "column patient_id, row 3: the value is empty",
    ):
        assert part in message
    assert "maybe" not in message, "a cell may be a misplaced name"


def test_columns_can_be_stated(folder: Path, tmp_path: Path) -> None:
    table = write(folder / "t.csv", "who,patient,what,path", *(f"{n},x,{n % 2},{file}" for n, file in enumerate(FILES)))
    manifest = read_release(table, columns={"patient_id": "who", "cancer": "what"})
    assert manifest.patient_id.tolist() == ["0", "1", "2"]
    assert manifest.cancer.tolist() == [0, 1, 0]
    with pytest.raises(UsageError, match=r"--columns age=years: the table has no column 'years'; it has who, patient"):
        read_release(table, columns={"age": "years"})
    assert main(["etl", str(table), str(tmp_path / "out"), "--columns", "patient_id"]) == 2


def test_files_that_moved_are_found_by_their_tail(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "images/8/a.dcm").write_bytes(b"")  # the name alone does not tell which one
    cells = [r"D:\Export\IMAGES\007\a.dcm", "/mnt/pacs/007/b.dcm", "lost/d.dcm"]
    (tmp_path / "tables").mkdir()
    rows = [f"{n},L,CC,1,x,{cell}" for n, cell in enumerate(cells)]
    table = write(tmp_path / "tables/t.csv", "patient_id,laterality,view,age,machine_id,path", *rows)
    manifest = read_release(table, images=folder)
    assert manifest.path.tolist() == [str(folder / FILES[0]), str(folder / FILES[1]), str(folder / "lost/d.dcm")]
    assert f"1 of 3 files do not exist, for example {folder / 'lost/d.dcm'}" in caplog.text


def test_findings_of_one_image_are_merged_to_the_worst(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [f"1,L,{birads},{cancer},{FILES[0]}" for birads, cancer in ((2, 0), (5, 1), ("", ""))]
    table = write(folder / "t.csv", "patient_id,laterality,birads,cancer,path", *rows, f"2,R,1,,{FILES[1]}")
    manifest = read_release(table).sort_values("patient_id")
    assert manifest.birads.tolist() == [5, 1]
    assert manifest.cancer.fillna(-1).tolist() == [1, -1]
    assert "3 rows are merged into 1" in caplog.text
    write(folder / "t.csv", "patient_id,laterality,path", f"1,L,{FILES[0]}", f"1,R,{FILES[0]}")
    with pytest.raises(UsageError, match=r"column laterality: the rows of image .*a.dcm differ"):
        read_release(folder / "t.csv")


def test_labels_per_breast_are_joined_by_patient_and_side(folder: Path) -> None:
    write(folder / "labels.csv", "patient,side,cancer", "7,L,0", "7,R,1", "99,L,1")
    manifest = read_release(folder)
    labels = dict(zip(manifest.image_id, manifest.cancer, strict=True))
    assert (labels["a"], labels["b"]) == (0, 1), "the zeros that a spreadsheet drops do not matter"
    assert pd.isna(labels["c"]), "an image without a row has no label"
    write(folder / "labels.csv", "patient,side,cancer", "12,L,0")
    with pytest.raises(UsageError, match=r"no image has the patient_id and laterality of a row"):
        read_release(folder)


def test_a_row_without_a_side_does_not_give_a_healthy_breast_the_label_of_the_other(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(folder / "labels.csv", "patient,side,cancer", "007,R,1", "007,L,0", "8,,0", "99,,")
    labels = read_release(folder).set_index("image_id").cancer
    assert labels.to_dict() == {"a": 0, "b": 1, "c": 0}, "all images of 8 are of one side"
    assert "column laterality is empty in 2 rows (row 3, 4); 1 of them hold for images that agree in it" in caplog.text
    write(folder / "labels.csv", "patient,side,cancer", "007,R,1", "007,,0", "8,L,0")
    labels = read_release(folder).set_index("image_id").cancer
    assert labels.fillna(-1).to_dict() == {"a": -1, "b": 1, "c": 0}, "the row may be about either breast"
    write(folder / "labels.csv", "patient,side,cancer", "007,R,1", "8,,0", "8,,1")
    assert pd.isna(read_release(folder).set_index("image_id").cancer["c"]), "one of the two may be the other breast"


def test_labels_of_patients_hold_for_both_breasts_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(folder / "labels.csv", "patient,cancer", "007,1", "007,0", "8,0")
    assert read_release(folder).set_index("image_id").cancer.to_dict() == {"a": 1, "b": 1, "c": 0}
    assert "no column has the side, so cancer of a patient holds for both breasts" in caplog.text
    assert "2 rows are merged into 1, because they are of the same patient_id" in caplog.text


def test_a_label_of_the_only_exam_is_joined_whatever_its_id(folder: Path) -> None:
    """An exam has no id in the headers if it is the patient's only one."""
    write(folder / "labels.csv", "patient,study_id,side,cancer", "007,A1,R,1", "007,A1,L,0", "8,A2,L,0", "8,A3,L,1")
    labels = read_release(folder).set_index("image_id").cancer
    assert labels.fillna(-1).to_dict() == {"a": 0, "b": 1, "c": -1}, "8 has two exams in the table"


def test_files_of_one_name_in_folders_of_patients_are_told_apart(tmp_path: Path) -> None:
    for name in ("1/1-1.png", "2/1-1.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
    manifest = read_release(write(tmp_path / "t.csv", "patient_id,path", "1,1/1-1.png", "2,2/1-1.png"))
    assert manifest.image_id.tolist() == ["1-1-1.png", "2-1-1.png"]


def test_the_side_may_be_in_the_column_of_the_view(folder: Path) -> None:
    rows = [f"7,{view},{file}" for view, file in zip(("LCC", "R-MLO", "MLO"), FILES, strict=True)]
    manifest = read_release(write(folder / "t.csv", "patient_id,view,path", *rows))
    assert manifest.laterality.tolist() == ["L", "R", "L"], "the third side is that of the header"
    assert manifest["view"].tolist() == ["CC", "MLO", "MLO"]


def test_labels_are_joined_by_the_patients_folder_if_the_header_has_no_patient(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identities = {name: replace(identity, patient_id="", study_id=name) for name, identity in HEADERS.items()}
    monkeypatch.setattr(dicom_folder, "read_identity", lambda file: identities[Path(file).stem])
    manifest = read_release(write(folder / "t.csv", "patient_id,laterality,cancer", "007,R,1", "8,L,0"))
    assert manifest.patient_id.tolist() == ["007", "007", "8"]
    assert manifest.cancer.fillna(-1).tolist() == [-1, 1, 0]


def test_a_word_for_unknown_is_a_patient_only_in_few_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """R writes NA for a missing value, but a patient may be called NA."""
    table = tmp_path / "list.csv"
    table.write_text("patient_id,path\nNA,1.png\nanna,2.png\n")
    assert read_release(table).patient_id.tolist() == ["NA", "anna"]
    assert "NA is read as the name of a patient in 1 rows" in caplog.text
    table.write_text("patient_id,path\n" + "".join(f"NA,{number}.png\n" for number in range(5)) + "anna,5.png\n")
    with pytest.raises(UsageError, match="patient_id, row 1: the value is empty; 5 rows in all"):
        read_release(table)
