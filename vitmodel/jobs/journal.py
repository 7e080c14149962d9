"""Output folders: a lock for one run at a time, and a journal of finished items, from which a killed run resumes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from vitmodel.errors import UsageError, VitmodelError

JOURNAL = "journal.jsonl"
"""Name of the journal in an output folder."""
LOCK_FILE = ".vitmodel.lock"
"""Lock file of an output folder. It also marks the files there as results, which are never read as sources."""


@contextlib.contextmanager
def lock_folder(folder: Path, results: str = JOURNAL) -> Iterator[None]:
    """Hold `folder` for this process alone, and remove what the run created there if it is refused before it has results.

    Args:
        folder: The output folder; it is created if it does not exist.
        results: Glob pattern of the files and folders inside `folder` that count as results, see `removed_if_refused`.

    Raises:
        UsageError: Another run holds the folder.
        VitmodelError: The folder cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        cleanup = removed_if_refused(folder, results)  # remembers what was there before the lock file
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder / LOCK_FILE).open("w"))
        except OSError as error:
            raise VitmodelError(
                f"cannot write to {folder}: {error.strerror}; free the disk or choose another folder"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                f"{folder} is being written by another run; wait for it or choose another folder"
            ) from None
        os.register_at_fork(
            after_in_child=lock.close
        )  # or a loader process that outlives a killed run would hold its folder
        stack.enter_context(cleanup)
        yield


class removed_if_refused(contextlib.AbstractContextManager[None]):  # noqa: N801 (used like a function)
    """Remove what the block created in `folder` if it raises a VitmodelError before there are results.

    A run that is refused, for example because its weights do not fit, then leaves nothing behind that the next try would run into.
    Files and folders that were there when the object was created stay, and so does everything once there are results.

    Args:
        folder: The output folder; it may not exist yet.
        results: Glob pattern, relative to `folder`, of folders and non-empty files that count as results.
    """

    def __init__(self, folder: Path, results: str) -> None:
        self.folder = folder
        self.results = results
        self.before = set(folder.iterdir()) if folder.is_dir() else set()
        self.missing = [path for path in (folder, *folder.parents) if not path.exists()]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, VitmodelError) and not self.has_results():
            self.remove()

    def has_results(self) -> bool:
        """Return whether the folder holds results, of this run or an earlier one."""
        return any(path.is_dir() or path.stat().st_size for path in self.folder.glob(self.results))

    def remove(self) -> None:
        """Delete what is new in the folder, and the folder and its parents if they are new and empty."""
        for path in set(self.folder.iterdir()) - self.before if self.folder.is_dir() else ():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for path in self.missing:
                path.rmdir()


def file_state(path: Path) -> str:
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
            self._file = path.open(
                "ab", buffering=0
            )  # a full disk is then met here, and not again when the file is closed
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
            raise VitmodelError(
                f"cannot write {self.path}: {error.strerror}; free some space and run the same command again"
            ) from error

    def close(self) -> None:
        """Close the file; its entries stay."""
        self._file.close()
