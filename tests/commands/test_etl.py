"""ETL keeps one row per image, and every backend and any interruption give the same bytes."""

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
from vitmodel.data.cropping import crop_image
from vitmodel.data.manifest import read_manifest
from vitmodel.errors import UsageError, VitmodelError
from vitmodel.jobs import parallel
from vitmodel.jobs.journal import Journal, lock_folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every result of a run; the recipe and the journal name its folder and times."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))} | {
        "manifest": pd.read_csv(folder / "manifest.csv").to_csv().encode()
    }


def test_each_input_row_gives_one_output_row_with_a_status(release: Path, crops: Path) -> None:
    listed, manifest = pd.read_csv(release / "train.csv", dtype=str), read_manifest(crops / "manifest.csv")
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


def test_mirrored_patients_are_found(crops: Path) -> None:
    """The release's mirroring machine is 49, as RSNA's."""
    manifest = read_manifest(crops / "manifest.csv")
    doubted = manifest["reason"].fillna("").str.contains("laterality_mismatch")
    assert set(manifest.loc[doubted, "machine_id"]) <= {"49"}


@pytest.mark.parametrize(("backend", "many"), [("auto", 1), ("auto", 1000), ("dask", 1)])
def test_every_backend_gives_the_same_bytes(
    backend: str, many: int, release: Path, crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "dask":
        pytest.importorskip("distributed")
    process_per_thread = Mock(wraps=parallel.process_per_thread)
    monkeypatch.setattr(parallel, "process_per_thread", process_per_thread)
    monkeypatch.setattr(etl_command, "MIN_IMAGES_FOR_PROCESSES", many)
    monkeypatch.setattr(etl_command, "MIN_IMAGES_TO_PROBE", many)
    config = ETLConfig(source=release, out=tmp_path, size=Size(64, 32), backend=backend, jobs=2)  # type: ignore[arg-type]
    assert etl(config) == 0
    assert contents(tmp_path) == contents(crops)
    assert process_per_thread.called == (backend == "auto" and many == 1)


@pytest.mark.parametrize(("syntax", "count", "backend"), [
    (RLELossless, 29, "threads"), (RLELossless, 30, "processes"), (JPEGLosslessSV1, 499, "threads"), (JPEGLosslessSV1, 500, "processes"),
])  # fmt: skip
def test_auto_chooses_processes_where_they_are_faster(syntax: str, count: int, backend: str, crops: Path) -> None:
    """A file that cannot be read tells nothing."""
    manifest = read_manifest(crops / "manifest.csv")
    path = Path(manifest.loc[manifest["transfer_syntax"] == syntax, "source_path"].iloc[0])
    assert etl_command.backend_for([Path("missing"), *[path] * (count - 1)]) == backend


def test_a_second_run_does_only_what_changed(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ETLConfig(source=release / "test.csv", out=tmp_path, size=Size(64, 32), jobs=1)
    etl(config)
    before = contents(tmp_path)
    done: list[str] = []

    def watch(task: CropTask, preprocessing: Preprocessing) -> dict:
        done.append(task.image_id)
        return crop_to_png(task, preprocessing)

    crop_to_png = etl_command.crop_to_png
    monkeypatch.setattr(etl_command, "crop_to_png", watch)
    etl(config)
    assert done == []
    victim = read_manifest(tmp_path / "manifest.csv").iloc[1]
    Path(victim.path).unlink()
    etl(config)
    assert done == [victim.image_id]
    assert contents(tmp_path) == before
    etl(replace(config, size=Size(32, 16)))
    assert len(done) == 1 + len(read_manifest(tmp_path / "manifest.csv"))


@pytest.mark.parametrize(
    ("backend", "kills"),
    [
        ("threads", 4),
        pytest.param("threads", 20, marks=pytest.mark.slow),
        pytest.param("processes", 3, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(
    backend: str, kills: int, release: Path, crops: Path, tmp_path: Path
) -> None:
    """SIGKILL leaves no time to tidy up."""
    config = ETLConfig(source=release, out=tmp_path / "out", size=Size(64, 32), backend=backend, jobs=2)  # type: ignore[arg-type]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vitmodel.commands.etl", "vitmodel.pixels.dicom", "vitmodel.reports.etl"])
    chance, left = random.Random(0), [0]
    for _ in range(kills):
        run = context.Process(target=etl, args=(config,))
        run.start()
        enough = left[-1] + chance.randint(kills < 20, 50 // kills)
        while run.is_alive() and len(list(config.out.rglob("[!.]*.png"))) < enough:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.01))
        run.kill()
        run.join()
        left.append(len(list(config.out.rglob("[!.]*.png"))))
    assert len(set(left)) > min(kills, 4) - 1, "the kills missed the work"
    assert left == sorted(left), "work was lost"
    assert etl(config) == 0
    assert contents(config.out) == contents(crops)
    assert not list(config.out.rglob("*.tmp*")), "a killed run's halves"


def crash_on_some(task: CropTask, preprocessing: Preprocessing) -> dict:
    if int(task.image_id) % 23 == 0:
        os.abort()
    return etl_command.crop_to_png(task, preprocessing)


def test_a_decoder_that_crashes_costs_its_file_only(
    release: Path, crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ETLConfig(source=release, out=tmp_path, size=Size(64, 32), backend="processes", jobs=2)
    original = etl_command.parallel_map
    monkeypatch.setattr(etl_command, "parallel_map", lambda work, *rest, **options: original(
        functools.partial(crash_on_some, preprocessing=config.preprocessing), *rest, **options))  # fmt: skip
    assert etl(config) == 0
    manifest, whole = read_manifest(tmp_path / "manifest.csv"), read_manifest(crops / "manifest.csv")
    hit = manifest["image_id"].astype(int) % 23 == 0
    assert hit.any()
    assert (manifest["reason"][hit] == "failed").all()
    assert manifest["remark"][hit].str.contains("SIGABRT").all()
    assert manifest["source_sha256"][~hit].equals(whole["source_sha256"][~hit])


def test_crops_made_by_other_code_are_kept_and_reported(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["etl", str(release), str(tmp_path), "--size", "64x32"]
    for code, said in (("older", False), ("newer", True)):
        with patch.object(etl_command, "hash_code", lambda code=code: code):
            assert main(command) == 0
        assert ("another version of vitmodel/pixels" in capsys.readouterr().out) == said
    assert (
        main([*command[:2], str(tmp_path / "again"), *command[3:]])
        == main([*command[:2], str(tmp_path / "again"), *command[3:]])
        == 0
    )
    assert "another version" not in capsys.readouterr().out


def test_two_runs_into_one_folder_are_refused(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with lock_folder(tmp_path):
        assert main(["etl", str(release), str(tmp_path)]) == 2
    assert "another run" in capsys.readouterr().err


def test_the_folder_lock_ends_with_its_owner_and_not_with_a_forked_child(tmp_path: Path) -> None:
    """As a loader's process does for some seconds after its training was killed."""
    begun, begins = os.pipe()
    with lock_folder(tmp_path):
        if not (child := os.fork()):
            os.write(begins, b".")
            time.sleep(60)
            os._exit(0)
        os.read(begun, 1)
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
    """A file system of 128 KiB fills up; the run ends with 1, keeps whole files only, and goes on where there is room."""
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
    """The kernel's limit on the size of a file stands in for a disk that is full when a line is half written."""
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
        (lambda folder: folder, "holds nothing"),
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
