"""ETL on a dask cluster of separate processes writes the same bytes, also if a worker is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_etl import contents

from vitmodel.cli import main
from vitmodel.errors import VitmodelError
from vitmodel.jobs import parallel

pytest.importorskip("distributed")
pytestmark = pytest.mark.nightly  # test_etl has a fast test of a local cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """Return the address of a scheduler and its two workers; each is a process that is not restarted."""
    file = tmp_path / "scheduler.json"
    start_scheduler = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
    start_worker = [sys.executable, "-m", "distributed.cli.dask_worker"]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    common = ["--scheduler-file", str(file), "--no-dashboard"]
    scheduler = subprocess.Popen([*start_scheduler, *common, "--port", "0", "--host", "127.0.0.1"], **options)
    worker_options = ["--no-nanny", "--nthreads", "1", "--host", "127.0.0.1", "--local-directory", str(tmp_path)]
    workers = [subprocess.Popen([*start_worker, *common, *worker_options], **options) for _ in range(2)]
    try:
        yield address(file), workers
    finally:
        for process in (*workers, scheduler):
            process.kill()
            process.wait()


def address(file: Path) -> str:
    """Return the address of the scheduler that will write `file`."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if file.exists() and file.read_text().endswith("}"):
            return str(json.loads(file.read_text())["address"])
        time.sleep(0.1)
    raise TimeoutError(file)


def test_images_of_a_killed_worker_are_cropped_by_another(
    release: Path, crops: Path, tmp_path: Path, cluster: tuple[str, list[subprocess.Popen[bytes]]]
) -> None:
    scheduler, workers = cluster
    out = tmp_path / "out"
    command = ["etl", str(release), str(out), "--size", "64x32", "--backend", "dask", "--scheduler", scheduler]
    run = subprocess.Popen(
        [sys.executable, "-m", "vitmodel.cli", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while len(list(out.rglob("*.png"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.005)
    workers[0].kill()
    assert not (out / "manifest.csv").exists()  # the worker was killed before the work was finished
    assert run.wait(timeout=120) == 0
    assert contents(out) == contents(crops)


def test_an_unreachable_scheduler_is_a_usage_error(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["etl", str(release), str(tmp_path / "out"), "--backend", "dask", "--scheduler", "tcp://127.0.0.1:9"]
    assert main(command) == 2
    assert "tcp://127.0.0.1:9" in capsys.readouterr().err


def die(item: int) -> int:
    os._exit(1) if item == 3 else None
    return item


def test_an_item_that_kills_every_worker_ends_with_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "CLUSTER_TIMEOUT", 10.0)
    with pytest.raises(VitmodelError, match="processes"):
        list(parallel.parallel_map(die, range(6), "test", jobs=2, backend="dask"))  # type: ignore[arg-type]
