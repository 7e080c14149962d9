"""ETL writes one row per image, and the same bytes with every backend and after any interruption."""

from __future__ import annotations

import errno
import functools
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock, patch

import cv2
import numpy as np
import pandas as pd
import pytest
from pydicom.uid import JPEGLosslessSV1, RLELossless

from vitmodel.cli import main
from vitmodel.commands import etl as etl_command
from vitmodel.commands.etl import CropTask, etl, safe_file_name
from vitmodel.config import ETLConfig, Preprocessing, Size
from vitmodel.data.columns import COLUMNS
from vitmodel.data.cropping import crop_image
from vitmodel.data.manifest import read_manifest
from vitmodel.errors import UsageError, VitmodelError
from vitmodel.jobs import parallel
from vitmodel.jobs.journal import Journal, lock_folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every result of a run, without the recipe and the journal, which hold paths and times."""
    images = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}
    return images | {"manifest": pd.read_csv(folder / "manifest.csv").to_csv().encode()}


def test_each_input_row_gives_one_output_row_with_a_status(release: Path, crops: Path) -> None:
    listed = pd.read_csv(release / "train.csv", dtype=str)
    manifest = read_manifest(crops / "manifest.csv")
    assert manifest["image_id"].tolist() == listed["image_id"].tolist()
    np.testing.assert_array_equal(manifest["cancer"], listed["cancer"].astype(float))
    faulty = set(pd.read_csv(release / "faults.csv", dtype=str)["image_id"])
    refused = manifest[manifest["status"] == "refused"]
    assert set(refused["image_id"]) <= faulty
    assert refused["reason"].nunique() > 2
    assert refused["remark"].str.len().min() > 10
    for row in manifest[manifest["status"] != "refused"].itertuples():
        crop = cv2.imread(row.path, cv2.IMREAD_UNCHANGED)
        assert crop.shape == (64, 32)
        assert crop.dtype == np.uint8


def test_a_laterality_mismatch_is_reported_only_for_the_mirroring_machine(crops: Path) -> None:
    """In the synthetic release, machine 49 mirrors its images, as in RSNA's."""
    manifest = read_manifest(crops / "manifest.csv")
    mismatch = manifest["reason"].fillna("").str.contains("laterality_mismatch")
    assert set(manifest.loc[mismatch, "machine_id"]) <= {"49"}


