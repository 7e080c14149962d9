"""A source is listed once: its images without masks and copies, its tables near and far."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from pydicom import Dataset, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from vitmodel.archives import open_source, source_state
from vitmodel.releases.files import safe_file_name
from vitmodel.releases.inputs import read_inputs
from vitmodel.releases.listing import dicom_last, without_copies
from vitmodel.releases.registry import read_release
from vitmodel.releases.source import Source


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
    near = source.near()
    assert [near.find_table(name) for name in ("up.csv", "s.csv")] == [root / "up.csv", root / "sister/s.csv"]


def test_a_table_next_to_the_images_is_used_only_if_it_lists_them(write: Callable[[dict[str, str]], Path]) -> None:
    table = "patient_id,image_id,laterality,view,cancer\n1,2,L,CC,1\n"
    root = write({"tables/train.csv": table, "png/1_2.png": "", "other/5_6.png": ""})
    listed = read_release(root / "png")
    assert (listed.dataset.tolist(), listed.cancer.tolist()) == (["rsna"], [1])
    assert read_release(root / "other").dataset.tolist() == ["dicom_folder"]


def test_a_source_is_listed_and_logged_once(
    write: Callable[[dict[str, str]], Path], caplog: pytest.LogCaptureFixture
) -> None:
    root = write({"in/a.png": "", "in/notes.txt": "", "t.csv": "patient_id,path\n1,elsewhere.png\n"})
    with caplog.at_level("INFO"):
        assert len(read_inputs([str(root / "in")], "auto")) == 1
    assert caplog.text.count("files that are no images are left out") == 1


def test_a_neighbour_that_may_not_be_listed_costs_no_other_table(
    write: Callable[[dict[str, str]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write({"in/a.png": "", "alpha/a.csv": "x\n", "beta/b.csv": "x\n", "gamma/c.csv": "x\n"})
    real_scandir = os.scandir

    def scandir(folder: str) -> object:
        if str(folder).endswith("beta"):
            raise PermissionError(13, "Permission denied")
        return real_scandir(folder)

    monkeypatch.setattr("os.scandir", scandir)
    near = Source(root / "in").near()
    assert [near.find_table(f"{name}.csv") is not None for name in "abc"] == [True, False, True]


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


def test_dicom_files_are_recognised_by_their_bytes_whatever_their_suffix(tmp_path: Path) -> None:
    with_preamble = bytes(128) + b"DICM" + bytes(16)
    explicit = b"\x08\0\x05\0CS\x0a\0ISO_IR 100" + bytes(130)
    implicit = b"\x08\0\0\0\x04\0\0\0" + bytes(130)
    dicom = {
        "MG.1.2.3_0": with_preamble,
        "x.dc3": explicit,
        "img.v2": implicit,
        "IM0001": explicit,
        "1.2.840.7": implicit,
    }
    others = {"notes.xyz": b"text " * 40, "short": b"\x08\0", "DICOMDIR": with_preamble, "a.txt": with_preamble}
    for name, content in (dicom | others).items():
        (tmp_path / name).write_bytes(content)
    assert sorted(relative(Source(tmp_path))) == sorted(dicom)


def test_files_that_are_left_out_are_counted_by_suffix(
    write: Callable[[dict[str, str]], Path], caplog: pytest.LogCaptureFixture
) -> None:
    root = write({"a.png": "", "b.txt": "", "c.txt": "", "d.pdf": "", "e.csv": ""})
    with caplog.at_level("INFO"):
        assert relative(Source(root)) == ["a.png"]
    assert "files that are no images are left out: 2 .txt, 1 .pdf" in caplog.text


def test_names_that_are_not_utf8_are_escaped_and_their_files_are_found(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"K\xf6ln")
    folder.mkdir()
    (folder / "good.png").write_bytes(b"")
    (folder / os.fsdecode(b"M\xfcller.png")).write_bytes(b"film")
    table = read_release(tmp_path)
    assert sorted(relative(Source(tmp_path))) == [r"K\xf6ln/M\xfcller.png", r"K\xf6ln/good.png"]
    table.to_csv(tmp_path / "table.csv")
    odd = next(path for path in table.path if path.endswith("ller.png"))
    assert open_source(odd).read() == b"film"
    assert source_state(odd) == source_state(folder / os.fsdecode(b"M\xfcller.png"))


def test_a_link_to_itself_does_not_end_the_scan(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    assert relative(Source(tmp_path)) == ["a.png", "loop.png"]


def test_an_id_longer_than_a_file_name_gives_a_file_name_of_its_own() -> None:
    names = {safe_file_name("é" * 300 + end) for end in "ab"}
    assert len(names) == 2
    assert all(len(name.encode()) < 240 for name in names)


@pytest.mark.parametrize("on_disk", ["PT0/IM1", "pt0/im1", "Pt0/im1.dcm"])
def test_files_of_a_dicomdir_are_found_in_another_case_and_with_a_suffix(tmp_path: Path, on_disk: str) -> None:
    path = tmp_path / on_disk
    path.parent.mkdir()
    path.write_bytes(b"")
    directory = Dataset()
    directory.DirectoryRecordSequence = [Dataset(), Dataset()]
    for record, name in zip(directory.DirectoryRecordSequence, ("IM1", "IM2"), strict=True):
        record.DirectoryRecordType = "IMAGE"
        record.ReferencedFileID = ["PT0", name]
    directory.file_meta = FileMetaDataset()
    directory.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    directory.preamble = bytes(128)
    dcmwrite(tmp_path / "DICOMDIR", directory)
    table = read_inputs([str(tmp_path / "DICOMDIR")], "auto")
    assert table.path.tolist() == [str(path), str(path.parent / "IM2")]
