"""Releases are read in the layout in which they are downloaded: folders, spreadsheets, outlines, sets of pictures."""

from __future__ import annotations

import json
import plistlib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openpyxl
import pandas as pd
import pytest
import xlwt
from pydicom import Dataset, FileMetaDataset
from pydicom.uid import DigitalMammographyXRayImageStorageForPresentation, ExplicitVRLittleEndian

from vitmodel.errors import UsageError
from vitmodel.releases.registry import read_release

ROWS, COLUMNS = 60, 50


def write_text(path: Path, text: str) -> Path:
    """Write a file and the folders above it; return the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def write_picture(path: Path, shape: tuple[int, int] = (ROWS, COLUMNS)) -> None:
    write_text(path, "")
    path.write_bytes(cv2.imencode(path.suffix, np.zeros(shape, np.uint8))[1].tobytes())


def write_dicom(path: Path, **tags: Any) -> None:
    """Write a small mammogram without any pixel of interest."""
    write_text(path, "")
    ds = Dataset()
    ds.SOPClassUID = DigitalMammographyXRayImageStorageForPresentation
    ds.SOPInstanceUID = f"1.2.{zlib.crc32(bytes(path))}"
    ds.StudyInstanceUID = "1.2.4"
    ds.SeriesInstanceUID = "1.2.5"
    ds.Modality = "MG"
    ds.Rows, ds.Columns = ROWS, COLUMNS
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit = 7
    ds.PixelRepresentation = 0
    ds.PixelData = bytes(ROWS * COLUMNS)
    ds["PixelData"].VR = "OB"
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.save_as(path, enforce_file_format=True)


def write_xlsx(path: Path, sheets: dict[str, list[list[Any]]]) -> None:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    write_text(path, "")
    book.save(path)


def known(values: pd.Series) -> dict[str, Any]:
    """Return the values that are not NaN, by the table's index."""
    return values.dropna().to_dict()


# --- CMMD and TOMPEI-CMMD

CMMD_HEAD = ["ID1", "LeftRight", "Age", "number", "abnormality", "classification", "subtype"]
CMMD_ROWS = [
    ["D1-7001", "L", 40, 2, "mass", "Benign", None],
    ["D1-7001", "R", 40, 2, "mass", "Malignant", "Luminal A"],
    ["D2-7002", "L", 61, 4, "both", "Malignant", "HER2-enriched"],
]


def write_cmmd_images(folder: Path) -> Path:
    """Write the CC and MLO view of both breasts of two patients, as the NBIA Data Retriever does."""
    views = {"CC": ("399162004", "cranio-caudal"), "MLO": ("399368009", "medio-lateral oblique")}
    for patient, age in (("D1-7001", "040Y"), ("D2-7002", "061Y")):
        for number, (side, view) in enumerate([("L", "CC"), ("L", "MLO"), ("R", "CC"), ("R", "MLO")], 1):
            code = Dataset()
            code.CodeValue, code.CodeMeaning = views[view]
            code.CodingSchemeDesignator = "SCT"
            write_dicom(
                folder / "CMMD" / patient / "07-18-2010-NA-NA-79377" / "1.000000-NA-70244" / f"1-{number}.dcm",
                PatientID=patient,
                PatientAge=age,
                ImageLaterality=side,
                ViewCodeSequence=[code],
                ManufacturerModelName="Senographe",
            )
    write_text(folder / "metadata.csv", "Series UID,Collection\n1.2.3,CMMD\n")
    return folder


