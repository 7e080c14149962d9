"""Temporary folders: those of killed servers are removed, those of running ones are not."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from vitmodel.web.scratch import PREFIX, Scratch

HOLD = """
import sys
from vitmodel.web.scratch import Scratch
folder = Scratch().new_folder()
(folder / "image.dcm").touch()
print(folder, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_leftovers_of_a_killed_process_are_removed_and_those_of_a_running_one_kept(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        folder = Path(process.stdout.readline().strip())
        Scratch().remove()
        assert (folder / "image.dcm").exists()
        process.kill()
        process.wait()
        assert folder.exists()
        Scratch().remove()
        assert not list(tmp_path.iterdir())


def test_other_folders_and_links_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path / "kept")
    (tmp_path / f"{PREFIX}file").touch()
    Scratch().remove()
    assert sorted(os.listdir(tmp_path)) == ["kept", f"{PREFIX}file", f"{PREFIX}link"]
