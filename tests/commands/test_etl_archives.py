"""ETL over a zip or tar gives what it gives over the unpacked folder, and a damaged archive costs what it has to."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from vitmodel.cli import main
from vitmodel.commands import etl as etl_command
from vitmodel.commands.etl import CropOutcome, CropTask, etl
from vitmodel.config import ETLConfig, Preprocessing, Size
from vitmodel.data.manifest import read_manifest
from vitmodel.data.rows import load_crop, to_manifest_rows
from vitmodel.errors import UsageError
from vitmodel.releases.registry import read_release

IMAGES = 6


@pytest.fixture(scope="module")
def folder(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a release of a few images: its table, DICOM files of several codecs, and files that are no images."""
    folder = tmp_path_factory.mktemp("archives") / "release"
    table = pd.read_csv(release / "train.csv", dtype=str).head(IMAGES)
    for row in table.itertuples():
        name = f"train_images/{row.patient_id}/{row.image_id}.dcm"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(release / name, folder / name)
    table.to_csv(folder / "train.csv", index=False)
    (folder / "__MACOSX" / "train_images").mkdir(parents=True)
    (folder / "__MACOSX" / "train_images" / "._1.dcm").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> Path:
    """Return the crops of the folder."""
    crops = folder.parent / "crops"
    assert etl(ETLConfig(source=folder, out=crops, size=Size(64, 32), jobs=1)) == 0
    return crops


def pack(folder: Path, target: Path) -> Path:
    """Return an archive of the folder at `target`: a tar, or a zip that is stored or deflated."""
    if target.suffix == ".tar":
        return Path(shutil.make_archive(str(target.with_suffix("")), "tar", folder))
    method = zipfile.ZIP_STORED if target.stem == "stored" else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(target, "w", method) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    return target


def contents(crops: Path, source: Path) -> dict[str, bytes]:
    """Return the bytes of the crops and of the manifest, with paths relative to the source."""
    manifest = (crops / "manifest.csv").read_text().replace(f"{source}/", "")
    images = {str(path.relative_to(crops)): path.read_bytes() for path in sorted(crops.rglob("*.png"))}
    return images | {"manifest": manifest.encode()}


@pytest.mark.parametrize(
    ("name", "backend"), [("stored.zip", "threads"), ("deflated.zip", "processes"), ("release.tar", "threads")]
)
def test_an_archive_gives_the_manifest_and_crops_of_its_folder(
    name: str, backend: str, folder: Path, expected: Path, tmp_path: Path
) -> None:
    archive = pack(folder, tmp_path / name)
    config = ETLConfig(
        source=archive,
        out=tmp_path / "crops",
        size=Size(64, 32),
        backend=backend,  # type: ignore[arg-type]
        jobs=1,
    )
    assert etl(config) == 0
    assert contents(tmp_path / "crops", archive) == contents(expected, folder)
    assert not list(tmp_path.rglob("*.dcm"))
    row = next(row for row in to_manifest_rows(read_manifest(config.out / "manifest.csv")) if row.status != "refused")
    assert row.source_path is not None
    original = folder / Path(row.source_path).relative_to(archive)
    assert row.source_sha256 == hashlib.sha256(original.read_bytes()).hexdigest()
    larger = Preprocessing(size=Size(96, 48))  # made again from the archive
    crops = [load_crop(row._replace(source_path=str(path)), larger).crop for path in (row.source_path, original)]
    assert crops[0] is not None
    np.testing.assert_array_equal(*crops)  # type: ignore[arg-type]


