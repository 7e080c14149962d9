"""CDD-CESM: low-energy images with the pathology of their breast; subtracted images are no mammograms."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from fixture_types import Draw, WriteSheet

from vitmodel.releases.registry import read_release

HEADER = (
    *("Image_name", "Patient_ID", "Side", "Type", "Age", "Breast density (ACR)", "BIRADS", "Findings", "View", "Tags"),
    *("Machine", "Pathology Classification/ Follow up"),
)
FOLDERS = {"DM": "PKG/CDD-CESM/Low energy images of CDD-CESM", "CM": "PKG/CDD-CESM/Subtracted images of CDD-CESM"}


def listed(patient: int, side: str, view: str, pathology: str, birads: str = "4", kind: str = "DM") -> tuple:
    name = f" P{patient}_{side}_{kind}_{view}"
    return (name, patient, side, kind, 57, "c", birads, "text", view, "mass$Asymmetry", 1, pathology)


ROWS = [
    listed(1, "L", "CC", "Malignant"),
    listed(1, "L", "MLO", "Normal", birads="1"),
    listed(1, "L", "CC", "Malignant", kind="CM"),
    listed(1, "R", "CC", "Normal", birads=""),
    listed(2, "R", "MLO", "Benign", birads="2$3"),
    listed(3, "R", "MLO", "", birads="0"),
    listed(4, "R", "CC", "Benign"),
    listed(4, "R", "CC", "Malignant", birads="5"),
]


@pytest.fixture
def release(tmp_path: Path, draw: Draw) -> Path:
    for name, _, _, kind, *_ in ROWS[:5]:
        draw(f"release/{FOLDERS[kind]}/{name.strip()}.jpg")
    return tmp_path / "release"


@pytest.mark.parametrize("gap", ["-", " "])
def test_a_breast_has_the_worst_pathology_of_its_images(release: Path, write_sheet: WriteSheet, gap: str) -> None:
    write_sheet(f"release/Radiology{gap}manual{gap}annotations.xlsx", "all", [HEADER, *ROWS])
    table = read_release(release).set_index("image_id")
    assert set(table.dataset) == {"cdd_cesm"}
    assert table.patient_id.tolist() == ["1", "1", "1", "2", "3", "4"], "an image without a file has a row"
    assert not any("_CM_" in name for name in table.index)
    cancer = table.cancer.fillna(-1).to_dict()
    assert cancer == {
        "P1_L_DM_CC": 1,
        "P1_L_DM_MLO": 1,
        "P1_R_DM_CC": 0,
        "P2_R_DM_MLO": 0,
        "P3_R_DM_MLO": -1,
        "P4_R_DM_CC": 1,
    }
    assert table.birads.fillna(-1).tolist() == [4, 1, -1, 3, 0, 5]
    first = table.loc["P1_L_DM_CC"]
    assert (first.laterality, first["view"], first.density, first.age) == ("L", "CC", "C", 57)
    assert first.findings == "mass;Asymmetry"
    assert first.path == str(release / FOLDERS["DM"] / "P1_L_DM_CC.jpg")


def test_outlines_of_malignant_images_are_lesions_and_others_are_findings(
    release: Path, write_sheet: WriteSheet
) -> None:
    write_sheet("release/Radiology-manual-annotations.xlsx", "all", [HEADER, *ROWS])
    shapes = [
        ("P1_L_DM_CC.jpg", {"name": "polygon", "all_points_x": [3, 9, 5], "all_points_y": [10, 12, 20]}),
        ("P1_L_DM_CC .jpg", {"name": "ellipse", "cx": 20, "cy": 30, "rx": 4, "ry": 6}),
        ("P2_R_DM_MLO.jpg", {"name": "circle", "cx": 20, "cy": 30, "r": 4}),
        ("P2_R_DM_MLO.jpg", {"name": "rect", "x": 1, "y": 2, "width": 3, "height": 4}),
        ("P1_L_CM_CC.jpg", {"name": "circle", "cx": 1, "cy": 1, "r": 1}),
        ("P1_L_DM_MLO.jpg", {}),
    ]
    rows = [{"#filename": name, "region_shape_attributes": json.dumps(shape)} for name, shape in shapes]
    pd.DataFrame(rows).to_csv(release / "Radiology_hand_drawn_segmentations_v2.csv", index=False)
    table = read_release(release).set_index("image_id")
    assert table.lesions.dropna().to_dict() == {"P1_L_DM_CC": "3 10 10 21;16 24 24 36"}
    assert table.finding_boxes.dropna().to_dict() == {"P2_R_DM_MLO": "16 26 24 34;1 2 4 6"}


def test_without_the_spreadsheet_a_warning_names_it_and_subtracted_images_stay_out(
    release: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = read_release(release).set_index("image_id")
    assert sorted(table.index) == ["P1_L_DM_CC", "P1_L_DM_MLO", "P1_R_DM_CC", "P2_R_DM_MLO"]
    assert table.patient_id["P2_R_DM_MLO"] == "2"
    assert table.laterality["P2_R_DM_MLO"] == "R"
    assert table.cancer.isna().all()
    assert "Radiology-manual-annotations.xlsx" in caplog.text
