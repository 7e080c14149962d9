"""Fixtures shared by all tests."""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest
from filelock import FileLock
from fixture_types import Box, Draw, MakeOnce, WriteSheet
from hub_stand_in import StandInHub, serve

pytest_plugins = ["browser_fixtures"]
# examples that do not depend on the clock, and no files in the checkout
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")
# set before torch is imported: one thread per test worker and per process that a test starts
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `integration` each test that uses a fixture made from the synthetic release."""
    for item in items:
        if "release" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real mammograms next to the checkout; skip the test if it does not exist."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the folder of real mammograms does not exist: {folder}")
    return folder


def modification_times(folder: Path) -> dict[str, int]:
    """Return when each file under `folder` was last written.

    Files of W&B are skipped, because its service may write to them, and lock files, because a refused run opens them.
    """
    files = [path for path in folder.rglob("*") if path.is_file()]
    paths = [path for path in files if "wandb" not in path.parts and path.name != ".vitmodel.lock"]
    return {str(path): path.stat().st_mtime_ns for path in paths}


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeOnce]:
    """Return a function that fills a folder once per test run: the first worker fills it, the others wait and read it.

    If a test has changed, added or removed a file in such a folder, an assertion fails at the end of the run.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder = shared / name
        complete = shared / f"{name}.complete"
        with FileLock(shared / f"{name}.lock"):
            if not complete.exists():
                shutil.rmtree(folder, ignore_errors=True)  # left by a worker that failed halfway
                make(folder)
                complete.write_text(json.dumps(modification_times(folder)))
        return folder

    yield folder_of
    for complete in shared.glob("*.complete"):
        changed = json.loads(complete.read_text()).items() ^ modification_times(complete.with_suffix("")).items()
        assert not changed, f"a test wrote into a folder that all tests share: {sorted({path for path, _ in changed})}"


