"""Mini-DDSM: the label of a breast comes from the status of its case and the contours in it; DDSM itself is named."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from fixture_types import Draw, WriteSheet

from vitmodel.errors import UsageError
from vitmodel.releases.registry import read_release

HEADER = ("fullPath", "fileName", "View", "Side", "Status", "Tumour_Contour", "Age", "Density")
BOX = (4, 6, 10, 20)


def draw_case(draw: Draw, folder: str, case: str, masks: tuple[str, ...] = (), suffix: str = "jpg") -> None:
    """Write the four films of a case, and the masks of those in `masks`."""
    for film in ("LEFT_CC", "LEFT_MLO", "RIGHT_CC", "RIGHT_MLO"):
        draw(f"{folder}/{case}.{film}.{suffix}")
        if film in masks:
            draw(f"{folder}/{case}.{film}_Mask.{suffix}", BOX)


def listed(status: str, case: str, film: str, contour: str = "-", age: object = 51.0, density: int = 2) -> tuple:
    """Return a row of the table; `contour` is the mask's column."""
    side, view = film.split("_")
    name = f"{case}.{film}.jpg"
    return (f"{status}\\0007\\{name}", name, view, side, status, contour, age, density)


def labels(table: pd.DataFrame) -> dict[str, float]:
    """Return the label of each breast whose label is known."""
    return table.groupby(table.patient_id + table.laterality).cancer.first().dropna().to_dict()


def test_a_breast_is_positive_only_where_a_contour_is_drawn(
    tmp_path: Path, draw: Draw, write_sheet: WriteSheet
) -> None:
    draw_case(draw, "JPEG-8/Cancer/0007", "C_0007_1", ("LEFT_MLO",))
    draw_case(draw, "JPEG-8/Benign/0008", "B_0008_1", ("RIGHT_CC",))
    draw_case(draw, "JPEG-8/Normal/0009", "A_0009_1")
    draw_case(draw, "JPEG-8/Cancer/0010", "C_0010_1")
    rows = [
        listed("Cancer", "C_0007_1", "LEFT_MLO", "Cancer\\0007\\C_0007_1.LEFT_MLO_Mask.jpg"),
        listed("Cancer", "C_0007_1", "LEFT_CC"),
        listed("Cancer", "C_0007_1", "RIGHT_CC", density=0),
        listed("Cancer", "C_0099_1", "LEFT_CC", "Cancer\\0099\\C_0099_1.LEFT_CC_Mask.jpg", age=0),
    ]
    write_sheet("JPEG-8/DataWMask.xlsx", "Sheet1", [HEADER, *rows])
    for name in ("C_0007_1.LEFT_CC.OVERLAY", "C-0007-1.ics"):
        (tmp_path / "JPEG-8/Cancer/0007" / name).write_text("x")
    table = read_release(tmp_path / "JPEG-8").set_index("image_id", drop=False)
    assert set(table.dataset) == {"mini_ddsm"}
    assert len(table) == 17, "16 films and one that the table lists without a file; masks are no films"
    assert table.patient_id.nunique() == 5
    assert labels(table) == {
        "C_0007_1L": 1,
        "C_0007_1R": 0,
        **dict.fromkeys(("B_0008_1L", "B_0008_1R", "A_0009_1L", "A_0009_1R"), 0),
        "C_0099_1L": 1,
    }, "a case with a cancer and without any contour is unknown"
    film = table.loc["C_0007_1.LEFT_MLO"]
    assert (film.laterality, film["view"], film.age, film.density) == ("L", "MLO", 51, "B")
    assert film.lesions == "4 6 10 20"
    assert pd.isna(table.density["C_0007_1.RIGHT_CC"]), "density 0 is unknown"
    assert pd.isna(table.age["C_0099_1.LEFT_CC"]), "age 0 is unknown"
    assert table.finding_boxes.dropna().to_dict() == {"B_0008_1.RIGHT_CC": "4 6 10 20"}
    assert table.lesions.notna().sum() == 1


def test_without_the_table_folders_and_masks_give_the_label_and_a_warning_names_the_table(
    tmp_path: Path, draw: Draw, caplog: pytest.LogCaptureFixture
) -> None:
    draw_case(draw, "release/Cancer/0007", "C_0007_1", ("RIGHT_CC",))
    draw_case(draw, "release/Normal/0009", "A_0009_1")
    table = read_release(tmp_path / "release")
    assert labels(table) == {"C_0007_1L": 0, "C_0007_1R": 1, "A_0009_1L": 0, "A_0009_1R": 0}
    assert "DataWMask.xlsx" in caplog.text
    assert "kaggle.com" in caplog.text


def test_a_png_film_wins_over_its_jpeg_copy_and_any_number_of_masks_is_read(tmp_path: Path, draw: Draw) -> None:
    draw_case(draw, "release/JPEG-8/Cancer/0007", "C_0007_1", ("LEFT_CC",))
    draw_case(draw, "release/PNG-16/Cancer/0007", "C_0007_1", ("LEFT_CC",), suffix="png")
    draw("release/PNG-16/Cancer/0007/C_0007_1.LEFT_CC_Mask2.png", (20, 20, 30, 30))
    table = read_release(tmp_path / "release").set_index("image_id")
    assert len(table) == 4
    assert all("/PNG-16/" in path for path in table.path)
    assert table.lesions["C_0007_1.LEFT_CC"] == "4 6 10 20;20 20 30 30"


@pytest.mark.parametrize("source", ["cases", "cases/cancer_01/case9029/C_9029_1.LEFT_CC.LJPEG"])
def test_originals_of_ddsm_are_refused_by_the_name_of_their_format(tmp_path: Path, draw: Draw, source: str) -> None:
    folder = tmp_path / "cases/cancer_01/case9029"
    folder.mkdir(parents=True)
    (folder / "C_9029_1.LEFT_CC.LJPEG").write_bytes(b"\xff\xd8\xff\xc3")
    (folder / "C-9029-1.ics").write_text("DENSITY 2")
    draw("cases/thumbnail.jpg")
    with pytest.raises(UsageError, match=r"1 films are LJPEG.*convert"):
        read_release(tmp_path / source)


def test_converted_originals_of_ddsm_are_read(tmp_path: Path, draw: Draw) -> None:
    film = draw("case9029/C_9029_1.LEFT_CC.png")
    film.with_suffix(".LJPEG").write_bytes(b"\xff\xd8\xff\xc3")
    assert read_release(tmp_path).path.tolist() == [str(film)]
