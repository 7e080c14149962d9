"""Little shared memory, few descriptors, little address space, output that cannot be written, pipes, no network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from vitmodel.config import TrainConfig
from vitmodel.data.dataset import CropDataset
from vitmodel.data.manifest import read_manifest, usable_rows
from vitmodel.data.samplers import SampleRequest
from vitmodel.training import batching
from vitmodel.training.batching import Batch, BatchLoader

CONFIG = TrainConfig(manifest=Path(), run=Path(), tokens=96, workers=2, model="vit_micro")


def shell(line: str, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash, in which `$V` is the command line and `$1` the first of `words`."""
    return subprocess.run(
        ["bash", "-c", line, "bash", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"V": f"{sys.executable} -m vitmodel.cli"} | environment,
        check=False,
    )


@pytest.fixture
def one_image(release: Path, tmp_path: Path) -> Path:
    """Return a folder with one mammogram and a pipe."""
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(next(release.rglob("*.dcm")), folder / "a.dcm")
    os.mkfifo(folder / "x.dcm")
    return folder


def set_limits(monkeypatch: pytest.MonkeyPatch, free: float, descriptors: int) -> None:
    """Pretend that /dev/shm has `free` bytes and that `descriptors` files may be open at once."""
    monkeypatch.setattr(batching.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    monkeypatch.setattr(batching, "raise_descriptor_limit", lambda: descriptors)
    batching._warn_once.cache_clear()


@pytest.mark.parametrize(
    ("free", "descriptors", "expected", "warning"),
    [
        (1e9, 65536, (2, False), ""),
        (2e6, 65536, (2, True), "has 2 MB free and --workers 2 may need 25 MB: crops pass through pipes"),
        (1e9, 256, (2, True), "only 256 files may be open at once: crops pass through pipes"),
        (64e3, 65536, (0, False), "has 0.1 MB free: crops are loaded in the training process"),
        (1e9, 64, (0, False), "only 64 files may be open at once: crops are loaded in the training process"),
    ],
)
def test_crops_take_another_way_where_shared_memory_or_descriptors_are_short(
    free: float,
    descriptors: int,
    expected: tuple[int, bool],
    warning: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    set_limits(monkeypatch, free, descriptors)
    config = replace(CONFIG, tokens=4096)
    for _ in range(2):  # the loaders of training and validation
        assert batching.hand_over(config, patch=16) == expected
    assert warning in caplog.text
    assert len(caplog.records) == bool(warning)


def test_crops_through_pipes_are_those_through_shared_memory(crops: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = usable_rows(read_manifest(crops / "manifest.csv")).dropna(subset=["cancer"]).head(9)
    images = CropDataset(rows["path"].tolist(), rows["cancer"].tolist())
    requests = [SampleRequest(row, 0) for row in range(len(rows))]

    def batches(workers: int) -> list[Batch]:
        loader = BatchLoader(images, requests, replace(CONFIG, tokens=30, workers=workers))  # type: ignore[arg-type]
        assert loader.sample_loader.num_workers == workers
        return list(loader)

    expected = batches(0)
    set_limits(monkeypatch, 1e6, 65536)
    given = batches(2)
    assert len(expected) == len(given) > 1
    for one, other in zip(expected, given, strict=True):
        assert torch.equal(one.row, other.row)
        for first, second in zip(one.pack.images, other.pack.images, strict=True):
            assert torch.equal(first, second)


def test_the_soft_limit_on_open_files_is_raised_to_the_hard_one() -> None:
    code = "import resource as r, vitmodel.jobs.limits as l; print(l.raise_descriptor_limit(), *r.getrlimit(7))"
    done = shell(f"ulimit -Sn 64; ulimit -Hn 300; {sys.executable} -c '{code}'")
    assert done.stdout.split() == ["300", "300", "300"], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "warning"),
    [
        ("mount -t tmpfs -o size=64k tmpfs /dev/shm", "crops are loaded in the training process"),
        ("mount -t tmpfs -o size=1m tmpfs /dev/shm; ulimit -n 150", "crops pass through pipes"),
    ],
)
def test_training_ends_where_shared_memory_or_descriptors_are_short(
    limit: str, warning: str, crops: Path, flags: list[str], tmp_path: Path
) -> None:
    if os.getuid() or shell("unshare -m true").returncode:
        pytest.skip("mounting a small /dev/shm needs root")
    words = [*flags, "--epochs", "1", "--workers", "2"]
    line = f'{limit}; exec $V train "$@"'
    done = shell('exec unshare -m bash -c "$@"', line, "bash", crops / "manifest.csv", tmp_path / "run", *words)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(warning) == 1
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "package" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("kilobytes", "verb"), [(1_000_000, "train manifest.csv run"), (400_000, "synth out"), (150_000, "etl in out")]
)
def test_too_little_address_space_is_one_sentence(kilobytes: int, verb: str, tmp_path: Path) -> None:
    done = shell(f'cd "$1"; ulimit -v {kilobytes}; exec $V {verb}', tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "GB of address space" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_a_verb_without_large_libraries_needs_no_address_space() -> None:
    done = shell("ulimit -v 150000; exec $V recipes")
    assert (done.returncode, done.stderr) == (0, "")
    assert "gpu24" in done.stdout


@pytest.mark.parametrize("verb", ["recipes", "--help", "--version", "etl --help", "etl in out --print-config"])
def test_a_full_standard_output_is_one_sentence_and_status_1(verb: str) -> None:
    done = shell(f"exec $V {verb} >/dev/full")
    assert done.returncode == 1
    assert done.stderr == (
        "vitmodel: standard output is incomplete (No space left on device); "
        "files of this run were written all the same\n"
    )


@pytest.mark.parametrize("verb", ["recipes", "--help", "train --help"])
def test_a_reader_that_leaves_early_is_no_failure(verb: str) -> None:
    done = shell(f"$V {verb} | head -n 1; echo ${{PIPESTATUS[0]}}")
    assert done.stderr == ""
    assert done.stdout.splitlines()[1:] == ["0"]
    assert shell(f"$V {verb} | true; echo ${{PIPESTATUS[0]}}").stdout == "0\n"


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full", "2>&- <&-"])
def test_an_error_without_standard_error_is_silent_and_keeps_its_status(closed: str) -> None:
    done = shell(f"exec $V recipes surplus {closed}")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


@pytest.mark.parametrize(("streams", "status"), [(">/dev/full 2>/dev/full", 1), (">&- 2>&- <&-", 0)])
def test_a_run_whose_output_cannot_be_written_writes_its_files(
    streams: str, status: int, one_image: Path, tmp_path: Path
) -> None:
    done = shell(f'exec $V etl "$1" "$2" --size 64x32 --workers 1 {streams}', one_image, tmp_path / "out")
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")
    manifest = read_manifest(tmp_path / "out" / "manifest.csv")
    assert manifest["status"].tolist() != ["refused"]
    assert (tmp_path / "out" / "etl_report.html").read_bytes().startswith(b"<!")


def test_a_pipe_is_refused_as_a_source_and_named_in_a_folder(one_image: Path, tmp_path: Path) -> None:
    refused = shell('exec $V etl "$1" "$2"', one_image / "x.dcm", tmp_path / "out")
    assert refused.returncode == 2
    assert refused.stderr == (
        f"vitmodel etl: {one_image}/x.dcm is a pipe, a socket or a device; pass a regular file or a folder\n"
    )
    assert not (tmp_path / "out").exists()
    done = shell('exec $V etl "$1" "$2" --size 64x32 --workers 1', one_image, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert f"{one_image}: pipes, sockets and devices are left out: x.dcm\n" in done.stderr
    assert len(pd.read_csv(tmp_path / "out" / "manifest.csv")) == 1


@pytest.mark.slow
def test_training_goes_on_offline_where_weights_and_biases_does_not_answer(
    crops: Path, flags: list[str], tmp_path: Path
) -> None:
    environment = {"WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "3"}
    words = [crops / "manifest.csv", tmp_path / "run", *flags[:-1], "online", "--epochs", "1"]
    done = shell('exec $V train "$@"', *words, WANDB_BASE_URL="http://127.0.0.1:9", **environment)
    assert done.returncode == 0, done.stderr
    assert "Weights & Biases cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