def test_an_interrupted_run_over_an_archive_resumes(
    folder: Path, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = pack(folder, tmp_path / "deflated.zip")
    config = ETLConfig(source=archive, out=tmp_path / "crops", size=Size(64, 32), jobs=1)
    crop_to_png = etl_command.crop_to_png
    done: list[str] = []

    def crop_until_killed(task: CropTask, preprocessing: Preprocessing) -> CropOutcome:
        if len(done) == IMAGES // 2:
            raise KeyboardInterrupt
        done.append(task.image_id)
        return crop_to_png(task, preprocessing)

    monkeypatch.setattr(etl_command, "crop_to_png", crop_until_killed)
    with pytest.raises(KeyboardInterrupt):
        etl(config)
    first = len(done)
    archive.touch()  # the members are the same
    monkeypatch.setattr(etl_command, "crop_to_png", lambda *args, **kw: done.append("") or crop_to_png(*args, **kw))
    assert etl(config) == 0
    assert 0 < IMAGES - (len(done) - first) <= first
    assert contents(config.out, archive) == contents(expected, folder)


def test_a_wrong_checksum_refuses_that_image_only(folder: Path, expected: Path, tmp_path: Path) -> None:
    archive = pack(folder, tmp_path / "stored.zip")
    sound = read_manifest(expected / "manifest.csv")
    usable = sound.loc[sound["status"] != "refused", "source_path"].iloc[0]
    damaged = Path(usable).read_bytes()
    content = bytearray(archive.read_bytes())
    content[content.index(damaged) + len(damaged) - 1] ^= 1
    archive.write_bytes(content)
    assert etl(ETLConfig(source=archive, out=tmp_path / "crops", size=Size(64, 32), jobs=1)) == 0
    manifest = read_manifest(tmp_path / "crops" / "manifest.csv")
    changed = manifest["status"] != sound["status"]
    assert sound.loc[changed, "source_path"].tolist() == [usable]
    (row,) = manifest[changed].itertuples()
    assert (row.status, row.reason) == ("refused", "unreadable")
    assert "Bad CRC-32" in row.remark


def test_tables_and_images_of_an_archive_need_no_common_folder(folder: Path, tmp_path: Path) -> None:
    """A table in an archive, a folder in it and one of its images are sources, too."""
    archive = pack(folder, tmp_path / "deflated.zip")
    images = set(read_release(folder)["image_id"])
    assert set(read_release(archive / "train.csv")["image_id"]) == images
    assert len(read_release(archive / "train_images", "dicom_folder")) == IMAGES
    (path,) = read_release(read_release(archive)["path"].iloc[0])["path"]
    assert path.startswith(f"{archive}/train_images/")


def test_class_folders_are_read_from_an_archive(tmp_path: Path) -> None:
    picture = cv2.imencode(".png", np.zeros((8, 8), np.uint8))[1].tobytes()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("train/1/1_a.png", "train/0/2_b.png", "test/0/3_c.png", "__MACOSX/1/._1_a.png"):
            archive.writestr(name, picture)
    table = read_release(tmp_path / "a.zip").set_index("image_id")
    assert table["cancer"].to_dict() == {"1_a": 1, "2_b": 0, "3_c": 0}
    assert table["split"].to_dict() == {"1_a": "train", "2_b": "train", "3_c": "test"}


def test_an_unreadable_archive_is_named_with_what_to_do(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compressed = shutil.make_archive(str(tmp_path / "release"), "gztar", folder)
    assert main(["etl", compressed, str(tmp_path / "out")]) == 2
    assert "is compressed as a whole (gzip)" in capsys.readouterr().err
    archive = pack(folder, tmp_path / "stored.zip")
    archive.write_bytes(archive.read_bytes()[:-100])
    assert main(["etl", str(archive), str(tmp_path / "out")]) == 2
    assert "stored.zip cannot be read as a zip" in capsys.readouterr().err
    with pytest.raises(UsageError, match="does not exist"):
        read_release(pack(folder, tmp_path / "other.tar") / "missing")


def test_what_an_archive_passes_over_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture = cv2.imencode(".png", np.zeros((8, 8), np.uint8))[1].tobytes()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("1_a.png", "../2_b.png", "more.zip"):
            archive.writestr(name, picture)
    assert read_release(tmp_path / "a.zip")["image_id"].tolist() == ["1_a"]
    assert "such as '../2_b.png'" in caplog.text
    assert "such as 'more.zip'" in caplog.text
