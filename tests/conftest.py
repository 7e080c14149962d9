"""Fixtures that every test may use."""

from __future__ import annotations

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

hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None
)  # no clock, no files in the checkout
hypothesis.settings.load_profile("repeatable")
os.environ["OMP_NUM_THREADS"] = (
    "1"  # before torch is imported: one thread per test worker and per process that a test starts
)

MakeOnce = Callable[[str, Callable[[Path], object]], Path]
"""Takes a folder's name and a function that fills the folder; returns the folder."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `integration` each test that uses a fixture made from the synthetic release."""
    for item in items:
        if "release" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real mammograms beside the checkout; the test skips where it is absent."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real mammograms are not at hand: {folder} is absent")
    return folder


def modification_times(folder: Path) -> dict[str, int]:
    """Return when each file under `folder` was last written, without Weights & Biases' own, which its service writes."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "wandb" not in path.parts]
    return {str(path): path.stat().st_mtime_ns for path in paths}


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeOnce]:
    """Return a function that fills a folder once per test run: the first worker makes it, the others wait and read it.

    At the end, a file in such a folder that was changed, added or removed by a test is an error.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder, complete = shared / name, shared / f"{name}.complete"
        with FileLock(shared / f"{name}.lock"):
            if not complete.exists():
                shutil.rmtree(folder, ignore_errors=True)  # left by a worker that failed halfway
                make(folder)
                complete.write_text(json.dumps(modification_times(folder)))
        return folder

    yield folder_of
    for complete in shared.glob("*.complete"):
        written = json.loads(complete.read_text()).items() ^ modification_times(complete.with_suffix("")).items()
        assert not written, f"a test wrote into a folder that all tests share: {sorted({path for path, _ in written})}"


@pytest.fixture(scope="session", autouse=True)
def validation_pictures() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Skip the figures that a training draws after each epoch, which take longer than the epoch of a small model.

    The value is a context manager that draws them.
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
    """A small synthetic release with faults: 12 patients, 6 of them with a cancer. Read only."""
    from vitmodel.config import Size, SynthConfig
    from vitmodel.phantoms.release import write_release

    settings = SynthConfig(
        out=Path(), patients=12, size=Size(256, 208), difficulty=0.0, positives=0.5, faults=True, jobs=1
    )
    return make_once("release", lambda folder: write_release(replace(settings, out=folder)))


@pytest.fixture(scope="session")
def crops(release: Path, make_once: MakeOnce) -> Path:
    """The folder of 64x32 crops that `vitmodel etl` makes of the release. Read only."""
    from vitmodel.commands.etl import etl
    from vitmodel.config import ETLConfig, Size

    def make(folder: Path) -> None:
        assert etl(ETLConfig(source=release, out=folder, size=Size(64, 32), jobs=2)) == 0

    return make_once("crops", make)


@pytest.fixture(scope="session")
def flags() -> list[str]:
    """A training short enough for a test; the last value is that of --wandb."""
    return [
        *("--model", "vit_micro", "--epochs", "3", "--tokens", "96", "--val", "0.25", "--test", "0.25"),
        *("--workers", "0", "--drop-path", "0.2", "--wandb", "off"),
    ]


@pytest.fixture(scope="session")
def run(
    crops: Path, flags: list[str], make_once: MakeOnce, validation_pictures: Callable[[], AbstractContextManager[None]]
) -> Path:
    """A finished run of three epochs, logged to Weights & Biases offline, with all its figures. Read only."""
    from vitmodel.cli import main

    def make(folder: Path) -> None:
        with validation_pictures():
            assert main(["train", str(crops / "manifest.csv"), str(folder), *flags[:-1], "offline"]) == 0

    return make_once("run", make)


@pytest.fixture(scope="session")
def exported(run: Path, make_once: MakeOnce) -> Path:
    """The package of `run` with its two ONNX files; beside it in `said.txt`, what the int8 export printed. Read only."""
    from vitmodel.cli import main

    def make(folder: Path) -> None:
        package = folder / "package"
        shutil.copytree(run / "package", package)
        eight_bits = ["--precision", "int8", "--calibration", str(run / "manifest.csv"), "--images", "1000"]
        assert main(["export", str(package), str(package / "model.fp32.onnx")]) == 0
        with redirect_stdout(io.StringIO()) as said:
            assert main(["export", str(package), str(package / "model.int8.onnx"), *eight_bits]) == 0
        (folder / "said.txt").write_text(said.getvalue())

    return make_once("exported", make) / "package"


@pytest.fixture
def steps_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the steps of a chain (versions, leave-out) in this process, where everything is imported already."""
    from vitmodel import cli
    from vitmodel.jobs import steps

    def step(arguments: Sequence[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        words = arguments[arguments.index("vitmodel.cli") + 1 :]
        return subprocess.CompletedProcess(arguments, cli.main(list(words)))

    monkeypatch.setattr(steps, "subprocess", SimpleNamespace(run=step))


@pytest.fixture(scope="session")
def kill_and_resume() -> Callable[[list[str], Path], None]:
    """Start a training (its arguments, its run folder), kill it after its first checkpoint, and go on to its end."""
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