@pytest.mark.parametrize(
    ("backend", "min_images"), [("auto", 1), ("auto", 1000), pytest.param("dask", 1, marks=pytest.mark.nightly)]
)
def test_every_backend_gives_the_same_bytes(
    backend: str, min_images: int, release: Path, crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "dask":
        pytest.importorskip("distributed")
    process_per_thread = Mock(wraps=parallel.process_per_thread)
    monkeypatch.setattr(parallel, "process_per_thread", process_per_thread)
    monkeypatch.setattr(etl_command, "MIN_IMAGES_FOR_PROCESSES", min_images)
    monkeypatch.setattr(etl_command, "MIN_IMAGES_TO_PROBE", min_images)
    config = ETLConfig(
        source=release,
        out=tmp_path,
        size=Size(64, 32),
        backend=backend,  # type: ignore[arg-type]
        jobs=2,
    )
    assert etl(config) == 0
    assert contents(tmp_path) == contents(crops)
    assert process_per_thread.called == (backend == "auto" and min_images == 1)


@pytest.mark.parametrize(
    ("syntax", "count", "backend"),
    [
        (RLELossless, 29, "threads"),
        (RLELossless, 30, "processes"),
        (JPEGLosslessSV1, 499, "threads"),
        (JPEGLosslessSV1, 500, "processes"),
    ],
)
def test_auto_chooses_processes_where_they_are_faster(syntax: str, count: int, backend: str, crops: Path) -> None:
    """The first file does not exist: a file that cannot be read does not affect the choice."""
    manifest = read_manifest(crops / "manifest.csv")
    path = Path(manifest.loc[manifest["transfer_syntax"] == syntax, "source_path"].iloc[0])
    assert etl_command.backend_for([Path("missing"), *[path] * (count - 1)]) == backend


def test_a_second_run_does_only_what_changed(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ETLConfig(source=release / "test.csv", out=tmp_path, size=Size(64, 32), jobs=1)
    etl(config)
    before = contents(tmp_path)
    done: list[str] = []

    def record(task: CropTask, preprocessing: Preprocessing) -> dict:
        done.append(task.image_id)
        return crop_to_png(task, preprocessing)

    crop_to_png = etl_command.crop_to_png
    monkeypatch.setattr(etl_command, "crop_to_png", record)
    etl(config)
    assert done == []
    deleted = read_manifest(tmp_path / "manifest.csv").iloc[1]
    Path(deleted.path).unlink()
    etl(config)
    assert done == [deleted.image_id]
    assert contents(tmp_path) == before
    etl(replace(config, size=Size(32, 16)))
    assert len(done) == 1 + len(read_manifest(tmp_path / "manifest.csv"))


@pytest.mark.parametrize(
    ("backend", "kills"),
    [
        ("threads", 4),
        pytest.param("threads", 20, marks=pytest.mark.nightly),
        pytest.param("processes", 3, marks=pytest.mark.nightly),
    ],
)
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(
    backend: str, kills: int, release: Path, crops: Path, tmp_path: Path
) -> None:
    """The runs are killed by SIGKILL, so that they cannot clean up."""
    config = ETLConfig(
        source=release,
        out=tmp_path / "out",
        size=Size(64, 32),
        backend=backend,  # type: ignore[arg-type]
        jobs=2,
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vitmodel.commands.etl", "vitmodel.pixels.dicom", "vitmodel.reports.etl"])
    rng = random.Random(0)
    written = [0]
    for _ in range(kills):
        run = context.Process(target=etl, args=(config,))
        run.start()
        target = written[-1] + rng.randint(kills < 20, 50 // kills)
        while run.is_alive() and len(list(config.out.rglob("[!.]*.png"))) < target:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))
        run.kill()
        run.join()
        written.append(len(list(config.out.rglob("[!.]*.png"))))
    assert len(set(written)) > min(kills, 4) - 1, "too few runs were killed while they wrote crops"
    assert written == sorted(written), "a crop of an earlier run was lost"
    assert etl(config) == 0
    assert contents(config.out) == contents(crops)
    assert not list(config.out.rglob("*.tmp*")), "a killed run left temporary files behind"


def crash_on_every_23rd_id(task: CropTask, preprocessing: Preprocessing) -> dict:
    if int(task.image_id) % 23 == 0:
        os.abort()
    return etl_command.crop_to_png(task, preprocessing)


@pytest.mark.nightly
def test_a_decoder_crash_refuses_only_its_own_file(
    release: Path, crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ETLConfig(source=release, out=tmp_path, size=Size(64, 32), backend="processes", jobs=2)
    original = etl_command.parallel_map
    work = functools.partial(crash_on_every_23rd_id, preprocessing=config.preprocessing)
    monkeypatch.setattr(etl_command, "parallel_map", lambda _, *rest, **options: original(work, *rest, **options))
    assert etl(config) == 0
    manifest = read_manifest(tmp_path / "manifest.csv")
    expected = read_manifest(crops / "manifest.csv")
    crashed = manifest["image_id"].astype(int) % 23 == 0
    assert crashed.any()
    assert (manifest["reason"][crashed] == "failed").all()
    assert manifest["remark"][crashed].str.contains("SIGABRT").all()
    assert manifest["source_sha256"][~crashed].equals(expected["source_sha256"][~crashed])


def test_crops_made_by_other_code_are_kept_and_reported(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["etl", str(release), str(tmp_path), "--size", "64x32"]
    for code, reported in (("older", False), ("newer", True)):
        with patch.object(etl_command, "hash_code", lambda code=code: code):
            assert main(command) == 0
        assert ("another version of vitmodel/pixels" in capsys.readouterr().out) == reported
    other_folder = [*command[:2], str(tmp_path / "again"), *command[3:]]
    assert main(other_folder) == main(other_folder) == 0
    assert "another version" not in capsys.readouterr().out


def test_two_runs_into_one_folder_are_refused(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with lock_folder(tmp_path):
        assert main(["etl", str(release), str(tmp_path)]) == 2
    assert "another run" in capsys.readouterr().err


def test_the_folder_lock_ends_with_its_owner_and_not_with_a_forked_child(tmp_path: Path) -> None:
    """A loader process can outlive its killed training by some seconds."""
    read_end, write_end = os.pipe()
    with lock_folder(tmp_path):
        if not (child := os.fork()):
            os.write(write_end, b".")
            time.sleep(60)
            os._exit(0)
        os.read(read_end, 1)
    try:
        with lock_folder(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_torn_journal_line_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append("a", {"n": 1})
    journal.close()
    path.write_bytes(path.read_bytes() + b'{"key": "b", "n"')
    journal = Journal(path)
    assert set(journal.entries) == {"a"}
    journal.append("c", {"n": 3})
    journal.close()
    assert set(Journal(path).entries) == {"a", "c"}
    path.write_bytes(path.read_bytes() + bytes(30) + b"\n")  # what a power cut can leave
    assert set(Journal(path).entries) == {"a", "c"}


def test_a_full_disk_ends_with_a_message_and_loses_nothing(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file system of 128 KiB fills up: the run ends with status 1, keeps whole files, and resumes with more space."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        command = ["etl", str(release), str(small), "--size", "512x256", "--jobs", "1"]
        assert main(command) == 1
        assert "No space left" in capsys.readouterr().err
        written = list(small.rglob("*.png"))
        assert written
        assert all(cv2.imread(str(path)) is not None for path in written)
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        assert main(command) == 0
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("full", [".png", "manifest.csv", "etl_report.html", "etl.yaml"])
def test_a_disk_that_fills_up_at_any_file_ends_with_a_message(
    full: str,
    release: Path,
    crops: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fsync(file: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{file}")).name
        if name.replace(".tmp", "").endswith(full) and (full != ".png" or len(list(tmp_path.rglob("*.png"))) > 9):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    command = ["etl", str(release), str(tmp_path), "--size", "64x32"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert main(command) == 1
    message = capsys.readouterr().err
    assert "No space left" in message
    assert full in message
    assert "Traceback" not in message
    assert not list(tmp_path.rglob("*.tmp*"))
    assert main(command) == 0
    assert contents(tmp_path) == contents(crops)


def test_a_journal_that_cannot_grow_ends_with_a_message(
    release: Path, crops: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on file sizes (RLIMIT_FSIZE) has the same effect as a disk that fills up in the middle of a line."""
    command = ["etl", str(release), str(tmp_path), "--size", "64x32"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
    try:
        assert main(command) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = capsys.readouterr().err
    assert "journal.jsonl" in message
    assert "run the same command again" in message
    assert main(command) == 0
    assert contents(tmp_path) == contents(crops)


def test_an_output_that_cannot_be_written_ends_with_a_message(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["etl", str(release), str(tmp_path / "file" / "out")]) == 1
    assert str(tmp_path / "file" / "out") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda folder: folder / "absent", "absent"),
        (lambda folder: folder, "contains nothing"),
        (lambda folder: write(folder / "train.csv", "patient_id,laterality,view\n1,L,CC\n"), "image_id"),
        (
            lambda folder: write(
                folder / "train.csv", "patient_id,image_id,laterality,view,cancer\n1,7,L,CC,0\n1,7,L,MLO,0\n"
            ),
            "image_id",
        ),
        (
            lambda folder: write(folder / "train.csv", "patient_id,image_id,laterality,view,cancer\n1,7,L,CC,2\n"),
            "cancer",
        ),
    ],
)
def test_a_bad_source_is_a_usage_error(make, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    assert main(["etl", str(make(folder)), str(tmp_path / "out")]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path.parent


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"not a mammogram\n", "not_an_image"),
        (b"", "not_an_image"),
        (None, "missing_file"),
        (b"\x89PNG\r\n\x1a\nrubbish", "unreadable"),
    ],
)
def test_a_file_that_is_not_an_image_gives_a_row_with_a_reason(
    content: bytes | None, reason: str, tmp_path: Path
) -> None:
    from vitmodel.data.cropping import SourceImage

    path = tmp_path / "image.dcm"
    if content is not None:
        path.write_bytes(content)
    cropped = crop_image(SourceImage(path), Preprocessing(size=Size(64, 32)))
    assert (cropped.record["status"], cropped.record["reason"], cropped.crop) == ("refused", reason, None)
    assert str(cropped.record["remark"])


def test_ids_become_safe_and_distinct_file_names() -> None:
    assert safe_file_name("10006") == "10006"
    names = [safe_file_name(name) for name in ("a/b", "a\\b", "a_b", "../a", "..a", "é")]
    assert len(set(names)) == len(names)
    assert not any("/" in name or name.startswith(".") for name in names)


def test_error_classes_have_their_exit_status() -> None:
    assert (UsageError.status, VitmodelError.status) == (2, 1)


def test_the_number_of_cancers_is_said_only_where_cancer_is_known() -> None:
    manifest = pd.DataFrame({column.name: [np.nan, np.nan] for column in COLUMNS}).assign(birads=[1, 2])
    assert etl_command.describe_labels(manifest) == "labels:   known in rows of 2: birads 2"
    assert etl_command.describe_labels(manifest.assign(cancer=0.0)).endswith("; 0 rows with cancer")
