"""Tests of worker processes: one that dies, hangs or raises loses only its own item, and none outlives its parent."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vitmodel.errors import VitmodelError
from vitmodel.jobs.parallel import parallel_map
from vitmodel.jobs.workers import process_per_thread

ROOT = Path(__file__).resolve().parents[2]


def square(item: int) -> int:
    """Return the square of an item; item 3 crashes the process and item 5 ends it."""
    if item == 3:
        ctypes.string_at(0)  # a segmentation fault
    if item == 5:
        os._exit(7)
    return item * item


def describe_loss(item: int, message: str) -> str:
    return f"{item}: {message}"


def test_a_crash_loses_only_its_item() -> None:
    results = list(
        parallel_map(square, range(9), "", jobs=2, backend="processes", on_lost=describe_loss)  # type: ignore[arg-type]
    )
    assert results[3] == "3: the worker process died with signal SIGSEGV"
    assert results[5] == "5: the worker process died with exit status 7"
    assert [results[item] for item in (0, 1, 2, 4, 6, 7, 8)] == [0, 1, 4, 16, 36, 49, 64]


def test_a_crash_without_a_substitute_is_an_error() -> None:
    with pytest.raises(VitmodelError, match="SIGSEGV"):
        list(parallel_map(square, range(9), "test", jobs=2, backend="processes"))


def test_a_worker_process_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    script = tmp_path / "script.py"  # each process that it starts runs the script again
    script.write_text(
        "from vitmodel.jobs.workers import process_per_thread\nwith process_per_thread(int, print) as call: call('7')"
    )
    run = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert "VitmodelError: a worker process cannot start" in run.stderr
    assert not run.stdout


def test_a_hanging_worker_is_stopped_at_the_time_limit() -> None:
    with process_per_thread(time.sleep, describe_loss, time_limit=3) as call:  # type: ignore[arg-type]
        assert call(0) is None
        assert call(60) == "60: processing took more than 3 s and was stopped"
        assert call(0) is None


def test_an_exception_is_raised_in_the_caller_and_the_worker_continues() -> None:
    with process_per_thread(int, describe_loss) as call:  # type: ignore[arg-type]
        assert call("7") == 7
        with pytest.raises(ValueError, match="seven"):
            call("seven")
        assert call("8") == 8


def test_no_worker_outlives_a_killed_parent() -> None:
    """Otherwise it could write into a folder whose lock ended with the parent."""
    code = """
import os, signal, time
from vitmodel.jobs.workers import process_per_thread
with process_per_thread(time.sleep, print) as call:
    call(0)
    print(*[child.pid for child in __import__("multiprocessing").active_children()], flush=True)
    signal.alarm(1)
    call(60)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    worker = int(run.stdout)
    assert run.returncode < 0
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and os.path.exists(f"/proc/{worker}"):
        time.sleep(0.02)
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
