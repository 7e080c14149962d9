"""What a long run has finished, one JSON line each, so that a killed run goes on where it stopped. Knows nothing of images."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitmodel.errors import UsageError, VitmodelError

LOCK = ".vitmodel.lock"
"""The file in a folder that a run writes or wrote into; it also tells that what lies there are results and no sources."""


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process alone. Raises UsageError where another run holds it, VitmodelError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise VitmodelError(f"cannot write to {folder}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"{folder} is being written by another run; wait for it or choose another folder") from None
        os.register_at_fork(after_in_child=lock.close)  # or a loader's process that outlives a killed run would hold its folder
        yield


def state(path: Path) -> str:
    """A file's size and time of change, or that it is missing."""
    try:
        status = path.stat()
    except OSError:
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"


class Journal:
    """An append-only file of finished entries by key; a line that a kill cut short or a power cut spoilt does not count.

    It is not forced to the disk: a line that a power cut loses is work done again, and one that survives follows its crop, whose
    bytes `write_atomic` has forced there before.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, dict[str, Any]] = {}
        if path.exists():
            whole, _, torn = path.read_bytes().rpartition(b"\n")
            for line in whole.splitlines():
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    self.entries[entry["key"]] = entry
            if torn:
                with path.open("rb+") as file:
                    file.truncate(len(whole) + 1 if whole else 0)
        try:
            self._file = path.open("ab", buffering=0)  # a full disk is then met here, and not again when the file is closed
        except OSError as error:
            raise VitmodelError(f"cannot write {path}: {error.strerror}") from error

    def append(self, key: str, entry: dict[str, Any]) -> None:
        """Record that `key` is finished. Raises VitmodelError where the disk is full."""
        self.entries[key] = {"key": key, **entry}
        try:
            line = json.dumps(self.entries[key]).encode() + b"\n"
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise VitmodelError(f"cannot write {self.path}: {error.strerror}; free some space and run the same command again") from error

    def close(self) -> None:
        """Close the file; its entries stay."""
        self._file.close()
