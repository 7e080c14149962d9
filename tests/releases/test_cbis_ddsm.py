"""CBIS-DDSM: the layouts of TCIA and of Kaggle give the same manifest, with boxes from the masks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
from fixture_types import Draw
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from vitmodel.errors import UsageError
from vitmodel.releases.registry import read_release

COLUMNS = (
    "patient_id,breast_density,left or right breast,image view,abnormality id,abnormality type,mass shape,mass margins,"
    "assessment,pathology,subtlety,image file path,cropped image file path,ROI mask file path"
)
SERIES = "1.3.6.1.4.1.9590.100.1.2."
CASE_TABLES = [f"{kind}_case_description_{part}_set.csv" for kind in ("mass", "calc") for part in ("train", "test")]
EMPTY_TABLES = dict.fromkeys(CASE_TABLES, COLUMNS + "\n")


class Abnormality(NamedTuple):
    """A row of a table; `number` makes the ids of its series."""

    table: str
    film: str
    number: int
    abnormality: int
    pathology: str
    box: tuple[int, int, int, int]


ABNORMALITIES = [
    Abnormality(CASE_TABLES[0], "Mass-Training_P_00001_LEFT_CC", 1, 1, "MALIGNANT", (4, 6, 10, 20)),
    Abnormality(CASE_TABLES[0], "Mass-Training_P_00001_LEFT_CC", 1, 2, "BENIGN", (20, 30, 25, 40)),
    Abnormality(CASE_TABLES[3], "Calc-Test_P_00002_RIGHT_MLO", 2, 1, "BENIGN_WITHOUT_CALLBACK", (1, 2, 6, 9)),
]


def table_row(row: Abnormality) -> str:
    _, patient, number, side, view = row.film.split("_")
    film = f"{row.film}/study/{SERIES}{row.number}/000000.dcm"
    part = f"{row.film}_{row.abnormality}/study/{SERIES}{row.number}.{row.abnormality}"
    kind = "calcification" if row.film.startswith("Calc") else "mass"
    start = f"{patient}_{number},3,{side},{view},{row.abnormality},{kind},X,Y,4,{row.pathology},4"
    return f'{start},{film},"{part}/000000.dcm\n","{part}/000001.dcm\n"\n'


def write_tables(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, header in EMPTY_TABLES.items():
        (folder / name).write_text(header + "".join(table_row(row) for row in ABNORMALITIES if row.table == name))


def draw_kaggle(draw: Draw, folder: str) -> None:
    """Write films, masks and crops as JPEG files in folders of their series."""
    for row in ABNORMALITIES:
        draw(f"{folder}/jpeg/{SERIES}{row.number}/1-001.jpg")
        part = f"{folder}/jpeg/{SERIES}{row.number}.{row.abnormality}"
        draw(f"{part}/1-002.jpg")
        draw(f"{part}/2-003.jpg", row.box)


def write_dicom(path: Path, pixels: np.ndarray, description: str) -> None:
    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = generate_uid(entropy_srcs=[str(path)])
    file.Modality = "MG"
    file.BodyPartExamined = "BREAST"
    file.SeriesDescription = description
    file.set_pixel_data(pixels, "MONOCHROME2", 8 * pixels.itemsize)
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)


def write_tcia(draw: Draw, folder: str) -> None:
    """Write films, masks and crops as DICOM files as the NBIA Data Retriever does; the order of the last two varies."""
    film = cv2.imread(str(draw("film.png")), cv2.IMREAD_UNCHANGED)
    base = draw(f"{folder}/manifest-123/metadata.png").parent / "CBIS-DDSM"
    (base.parent / "metadata.png").unlink()
    for row in ABNORMALITIES:
        full = base / row.film / "07-20-2016-DDSM-NA-1" / "1.000000-full mammogram images-2" / "1-1.dcm"
        write_dicom(full, film.astype(np.uint16) * 256, "full mammogram images")
        part = base / f"{row.film}_{row.abnormality}" / "07-20-2016-DDSM-NA-3" / "1.000000-ROI mask images-4"
        mask = cv2.imread(str(draw("mask.png", row.box)), cv2.IMREAD_UNCHANGED)
        names = ("1-1.dcm", "1-2.dcm") if row.abnormality == 1 else ("1-2.dcm", "1-1.dcm")
        write_dicom(part / names[0], mask, "ROI mask images")
        write_dicom(part / names[1], film[:24, :20].astype(np.uint16), "cropped images")


@pytest.mark.parametrize("layout", ["TCIA", "Kaggle", "the folder jpeg/ of Kaggle"])
def test_both_layouts_give_films_labels_and_boxes(tmp_path: Path, draw: Draw, layout: str) -> None:
    source = tmp_path / "release"
    if layout == "TCIA":
        write_tcia(draw, "release")
        write_tables(source)
    else:
        draw_kaggle(draw, "release")
        write_tables(source / "csv")
        (source / "csv" / "dicom_info.csv").write_text("file_path,image_path,PatientID\nx,y,z\n")
        source = source / "jpeg" if layout != "Kaggle" else source
    table = read_release(source).set_index("image_id")
    assert set(table.dataset) == {"cbis_ddsm"}
    assert table.index.tolist() == ["Mass-Training_P_00001_LEFT_CC", "Calc-Test_P_00002_RIGHT_MLO"]
    folders = [Path(path).parts[-4 if layout == "TCIA" else -2] for path in table.path]
    assert folders == (list(table.index) if layout == "TCIA" else [f"{SERIES}1", f"{SERIES}2"])
    assert table.patient_id.tolist() == ["P_00001", "P_00002"]
    assert table.laterality.tolist() == ["L", "R"]
    assert table["view"].tolist() == ["CC", "MLO"]
    assert table.split.tolist() == ["train", "test"]
    assert table.cancer.tolist() == [1, 0]
    assert table.findings.tolist() == ["mass", "calcification"]
    assert table.lesions.fillna("").tolist() == ["4 6 10 20", ""]
    assert table.finding_boxes.tolist() == ["20 30 25 40", "1 2 6 9"]


def test_without_the_tables_the_folders_of_tcia_are_read_and_a_warning_names_the_tables(
    tmp_path: Path, draw: Draw, caplog: pytest.LogCaptureFixture
) -> None:
    write_tcia(draw, "release")
    table = read_release(tmp_path / "release")
    assert table.image_id.tolist() == ["Calc-Test_P_00002_RIGHT_MLO", "Mass-Training_P_00001_LEFT_CC"]
    assert all("full mammogram" in path for path in table.path), "masks and crops are no films"
    assert table.patient_id.tolist() == ["P_00002", "P_00001"]
    assert table.split.tolist() == ["test", "train"]
    assert table.cancer.isna().all()
    assert all(name in caplog.text for name in CASE_TABLES)


def test_without_the_tables_the_series_of_kaggle_are_refused(tmp_path: Path, draw: Draw) -> None:
    draw_kaggle(draw, "release")
    with pytest.raises(UsageError, match=r"mass_case_description_train_set.csv.* only they tell films from masks"):
        read_release(tmp_path / "release")


def test_a_missing_table_is_named_with_its_source(tmp_path: Path, draw: Draw) -> None:
    draw_kaggle(draw, "release")
    write_tables(tmp_path / "release")
    (tmp_path / "release" / CASE_TABLES[2]).unlink()
    with pytest.raises(UsageError, match=r"calc_case_description_train_set.csv is missing; get .* from doi.org"):
        read_release(tmp_path / "release")


def test_a_film_without_its_mask_has_a_row_without_boxes(tmp_path: Path, draw: Draw) -> None:
    draw_kaggle(draw, "release")
    write_tables(tmp_path / "release")
    shutil.rmtree(tmp_path / "release" / "jpeg" / f"{SERIES}1.1")
    table = read_release(tmp_path / "release")
    assert len(table) == 2
    assert table.lesions.isna().all()