@pytest.fixture(scope="session", autouse=True)
def validation_pictures() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Turn off the figures that a training draws after each epoch, which take longer than the epoch of a small model.

    The value is a context manager within which they are drawn.
    """
    from vitmodel.training.callbacks import ValidationFigures

    with pytest.MonkeyPatch.context() as patch:
        draw = ValidationFigures.on_validation_end
        patch.setattr(ValidationFigures, "on_validation_end", lambda *_: None)

        @contextmanager
        def drawn() -> Iterator[None]:
            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(ValidationFigures, "on_validation_end", draw)
                yield

        yield drawn


@pytest.fixture(scope="session")
def release(make_once: MakeOnce) -> Path:
    """Return a small synthetic release with faults: 12 patients, 6 of them with a cancer. Do not write to it."""
    from vitmodel.config import Size, SynthConfig
    from vitmodel.phantoms.release import write_release

    settings = SynthConfig(
        out=Path(), patients=12, size=Size(256, 208), difficulty=0.0, positives=0.5, faults=True, jobs=1
    )
    return make_once("release", lambda folder: write_release(replace(settings, out=folder)))


@pytest.fixture(scope="session")
def crops(release: Path, make_once: MakeOnce) -> Path:
    """Return the folder of 64x32 crops that `vitmodel etl` makes from the release. Do not write to it."""
    from vitmodel.commands.etl import etl
    from vitmodel.config import ETLConfig, Size

    def make(folder: Path) -> None:
        assert etl(ETLConfig(source=release, out=folder, size=Size(64, 32), jobs=2)) == 0

    return make_once("crops", make)


@pytest.fixture(scope="session")
def flags() -> list[str]:
    """Return the flags of a training that is short enough for a test; the last value is that of --wandb."""
    return [
        *("--model", "vit_micro", "--epochs", "3", "--tokens", "96", "--val", "0.25", "--test", "0.25"),
        *("--workers", "0", "--drop-path", "0.2", "--wandb", "off"),
    ]


@pytest.fixture(scope="session")
def run(
    crops: Path, flags: list[str], make_once: MakeOnce, validation_pictures: Callable[[], AbstractContextManager[None]]
) -> Path:
    """Return a finished run of three epochs with all its figures, logged to W&B offline. Do not write to it."""
    from vitmodel.cli import main

    def make(folder: Path) -> None:
        with validation_pictures():
            assert main(["train", str(crops / "manifest.csv"), str(folder), *flags[:-1], "offline"]) == 0

    return make_once("run", make)


@pytest.fixture(scope="session")
def exported(run: Path, make_once: MakeOnce) -> Path:
    """Return the package of `run` with its two ONNX files. Do not write to it.

    The parent folder holds what the int8 export printed, in `said.txt`.
    """
    from vitmodel.cli import main

    def make(folder: Path) -> None:
        package = folder / "package"
        shutil.copytree(run / "package", package)
        eight_bits = ["--precision", "int8", "--calibration", str(run / "manifest.csv"), "--images", "1000"]
        assert main(["export", str(package), str(package / "model.fp32.onnx")]) == 0
        with redirect_stdout(io.StringIO()) as printed:
            assert main(["export", str(package), str(package / "model.int8.onnx"), *eight_bits]) == 0
        (folder / "said.txt").write_text(printed.getvalue())

    return make_once("exported", make) / "package"


@pytest.fixture
def steps_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the steps of a chain (versions, leave-out) in this process, which has already imported all modules."""
    from vitmodel import cli
    from vitmodel.jobs import steps

    def step(arguments: Sequence[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        words = arguments[arguments.index("vitmodel.cli") + 1 :]
        return subprocess.CompletedProcess(arguments, cli.main(list(words)))

    monkeypatch.setattr(steps, "subprocess", SimpleNamespace(run=step))


@pytest.fixture(scope="session")
def kill_and_resume() -> Callable[[list[str], Path], None]:
    """Return a function that kills a training after its first checkpoint and resumes it to the end.

    It takes the arguments of `vitmodel` and the run folder.
    """
    from vitmodel.cli import main

    def killed_and_resumed(command: list[str], folder: Path) -> None:
        killed = subprocess.Popen(
            [sys.executable, "-m", "vitmodel.cli", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while killed.poll() is None and not (folder / "checkpoints" / "last.ckpt").exists():
            time.sleep(0.01)
        os.kill(killed.pid, signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
        assert main([*command, "--resume"]) == 0

    return killed_and_resumed


@pytest.fixture
def draw(tmp_path: Path) -> Draw:
    """Return a function that writes a small picture of a release and returns its path."""
    import cv2
    import numpy as np

    def draw(name: str, *boxes: Box) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        film = np.random.default_rng(0).integers(0, 256, (48, 40), np.uint8)  # all grey values, unlike a mask
        pixels = np.zeros_like(film) if boxes else film
        for x0, y0, x1, y1 in boxes:
            pixels[y0:y1, x0:x1] = 255
        assert cv2.imwrite(str(path), pixels)
        return path

    return draw


@pytest.fixture
def write_sheet(tmp_path: Path) -> WriteSheet:
    """Return a function that writes a spreadsheet of one sheet and returns its path."""
    import openpyxl

    def write_sheet(name: str, sheet: str, rows: Sequence[Sequence[object]]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        book = openpyxl.Workbook()
        book.active.title = sheet
        for row in rows:
            book.active.append(list(row))
        book.save(path)
        return path

    return write_sheet


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """Return an empty stand-in of the Hugging Face hub with an empty cache in the test's folder."""
    constants = pytest.importorskip("huggingface_hub.constants")
    http = importlib.import_module("huggingface_hub.utils._http")
    backoff = importlib.import_module("huggingface_hub.file_download")
    with serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # uploads by plain HTTP, which the server speaks
        monkeypatch.delenv("HF_TOKEN", raising=False)
        for module in (http, backoff):  # waits between attempts
            monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda _: None, time=time.time))
        http.close_session()
        yield hub
        http.close_session()
