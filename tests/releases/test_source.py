"""A source is listed once: its images without masks and copies, its tables near and far."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vitmodel.releases.registry import read_release
from vitmodel.releases.source import Source, dicom_last, without_copies


@pytest.fixture
def write(tmp_path: Path) -> Callable[[dict[str, str]], Path]:
    def write_files(files: dict[str, str]) -> Path:
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return tmp_path

    return write_files


def relative(source: Source) -> list[str]:
    return [os.path.relpath(path, source.folder) for path in source.images]


@pytest.mark.parametrize(
    "name",
    [
        "a_mask.png",
        "C_0029_1.LEFT_CC_Mask.jpg",
        "a.mask.1.png",
        "mask_01.png",
        "Masks/a.png",
        "x/ROI Masks/a.png",
        "1.000000-ROI mask images-70001/1-1.dcm",
        "1.000000-cropped images-70001/1-1.dcm",
        "__MACOSX/a.png",
        "._a.png",
        "a_overlay.png",
        "a_crop.png",
        "a.OVERLAY",
    ],
)
def test_masks_overlays_and_crops_are_no_images(write: Callable[[dict[str, str]], Path], name: str) -> None:
    assert relative(Source(write({"a.png": "", "b.png": "", name: ""}))) == ["a.png", "b.png"]


@pytest.mark.parametrize("name", ["damask.png", "unmasked/a.png", "1_crop.png", "maskat.png", "a_masking.png"])
def test_other_names_are_images(write: Callable[[dict[str, str]], Path], name: str) -> None:
    assert relative(Source(write({name: ""}))) == [name]


def test_dicom_files_win_over_pictures_of_the_same_name() -> None:
    files = ["png/p/1.png", "dcm/p/1.dcm", "dcm/p/2.dcm", "png/q/1.png"]
    assert without_copies(files) == ["dcm/p/1.dcm", "dcm/p/2.dcm", "png/q/1.png"]
    assert dicom_last(["a.dcm", "a.png", "1.2.3"]) == ["a.png", "a.dcm", "1.2.3"]


def test_tables_are_found_two_levels_down_and_next_to_the_source(write: Callable[[dict[str, str]], Path]) -> None:
    root = write(
        {"in/a/b/t.csv": "x\n", "in/a/T.CSV": "x\n", "in/a/b/c/deep.csv": "x\n", "up.csv": "", "sister/s.csv": ""}
    )
    source = Source(root / "in")
    assert source.find_table("t.csv") == root / "in/a/T.CSV", "the uppermost one"
    assert [source.find_table(name) for name in ("deep.csv", "up.csv", "s.csv")] == [None] * 3
    near = Source(root / "in", with_neighbours=True)
    assert [near.find_table(name) for name in ("up.csv", "s.csv")] == [root / "up.csv", root / "sister/s.csv"]


def test_a_table_next_to_the_images_is_used_only_if_it_lists_them(write: Callable[[dict[str, str]], Path]) -> None:
    table = "patient_id,image_id,laterality,view,cancer\n1,2,L,CC,1\n"
    root = write({"tables/train.csv": table, "png/1_2.png": "", "other/5_6.png": ""})
    listed = read_release(root / "png")
    assert (listed.dataset.tolist(), listed.cancer.tolist()) == (["rsna"], [1])
    assert read_release(root / "other").dataset.tolist() == ["dicom_folder"]


def test_pipes_and_folders_that_may_not_be_listed_do_not_end_the_run(
    write: Callable[[dict[str, str]], Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write({"a.png": "", "locked/b.png": ""})
    os.mkfifo(root / "pipe.dcm")
    real_scandir = os.scandir

    def scandir(folder: str) -> object:
        if str(folder).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return real_scandir(folder)

    monkeypatch.setattr("os.scandir", scandir)
    assert relative(Source(root)) == ["a.png"]
    assert f"{root / 'locked'} cannot be listed (Permission denied)" in caplog.text
