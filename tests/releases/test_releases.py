"""Every release is read as a manifest: checked on small synthetic copies, and on the real label tables if present."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
from pydicom.data import get_testdata_file

from vitmodel.data.lesions import boxes_from_text
from vitmodel.data.manifest import as_manifest, find_leaks, read_manifest, write_manifest
from vitmodel.data.splits import assign_splits
from vitmodel.errors import UsageError
from vitmodel.jobs.journal import lock_folder
from vitmodel.releases.registry import RELEASE_ADAPTERS, read_release
from vitmodel.releases.source import Source

RSNA_HEADER = (
    "site_id,patient_id,image_id,laterality,view,age,cancer,biopsy,invasive,BIRADS,implant,density,machine_id,"
    "difficult_negative_case\n"
)
TRAIN = (
    RSNA_HEADER
    + "2,10,1,L,CC,61,0,0,0,,0,,29,False\n1,10,2,R,MLO,,1,1,1,0,0,B,49,False\n1,11,3,L,AT,50,0,0,0,1,1,D,49,True\n"
)
TEST = "site_id,patient_id,image_id,laterality,view,age,implant,machine_id,prediction_id\n2,10,9,L,MLO,81,0,21,10_L\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes files (name -> text; "" for an image) below a folder and returns the folder."""

    def write(files: dict[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / "release" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "release"

    return write


def names(table: pd.DataFrame, source: Path) -> list[str]:
    """Return the paths of the table, relative to the source."""
    return [str(Path(path).relative_to(source)) for path in table.path]


def test_rsna_is_read_with_labels_and_lesions(write: Callable[..., Path]) -> None:
    images = {
        "train_images/10/1.dcm": "",
        "train_images/10/2.dcm": "",
        "test_images/10/9.dcm": "",
        "zoomed/10_1.png": "",
    }
    source = write({"train.csv": TRAIN, "test.csv": TEST, **images})
    table = read_release(source)
    assert set(table.dataset) == {"rsna"}
    assert names(table, source) == ["train_images/10/1.dcm", "train_images/10/2.dcm", "train_images/11/3.dcm"], (
        "an image without a file keeps its row"
    )
    assert table.patient_id.tolist() == ["10", "10", "11"]
    assert table.cancer.tolist() == [0, 1, 0]
    assert table.machine_id.tolist() == ["29", "49", "49"]
    assert table["view"].tolist() == ["CC", "MLO", "AT"]
    assert np.isnan(table.age[1])
    assert np.isnan(table.birads[0])
    assert table.density.isna().tolist() == [True, False, False]
    assert table.difficult_negative_case.tolist() == [0, 0, 1]
    assert table.lesions.isna().all()

    lesions = "patient_id,image_id,cancer,x0,y0,x1,y1\n10,2,1,1,2,3,4\n10,2,0,9,9,9,9\n10,2,1,5,6,7,8.5\n"
    (source / "lesions.csv").write_text(lesions)
    boxes = read_release(source).lesions
    assert boxes.isna().tolist() == [True, False, True]
    assert boxes_from_text(boxes[1]).tolist() == [[1, 2, 3, 4], [5, 6, 7, 8.5]], "a benign finding is left out"

    test = read_release(source / "test.csv")
    assert names(test, source) == ["test_images/10/9.dcm"]
    assert test.cancer.isna().all()
    assert test.prediction_id[0] == "10_L"
    (source / "train.csv").unlink()
    assert read_release(source).image_id.tolist() == ["9"], "test.csv is read if there is no train.csv"


@pytest.mark.parametrize("folder", ["images/", "train_images_256/x/", ""])
def test_png_exports_of_rsna_are_found_in_any_folder(write: Callable[..., Path], folder: str) -> None:
    source = write({"train.csv": TRAIN, f"{folder}10_1.png": "", f"{folder}10_2.png": ""})
    assert names(read_release(source), source) == [f"{folder}10_1.png", f"{folder}10_2.png", "train_images/11/3.dcm"]


def test_an_image_folder_of_rsna_is_read_with_the_table_in_its_parent_folder(write: Callable[..., Path]) -> None:
    source = write({"train.csv": TRAIN, "images/10_1.png": "", "images/10_2.png": "", "images/11_3.png": ""})
    assert names(read_release(source / "images"), source / "images") == ["10_1.png", "10_2.png", "11_3.png"]


def test_a_table_with_the_columns_of_rsna_is_read_as_a_subset_of_it(write: Callable[..., Path]) -> None:
    header = "image_path,patient_id,laterality,view,cancer,image_id,machine_id,BIRADS,blank\n"
    rows = header + "images/5_7.jpg,5,L,CC,0,7,21,,1\n"
    row = read_release(write({"mine.csv": rows, "images/5_7.jpg": ""})).iloc[0]
    assert (row.dataset, row.image_id, row.patient_id, row.blank) == ("rsna", "7", "5", "1")
    assert np.isnan(row.birads)


def test_vindr_is_read_with_birads_and_without_cancer(write: Callable[..., Path]) -> None:
    head = "study_id,series_id,image_id,laterality,view_position,height,width,breast_birads,breast_density"
    breasts = (
        f"{head},split\ns1,x,i1,L,CC,9,9,BI-RADS 4,DENSITY C,training\ns2,x,i2,R,MLO,9,9,BI-RADS 1,DENSITY A,test\n"
    )
    finding = "s1,x,i1,L,CC,9,9,BI-RADS 4,DENSITY C"
    findings = f"{head},finding_categories,split\n{finding},\"['Mass']\",training\n"
    findings += f"{finding},\"['Suspicious Calcification', 'Mass']\",training\n"
    findings += "s2,x,i2,R,MLO,9,9,BI-RADS 1,DENSITY A,['No Finding'],test\n"
    source = write(
        {"breast-level_annotations.csv": breasts, "finding_annotations.csv": findings, "images/s1/i1.dicom": ""}
    )
    table = read_release(source)
    assert names(table, source) == ["images/s1/i1.dicom", "images/s2/i2.dicom"]
    assert table.patient_id.tolist() == ["s1", "s2"]
    assert table.split.tolist() == ["train", "test"]
    assert table.birads.tolist() == [4, 1]
    assert table.density.tolist() == ["C", "A"]
    assert table.cancer.isna().all(), "BI-RADS is not pathology"
    assert table.findings[0] == "Mass;Suspicious Calcification"
    assert pd.isna(table.findings[1])


def case_table(kind: str, rows: list[str]) -> str:
    """Return one of the release's four tables; those of calcifications spell a column differently."""
    density = "breast density" if kind == "calc" else "breast_density"
    header = (
        f"patient_id,{density},left or right breast,image view,abnormality id,abnormality type,assessment,pathology,"
        "image file path\n"
    )
    return header + "".join(row + "\n" for row in rows)


def test_cbis_ddsm_has_one_row_per_image_and_no_patient_in_both_splits(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    def row(patient: str, side: str, name: str, assessment: int, pathology: str) -> str:
        return f"{patient},2,{side},CC,1,mass,{assessment},{pathology},{name}/study/series{name}/000000.dcm"

    tables = {
        "mass_case_description_train_set.csv": case_table(
            "mass",
            [
                row("P1", "LEFT", "M1", 4, "BENIGN"),
                row("P1", "LEFT", "M1", 5, "MALIGNANT"),
                row("P2", "LEFT", "M2", 2, "BENIGN"),
            ],
        ),
        "mass_case_description_test_set.csv": case_table(
            "mass", [row("P3", "RIGHT", "M3", 0, "BENIGN_WITHOUT_CALLBACK")]
        ),
        "calc_case_description_train_set.csv": case_table("calc", [row("P4", "LEFT", "C4", 4, "BENIGN")]),
        "calc_case_description_test_set.csv": case_table("calc", [row("P2", "LEFT", "C2", 5, "MALIGNANT")]),
    }
    source = write({**tables, "M1/date-NA/1-NA/1-1.dcm": "", "jpeg/seriesM2/x.jpg": ""})
    table = read_release(source).set_index("image_id")
    assert table.path["M1"] == str(source / "M1/date-NA/1-NA/1-1.dcm")
    assert table.path["M2"] == str(source / "jpeg/seriesM2/x.jpg")
    assert len(table) == 5
    assert table.cancer.to_dict() == {"M1": 1, "M2": 1, "M3": 0, "C4": 0, "C2": 1}, "a film in both sets has one label"
    assert table.birads.to_dict() == {"M1": 5, "M2": 2, "M3": 0, "C4": 4, "C2": 5}
    assert table.abnormalities["M1"] == 2
    assert table.laterality["M3"] == "R"
    assert set(table.density) == {"B"}
    assert table.split.to_dict() == {"M1": "train", "M2": "test", "M3": "test", "C4": "train", "C2": "test"}
    assert table.official_split["M2"] == "train"
    assert find_leaks(table.reset_index()).empty
    assert "1 patients" in caplog.text


def test_inbreast_takes_patients_from_file_names(write: Callable[..., Path]) -> None:
    head = "Patient ID;Patient age;Laterality;View;Acquisition date;File Name;ACR;Bi-Rads\n"
    rows = "removed;removed;R;CC;201001;111;4;4a\nremoved;removed;L;MLO;201001;222;  ;6 \n"
    rows += "removed;removed;L;FB;201001;333;1;1\n"
    images = {"AllDICOMs/111_abc_MG_R_CC_ANON.dcm": "", "AllDICOMs/222_abc_MG_L_ML_ANON.dcm": ""}
    source = write({"INbreast.csv": head + rows, **images})
    table = read_release(source)
    assert names(table, source) == [*images, "AllDICOMs/333.dcm"]
    assert table.patient_id.tolist() == ["abc", "abc", "333"]
    assert table.birads.tolist() == [4, 6, 1]
    assert table.birads_text[0] == "4a"
    assert table.cancer.isna().all()
    assert table.density.tolist()[::2] == ["D", "A"]
    assert pd.isna(table.density[1])


def test_cmmd_joins_labels_per_breast_with_images(write: Callable[..., Path]) -> None:
    header = "ID1,LeftRight,Age,number,abnormality,classification,subtype\n"
    rows = "D1-1,L,44,2,mass,Malignant,Luminal A\nD1-2,R,50,2,both,Benign,\n"
    source = write({"cmmd_raw_label.csv": header + rows})
    table = read_release(source)
    assert table.patient_id.tolist() == ["D1-1", "D1-2"], "a breast without images has a row, to be refused"
    assert table.cancer.tolist() == [1, 0]

    # A DICOM file that is not a mammogram, so that the side is unknown
    content = Path(str(get_testdata_file("MR_small.dcm", download=False))).read_bytes()
    (source / "D1-1" / "07-18-2010").mkdir(parents=True)
    (source / "D1-1" / "07-18-2010" / "1-1.dcm").write_bytes(content)
    table = read_release(source).sort_values("laterality")
    assert table.patient_id.tolist() == ["D1-1", "D1-1", "D1-2"]
    assert table.laterality.tolist() == ["", "L", "R"]
    assert table.cancer.isna().tolist() == [True, False, False], (
        "an image whose breast is not in the table has no label"
    )


def test_mias_is_read_with_boxes_of_malignant_findings(write: Callable[..., Path]) -> None:
    head = "image_path,patient_id,laterality,view,image_id,density_FGD,severity,x,y_top_left,radius\n"
    rows = "images/a.png,m1,L,MLO,a,D,M,20,30,5\nimages/b.png,m1,R,MLO,b,F,B,20,30,5\nimages/c.png,m2,L,MLO,c,G,N,,,\n"
    table = read_release(write({"mias.csv": head + rows}))
    assert set(table.dataset) == {"mias"}
    assert table.cancer.tolist() == [1, 0, 0]
    assert table.density.isna().all()
    assert table.lesions.fillna("").tolist() == ["15 25 25 35", "", ""]


def test_class_folders_give_labels_and_file_names_give_patients(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    source = write({"positive/7_1.png": "", "negative/7_2.png": "", "negative/8_1.png": "", "notes.txt": "x"})
    table = read_release(source).set_index("image_id")
    assert table.cancer.to_dict() == {"7_1": 1, "7_2": 0, "8_1": 0}
    assert table.patient_id.to_dict() == {"7_1": "7", "7_2": "7", "8_1": "8"}
    assert set(table.laterality) == {""}
    assert not caplog.records
    (source / "negative" / "other.png").touch()
    assert read_release(source).patient_id.is_unique
    assert "patient of its own" in caplog.text


def test_class_folders_in_split_folders_keep_the_split(write: Callable[..., Path]) -> None:
    files = ["train/0/0_1.png", "train/1/0_1.png", "test/0/1_1.png", "test/1/1_1.png"]
    source = write(dict.fromkeys(files, ""))
    table = read_release(source)
    assert table.split.tolist() == ["test", "test", "train", "train"]
    assert table.cancer.tolist() == [0, 1, 0, 1]
    assert table.image_id.tolist() == ["test-0-1_1.png", "test-1-1_1.png", "train-0-0_1.png", "train-1-0_1.png"], (
        "repeated names are made unique"
    )


def test_folders_0_and_1_below_others_are_patients_and_not_classes(write: Callable[..., Path]) -> None:
    source = write({"negative/1/a.png": "", "positive/2/b.png": ""})
    assert read_release(source).cancer.tolist() == [0, 1], "the outermost class folder gives the label"
    assert not RELEASE_ADAPTERS["class_folders"].detect(
        Source(write({"x/0/a.png": "", "x/1/a.png": "", "x/2/a.png": ""}) / "x")
    )


def test_images_without_a_table_are_read_from_headers_and_paths(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    source = write(
        {
            "a/broken.dcm": "not a DICOM file",
            "b/1_2.png": "",
            "b/2.png": "",
            "labels.csv": "file,cancer\n",
            "b/1_2_mask.png": "",
            "Masks/3.png": "",
            "b/Thumbs.pkl": "",
            "b/README": "x",
            "dicomdir": "x",
        }
    )
    cv2.imwrite(str(source / "b" / "2.png"), np.zeros((4, 4), np.uint8))
    (source / "b" / "1.2.840.7").write_bytes(Path(str(get_testdata_file("MR_small.dcm", download=False))).read_bytes())
    (source / "b" / "loop").symlink_to(source)
    with lock_folder(source / "out"):  # the output folder of a run, inside its own source
        (source / "out" / "images").mkdir()
        shutil.copy(source / "b" / "2.png", source / "out" / "images")
    table = read_release(source)
    assert names(table, source) == ["a/broken.dcm", "b/1.2.840.7", "b/1_2.png", "b/2.png"]
    assert table.patient_id.tolist()[::2] == ["a", "1"]
    assert table.patient_id[3] == "b"
    assert table.cancer.isna().all()
    assert "b/Thumbs.pkl, labels.csv" in caplog.text, "files that may hold labels are named in a warning"
    assert f"{source / 'out'} is skipped" in caplog.text
    assert len(read_release(source / "out")) == 1, "it is read if it is the source itself"

    single_file = read_release(source / "b" / "2.png")
    assert single_file.path.tolist() == [str(source / "b" / "2.png")]
    assert single_file.patient_id.tolist() == ["2"]


def test_a_manifest_is_a_source(tmp_path: Path) -> None:
    rows = {
        "image_id": ["1", "2"],
        "patient_id": "p",
        "laterality": ["L", "R"],
        "view": "CC",
        "path": [str(tmp_path / "1.png"), "/x/2.png"],
    }
    manifest = as_manifest(pd.DataFrame(rows).assign(dataset="mine", cancer=[0, 1]), "table")
    write_manifest(manifest, tmp_path / "manifest.csv")
    for source in (tmp_path, tmp_path / "manifest.csv"):
        pd.testing.assert_frame_equal(read_release(source), read_manifest(tmp_path / "manifest.csv"))


def test_an_unreadable_source_is_a_usage_error_with_the_reason(write: Callable[..., Path], tmp_path: Path) -> None:
    source = write(
        {
            "empty/.hidden": "",
            "rsna/train.csv": "patient_id,image_id,view\n1,2,CC\n",
            "own.csv": "path,cancer\na.png,1\n",
        }
    )
    write(
        {
            "vindr/breast-level_annotations.csv": "study_id\n1\n",
            "cbis/mass_case_description_train_set.csv": "patient_id\n",
            "note.csv": "",
        }
    )
    write(
        {
            "none/train.csv": RSNA_HEADER,
            "two/a.csv": "path,patient_id\na.png,1\n",
            "two/b.csv": "path,patient_id\na.png,1\n",
        }
    )
    for name, words in {
        "absent": ["absent", "does not exist"],
        "empty": ["empty", "rsna: train.csv", "dicom_folder: at least one"],
        "rsna": ["train.csv", "column laterality"],
        "vindr": ["breast-level_annotations.csv", "column image_id"],
        "cbis": ["mass_case_description_train_set.csv", "column breast_density"],
        "none": ["train.csv", "no rows"],
        "two": ["a.csv, b.csv"],
        "own.csv": ["own.csv", "patient_id"],
    }.items():
        with pytest.raises(UsageError) as error:
            read_release(source / name)
        assert all(word in str(error.value) for word in words), (name, str(error.value))
    with pytest.raises(UsageError, match="choose auto, vindr"):
        read_release(source, "bcdr")
    with pytest.raises(UsageError, match=r"vindr: breast-level_annotations.csv"):
        read_release(source / "empty", "vindr")


def test_reading_a_full_size_release_makes_no_file_system_call_per_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patients = np.arange(11913)  # as many patients and images as the RSNA release has
    rows = pd.DataFrame({"patient_id": np.resize(np.repeat(patients, 5), 54706), "image_id": np.arange(54706)})
    cancer = (rows.patient_id % 40 == 0).astype(int)
    rows.assign(laterality="L", view="CC", cancer=cancer, site_id=1, machine_id=rows.patient_id % 10).to_csv(
        tmp_path / "train.csv", index=False
    )
    folders = range(0, 11913, 20)  # every 20th folder exists
    for patient in folders:
        (tmp_path / "train_images" / str(patient)).mkdir(parents=True)
    calls: Counter[str] = Counter()
    for name in ("scandir", "stat"):
        count_calls(os, name, calls, monkeypatch)
    table = assign_splits(read_release(tmp_path))
    assert len(table) == 54706
    assert len(folders) < calls["scandir"] < 3 * len(folders)
    assert calls["stat"] < 10 * len(folders)


def count_calls(module: ModuleType, name: str, calls: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the calls of a function of `module` in `calls`, for the rest of the test."""
    function = getattr(module, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)


EXPECTED_COUNTS = {  # rows, patients, cancer (1, 0, unknown), split (train, test)
    "metadata/rsna": (51844, 11310, (820, 51024, 0), (0, 0)),
    "metadata/rsna/test.csv": (4, 1, (0, 0, 4), (0, 0)),
    "metadata/vindr": (20000, 5000, (0, 0, 20000), (16000, 4000)),
    "metadata/cbis_ddsm": (3103, 1566, (1391, 1712, 0), (2394, 709)),
    "metadata/inbreast": (410, 410, (0, 0, 410), (0, 0)),
    "metadata/cmmd": (1872, 1775, (1316, 556, 0), (0, 0)),
    "mias_512": (194, 97, (31, 163, 0), (0, 0)),
    "rsna_640": (1721, 526, (820, 901, 0), (0, 0)),
    "rsna_crop256": (1626, 1108, (820, 806, 0), (0, 0)),
    "rsna_dicom": (8, 3, (0, 6, 2), (0, 0)),
}


@pytest.mark.parametrize("name", EXPECTED_COUNTS)
def test_the_real_tables_have_the_known_counts_and_no_leak(shared_data: Path, name: str) -> None:
    table = read_release(shared_data / name)
    cancer = table.cancer
    cancer_counts = ((cancer == 1).sum(), (cancer == 0).sum(), cancer.isna().sum())
    split_counts = ((table.split == "train").sum(), (table.split == "test").sum())
    assert (len(table), table.patient_id.nunique(), cancer_counts, split_counts) == EXPECTED_COUNTS[name]
    assert find_leaks(table).empty
    assert set(table.laterality) == {"L", "R"}
    assert all(map(os.path.exists, table.path)) == (not name.startswith("metadata"))
    if name in ("metadata/rsna", "mias_512", "rsna_crop256"):
        parts = assign_splits(table)
        rates = parts.groupby("split").cancer.mean() / table.cancer.mean()
        assert find_leaks(parts).empty
        assert rates.between(0.75, 1.25).all(), rates


def test_the_official_test_split_of_cbis_ddsm_is_kept(shared_data: Path) -> None:
    table = read_release(shared_data / "metadata" / "cbis_ddsm")
    assert (table.split[table.official_split == "test"] == "test").all()
    moved = table[table.split != table.official_split]
    assert (len(moved), moved.patient_id.nunique()) == (64, 31)
    assert (table.groupby(["patient_id", "laterality", "view"]).cancer.nunique() == 1).all(), (
        "each of the 71 films in both sets has one label"
    )


def test_dicom_files_next_to_an_unknown_table_are_read_from_their_headers(shared_data: Path) -> None:
    table = read_release(shared_data / "dicom_edge")
    assert len(table) == 9
    assert (table.laterality != "").sum() == 5, "the side of a refused image is kept"
    assert set(table["view"]) == {"CC", "MLO", ""}
