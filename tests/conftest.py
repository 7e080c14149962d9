"""Fixtures that every test may use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real mammograms beside the checkout; the test skips where it is absent."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real mammograms are not at hand: {folder} is absent")
    return folder


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic release with faults: 12 patients, 6 of them with a cancer. Read only."""
    from vitmodel.config import Size, SynthConfig
    from vitmodel.data.synthetic import write_release

    folder = tmp_path_factory.mktemp("release")
    return write_release(SynthConfig(out=folder, patients=12, size=Size(256, 208), difficulty=0.0, positives=0.5, faults=True))


@pytest.fixture(scope="session")
def crops(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `vitmodel etl` made of it, 64x32. Read only."""
    from vitmodel.commands.etl import etl
    from vitmodel.config import ETLConfig, Size

    folder = tmp_path_factory.mktemp("crops")
    assert etl(ETLConfig(source=release, out=folder, size=Size(64, 32))) == 0
    return folder


@pytest.fixture(scope="session")
def flags() -> list[str]:
    """A training short enough for a test; the last value is that of --wandb."""
    return [
        *("--model", "vit_tiny", "--epochs", "3", "--tokens", "96", "--val", "0.25", "--test", "0.25"),
        *("--workers", "0", "--drop-path", "0.2", "--wandb", "off"),
    ]


@pytest.fixture(scope="session")
def run(crops: Path, flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three epochs, logged to Weights & Biases offline. Read only."""
    from vitmodel.cli import main

    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", str(crops / "manifest.csv"), str(folder), *flags[:-1], "offline"]) == 0
    return folder


@pytest.fixture(scope="session")
def kill_and_resume() -> Callable[[list[str], Path], None]:
    """Start a training (its arguments, its run folder), kill it after its first checkpoint, and go on to its end."""
    from vitmodel.cli import main

    def killed_and_resumed(command: list[str], folder: Path) -> None:
        killed = subprocess.Popen([sys.executable, "-m", "vitmodel.cli", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while killed.poll() is None and not (folder / "checkpoints" / "last.ckpt").exists():
            time.sleep(0.01)
        os.kill(killed.pid, signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
        assert main([*command, "--resume"]) == 0

    return killed_and_resumed