@pytest.mark.parametrize("place", ["manifest-1616/CMMD_clinicaldata_revision.xlsx", "CMMD_clinicaldata_revision.xlsx"])
def test_cmmd_is_read_with_its_spreadsheet_in_or_above_the_manifest_folder(
    tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_cmmd_images(tmp_path / "manifest-1616")
    write_xlsx(tmp_path / place, {"Sheet1": [CMMD_HEAD, *CMMD_ROWS]})
    for source in (tmp_path, tmp_path / "manifest-1616"):
        table = read_release(source)
        assert not [record for record in caplog.records if record.levelname == "WARNING"]
        assert set(table.dataset) == {"cmmd"}
        assert len(table) == 8
        breasts = table.set_index(table.patient_id + table.laterality + table["view"])
        labelled = {"D1-7001L": 0, "D1-7001R": 1, "D2-7002L": 1}
        expected = {breast + view: cancer for breast, cancer in labelled.items() for view in ("CC", "MLO")}
        assert known(breasts.cancer) == expected, "a breast that is not in the table is unknown"
        assert breasts.age[["D1-7001LCC", "D2-7002RCC"]].tolist() == [40, 61]
        assert set(breasts.machine_id) == {"Senographe"}
        assert breasts.subtype["D2-7002LCC"] == "HER2-enriched"


@pytest.mark.parametrize(("separator", "encoding"), [(",", "utf-8-sig"), (";", "cp1252")])
def test_the_table_of_cmmd_may_be_saved_as_csv(tmp_path: Path, separator: str, encoding: str) -> None:
    lines = [separator.join("" if cell is None else str(cell) for cell in row) for row in [CMMD_HEAD, *CMMD_ROWS]]
    (tmp_path / "CMMD_clinicaldata_revision.csv").write_bytes("\r\n".join(lines).encode(encoding))
    assert read_release(tmp_path).cancer.tolist() == [0, 1, 1]


def outline(*points: tuple[float, float], label: str = "mass") -> dict[str, Any]:
    return {"label": label, "cgPoints": [{"x": x, "y": y} for x, y in points]}


def test_tompei_cmmd_corrects_the_labels_of_cmmd_and_outlines_its_lesions(tmp_path: Path) -> None:
    write_cmmd_images(tmp_path / "manifest-1616")
    write_xlsx(tmp_path / "CMMD_clinicaldata_revision.xlsx", {"Sheet1": [CMMD_HEAD, *CMMD_ROWS]})
    head = [
        ["ID", "LeftRight", "Age", "classification", None, "Breast density", "Mass", None, "BI-RADS\nCategory"],
        [None, None, None, None, "Exclusion reasons", None, "Shape", "Margin", None],
    ]
    rows = [
        ["D1-7001", "L", 40, "Normal", None, "fatty", None, None, "1"],
        ["D1-7001", "R", 40, "Malignant", None, "scattered", "oval", None, "4C"],
        ["D2-7002", "L", 61, "Invisible", None, "heterogeneous dense", None, None, "0"],
        ["D2-7002", "R", 61, "Exclusion", "implant", "extremely dense", None, None, None],
    ]
    sheets = {"README": [["text"]], "Imaging Diagnosis Details Sheet": head + rows, "Lesion Details Sheet": [["ID1"]]}
    write_xlsx(tmp_path / "TOMPEI" / "TOMPEI-CMMD_clinical_data_v01_20250121.xlsx", sheets)
    outlines = {
        "D1-7001_MLO_R": [outline((10, 20), (30, 20.5), (30, 50)), outline((1, 1), (4, 3), label="calc ")],
        "D1-7001_MLO_L": [outline((5, 6), (7, 8), label="FA")],
    }
    for name, entries in outlines.items():
        write_text(tmp_path / "TOMPEI" / f"{name}_AnnotationFile.json", json.dumps(entries))
    table = read_release(tmp_path)
    pd.testing.assert_frame_equal(read_release(tmp_path / "manifest-1616"), table)
    assert len(table) == 8
    images = table.set_index(table.patient_id + table.laterality + table["view"])
    mlo = images[images["view"] == "MLO"]
    assert known(mlo.cancer) == {"D1-7001LMLO": 0, "D1-7001RMLO": 1, "D2-7002LMLO": 1}, "an excluded breast is unknown"
    assert known(images.cancer[images["view"] == "CC"]) == {"D1-7001LCC": 0, "D1-7001RCC": 1, "D2-7002LCC": 1}
    assert mlo.density.tolist() == ["A", "B", "C", "D"]
    assert known(mlo.birads) == {"D1-7001LMLO": 1, "D1-7001RMLO": 4, "D2-7002LMLO": 0}
    assert known(images.lesions) == {"D1-7001RMLO": "10 20 30 50;1 1 4 3"}
    assert known(images.finding_boxes) == {"D1-7001LMLO": "5 6 7 8"}, "only in the outlined view"
    assert known(images.findings) == {"D1-7001RMLO": "calc;mass", "D1-7001LMLO": "FA"}


# --- mini-MIAS

INFO = """REFNUM BG CLASS SEVERITY X Y RADIUS
mdb001 G CIRC B 20 15 5
mdb002 G NORM
mdb005 F CIRC B 30 20 2
mdb005 F SPIC M 25 50 4
mdb059 F CIRC B *NOTE 3*
mdb245 D CALC M *NOTE 3*
some text about the notes
"""


@pytest.mark.parametrize(
    ("info", "films"),
    [("Info.txt", "mdb{:03d}.pgm"), ("Info.txt", "mdb{:03d}.png"), ("Info.txt", "all-mias/mdb{:03d}lm.png")],
)
def test_the_films_of_mini_mias_are_read_with_info_txt(tmp_path: Path, info: str, films: str) -> None:
    write_text(tmp_path / info, INFO)
    for number in (1, 2, 5, 59):
        write_picture(tmp_path / films.format(number))
    table = read_release(tmp_path).set_index("image_id")
    assert set(table.dataset) == {"mias"}
    assert known(table.cancer) == {"mdb001": 0, "mdb002": 0, "mdb005": 1, "mdb059": 0, "mdb245": 1}, "the worst counts"
    assert known(table.laterality) == {"mdb001": "L", "mdb002": "R", "mdb005": "L", "mdb059": "L", "mdb245": "L"}
    assert set(table["view"]) == {"MLO"}
    assert table.patient_id["mdb001"] == table.patient_id["mdb002"]
    assert table.patient_id.nunique() == 4
    assert table.path["mdb005"] == str(tmp_path / films.format(5))
    assert known(table.lesions) == {"mdb005": f"21 {ROWS - 50 - 4} 29 {ROWS - 50 + 4}"}, "y counts from the bottom"
    assert known(table.finding_boxes) == {
        "mdb001": f"15 {ROWS - 15 - 5} 25 {ROWS - 15 + 5}",
        "mdb005": f"28 {ROWS - 20 - 2} 32 {ROWS - 20 + 2}",
    }
    assert table.findings["mdb005"] == "CIRC;SPIC"
    assert pd.isna(table.findings["mdb002"])
    assert table.density_FGD["mdb245"] == "D"
    assert table.density.isna().all()


def test_circles_of_mini_mias_are_left_out_for_resized_films(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_text(tmp_path / "Info.txt", INFO)
    write_picture(tmp_path / "mdb005.png", (ROWS // 2, COLUMNS // 2))
    table = read_release(tmp_path)
    assert table.lesions.isna().all()
    assert table.cancer.sum() == 2
    assert "another size" in caplog.text


# --- INbreast

INBREAST_HEAD = ["Patient ID", "Patient age", "Laterality", "View", "Acquisition date", "File Name", "ACR", "Bi-Rads"]
INBREAST_ROWS = [
    ["removed", "removed", "R", "CC", 201001, 11110001, 4, "1"],
    ["removed", "removed", "L", "MLO", 201001, 11110002, 2, "4c"],
]


def write_inbreast_csv(folder: Path) -> None:
    lines = [";".join(map(str, row)) for row in [INBREAST_HEAD, *INBREAST_ROWS]]
    write_text(folder / "INbreast.csv", "\n".join(lines))


def write_inbreast_xls(folder: Path) -> None:
    book = xlwt.Workbook()
    sheet = book.add_sheet("Sheet1")
    rows = [[*INBREAST_HEAD, "Mass "], *INBREAST_ROWS, [""], ["Note: 4a, 4b and 4c are 4"]]
    for row, cells in enumerate(rows):
        for column, cell in enumerate(cells):
            sheet.write(row, column, cell)
    book.save(str(folder / "INbreast.xls"))


@pytest.mark.parametrize("write_table", [write_inbreast_csv, write_inbreast_xls])
@pytest.mark.parametrize("source", ["INbreast Release 1.0", "."])
def test_inbreast_is_read_from_csv_or_xls_with_boxes_of_its_outlines(
    tmp_path: Path, write_table: Callable[[Path], None], source: str
) -> None:
    folder = tmp_path / "INbreast Release 1.0"
    for name in ("11110001_aaaa1111bbbb2222_MG_R_CC_ANON.dcm", "11110002_aaaa1111bbbb2222_MG_L_ML_ANON.dcm"):
        write_text(folder / "AllDICOMs" / name, "")
    rois = [
        {"Name": "Mass", "Point_px": ["(4.0, 6.5)", "(8.0, 6.5)", "(8.0, 11.0)"]},
        {"Name": "Calcification", "Point_px": ["(2.0, 3.0)"]},
        {"Name": "Point 1", "Point_px": ["(1.0, 1.0)", "(2.0, 2.0)"]},
    ]
    write_text(folder / "AllXML" / "11110002.xml", plistlib.dumps({"Images": [{"ROIs": rois}]}).decode())
    write_text(folder / "MedicalReports" / "aaaa1111bbbb2222.txt", "x")
    write_table(folder)
    table = read_release(tmp_path / source).set_index("image_id")
    assert set(table.dataset) == {"inbreast"}
    assert table.patient_id.tolist() == ["aaaa1111bbbb2222"] * 2
    assert table["view"].tolist() == ["CC", "MLO"]
    assert table.birads.tolist() == [1, 4]
    assert table.birads_text["11110002"] == "4c"
    assert table.density.tolist() == ["D", "B"]
    assert table.cancer.isna().all(), "BI-RADS is not pathology"
    assert known(table.finding_boxes) == {"11110002": "4 6.5 8 11"}
    assert known(table.findings) == {"11110002": "Calcification;Mass"}
    assert table.lesions.isna().all()


# --- VinDr-Mammo

STUDY, OTHER_STUDY = "a" * 32, "b" * 32
IMAGES = {"1" * 32: STUDY, "2" * 32: STUDY, "3" * 32: OTHER_STUDY}


def vindr_rows(fields: str, *rows: str, study: str = "study_id", view: str = "view_position") -> str:
    head = f"{study},image_id,laterality,{view},height,width,breast_birads,breast_density,split"
    return "\n".join([head + fields, *rows]) + "\n"


def vindr_row(image: str, fields: str = "", birads: int = 5) -> str:
    split = "training" if IMAGES[image] == STUDY else "test"
    return f"{IMAGES[image]},{image},L,CC,{ROWS},{COLUMNS},BI-RADS {birads},DENSITY C,{split}{fields}"


FINDING_FIELDS = ",finding_categories,finding_birads,xmin,ymin,xmax,ymax"
FINDING_ROWS = [
    vindr_row("1" * 32, ",['Mass'],BI-RADS 4,2.5,6,6,10.25"),
    vindr_row("1" * 32, ",\"['Skin Thickening', 'Mass']\",BI-RADS 5,0,1,3,4"),
    vindr_row("2" * 32, ",['No Finding'],,,,,"),
    vindr_row("3" * 32, ",['No Finding'],,,,,", birads=1),
]


def check_vindr(table: pd.DataFrame, has_boxes: bool) -> None:
    table = table.set_index("image_id")
    assert set(table.dataset) == {"vindr"}
    assert table.patient_id.tolist() == list(IMAGES.values())
    assert table.split.tolist() == ["train", "train", "test"]
    assert table.birads.tolist() == [5, 5, 1]
    assert set(table.density) == {"C"}
    assert table.cancer.isna().all()
    assert table.lesions.isna().all()
    assert known(table.findings) == {"1" * 32: "Mass;Skin Thickening"}
    assert known(table.finding_birads) == {"1" * 32: 5}
    assert known(table.finding_boxes) == ({"1" * 32: "2.5 6 6 10.25;0 1 3 4"} if has_boxes else {})


def test_vindr_is_read_with_boxes_and_with_age_and_machine_of_its_headers(tmp_path: Path) -> None:
    rows = [vindr_row("1" * 32), vindr_row("2" * 32), vindr_row("3" * 32, birads=1)]
    write_text(tmp_path / "breast-level_annotations.csv", vindr_rows("", *rows))
    write_text(tmp_path / "finding_annotations.csv", vindr_rows(FINDING_FIELDS, *FINDING_ROWS))
    head = "SOP Instance UID,Patient's Age,Manufacturer's Model Name\n"
    headers = f"{'1' * 32},053Y,Mammomat\n{'2' * 32},000Y,Mammomat\n{'3' * 32},,Planmed\n"
    write_text(tmp_path / "metadata.csv", head + headers)
    for image, study in IMAGES.items():
        write_text(tmp_path / "images" / study / f"{image}.dicom", "")
        write_text(tmp_path / "images_png" / study / f"{image}.png", "")
    table = read_release(tmp_path)
    check_vindr(table, has_boxes=True)
    assert all(path.endswith(".dicom") for path in table.path), "the DICOM file wins over its copy"
    assert table.age.fillna(-1).tolist() == [53, -1, -1]
    assert table.machine_id.tolist() == ["Mammomat", "Mammomat", "Planmed"]


@pytest.mark.parametrize("names", [{}, {"study": "patient_id", "view": "view"}])
@pytest.mark.parametrize("shape", [(ROWS, COLUMNS), (ROWS // 2, COLUMNS // 2)])
def test_a_set_of_pictures_of_vindr_has_boxes_only_if_they_have_the_size_of_the_dicom_files(
    tmp_path: Path, shape: tuple[int, int], names: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    write_text(tmp_path / "vindr_detection_v1_folds.csv", vindr_rows(FINDING_FIELDS, *FINDING_ROWS, **names))
    for image, study in IMAGES.items():
        write_picture(tmp_path / "images_png" / study / f"{image}.png", shape)
    table = read_release(tmp_path)
    check_vindr(table, has_boxes=shape == (ROWS, COLUMNS))
    assert ("boxes of findings are left out for 1 pictures" in caplog.text) == (shape != (ROWS, COLUMNS))


# --- EMBED

EMBED_IMAGES = [  # image, patient, exam, side, view, type, spot_mag, ROI_coords
    ("1.1", 71, 5000000000000001, "L", "CC", "2D", "", "[[6, 4, 11, 8]]"),
    ("1.2", 71, 5000000000000001, "R", "CC", "2D", "", "[]"),
    ("1.3", 71, 5000000000000001, "L", "CC", "cview", "", ""),
    ("1.4", 71, 5000000000000002, "L", "MLO", "2D", "", ""),
    ("1.5", 72, 5000000000000003, "L", "ML", "2D", "1", "((1, 2, 3, 4), (5, 6, 7, 8.5))"),
    ("1.6", 72, 5000000000000003, "R", "MLO", "2D", "", ""),
    ("1.7", 73, 5000000000000004, "L", "MLO", "2D", "", ""),
]
EMBED_FINDINGS = [  # patient, exam, side, asses, tissueden, path_severity, bside, age_at_study
    (71, 5000000000000001, "L", "A", "3", "4.0", "L", 51.3),
    (71, 5000000000000001, "L", "S", "3", "0.0", "L", 51.3),
    (71, 5000000000000001, "", "N", "3", "", "", 51.3),
    (71, 5000000000000002, "B", "B", "2.0", "", "", 52.0),
    (72, 5000000000000003, "L", "A", "1", "2", "L", 60.9),
    (72, 5000000000000003, "R", "P", "1", "1.0", "R", 60.9),
    (73, 5000000000000004, "L", "K", "5", "6.0", "L", 45.0),
]


def write_embed(folder: Path, suffix: str = "") -> Path:
    columns = ["image", "empi_anon", "acc_anon", "ImageLateralityFinal", "ViewPosition", "FinalImageType", "spot_mag"]
    images = pd.DataFrame(EMBED_IMAGES, columns=[*columns, "ROI_coords"])
    files = "cohort_1/" + images.empi_anon.astype(str) + "/1.2." + images.acc_anon.astype(str) + "/"
    images["anon_dicom_path"] = "/mnt/NAS2/mammo/anon_dicom/" + files + images.pop("image") + ".dcm"
    images["acc_anon"] = images.acc_anon.astype(float)
    columns = ["empi_anon", "acc_anon", "side", "asses", "tissueden", "path_severity", "bside", "age_at_study"]
    for name, table in {"metadata": images, "clinical": pd.DataFrame(EMBED_FINDINGS, columns=columns)}.items():
        path = folder / "tables" / f"EMBED_OpenData_{name}{suffix}.csv"
        write_text(path, table.assign(another_column="x").to_csv(index=False))
    return folder


@pytest.mark.parametrize("suffix", ["", "_reduced"])
def test_embed_joins_findings_and_images_by_exam_and_side(tmp_path: Path, suffix: str) -> None:
    write_embed(tmp_path, suffix)
    file = "cohort_1/71/1.2.5000000000000001/1.1.dcm"
    write_text(tmp_path / "images" / file, "")
    table = read_release(tmp_path).set_index("image_id")
    assert set(table.dataset) == {"embed"}
    assert table.path["1.1"] == str(tmp_path / "images" / file)
    assert table.patient_id.tolist() == ["71", "71", "71", "71", "72", "72", "73"]
    assert set(table.exam_id[:3]) == {"5000000000000001"}, "the id is no decimal number"
    assert table.exam_id["1.4"] == "5000000000000002"
    assert known(table.cancer) == {"1.1": 1, "1.3": 1, "1.5": 0, "1.6": 1}, (
        "the worst pathology of the side counts; without one, with another disease and in another exam it is unknown"
    )
    assert known(table.birads) == {"1.1": 4, "1.2": 1, "1.3": 4, "1.4": 2, "1.5": 0, "1.6": 3, "1.7": 6}
    assert known(table.density) == {**dict.fromkeys(["1.1", "1.2", "1.3"], "C"), "1.4": "B", "1.5": "A", "1.6": "A"}
    assert table.age.tolist() == [51, 51, 51, 52, 60, 60, 45]
    assert known(table.lesions) == {"1.1": "4 6 8 11"}, "ROI_coords has y before x"
    assert known(table.finding_boxes) == {"1.5": "2 1 4 3;6 5 8.5 7"}
    assert table.FinalImageType["1.3"] == "cview"
    assert known(table.spot_mag) == {"1.5": "1"}


@pytest.mark.parametrize("name", ["clinical", "metadata"])
def test_embed_without_one_of_its_tables_is_refused_with_the_place_to_get_it(tmp_path: Path, name: str) -> None:
    write_embed(tmp_path)
    (tmp_path / "tables" / f"EMBED_OpenData_{name}.csv").unlink()
    with pytest.raises(UsageError, match=rf"EMBED_OpenData_{name}.csv is missing; download it .*s3://embed-dataset"):
        read_release(tmp_path)


# --- RSNA


def test_pictures_of_rsna_are_found_in_a_folder_next_to_that_of_the_table(tmp_path: Path) -> None:
    rows = "patient_id,image_id,laterality,view,cancer\n10,1,L,CC,0\n10,2,R,MLO,1\n"
    write_text(tmp_path / "rsna-breast-cancer-detection" / "train.csv", rows)
    for name in ("512-pngs/10_1.png", "as_pngs/train_images_processed_512/10/2.png"):
        write_text(tmp_path / name, "")
    table = read_release(tmp_path)
    assert table.dataset.tolist() == ["rsna"] * 2
    assert [Path(path).name for path in table.path] == ["10_1.png", "2.png"]
    assert table.cancer.tolist() == [0, 1]
    assert read_release(tmp_path / "512-pngs").cancer.tolist() == [0, 1], "the source may be the folder of pictures"


# --- Images without their table


@pytest.mark.parametrize(
    ("file", "table"),
    {
        "manifest-1/CMMD/D1-0001/07-18-2010-NA/1.0-NA/1-1.dcm": "CMMD_clinicaldata_revision.xlsx",
        f"images/{STUDY}/{'1' * 32}.dicom": "breast-level_annotations.csv",
        "AllDICOMs/11110001_aaaa1111bbbb2222_MG_R_CC_ANON.dcm": "INbreast.csv",
        "images/cohort_1/71/1.2.3/1.2.4.dcm": "EMBED_OpenData_clinical.csv",
        "train_images/10/1.dcm": "train.csv",
    }.items(),
)
def test_a_release_without_its_table_is_read_with_a_warning_that_names_the_table(
    tmp_path: Path, file: str, table: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "release"  # a table next to the source would be read, too
    write_text(source / file, "")
    assert read_release(source).cancer.isna().all()
    assert table in caplog.text
    assert "all labels are unknown" in caplog.text


def test_other_images_without_a_table_are_read_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_text(tmp_path / "release" / "p1" / "1.dcm", "")
    read_release(tmp_path / "release")
    assert not caplog.records
