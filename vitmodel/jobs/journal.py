"""Lock output folders for one run at a time, and record finished items in a journal from which a killed run resumes."""

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
"""Name of the lock file in an output folder; it also marks the files there as results, never read as sources."""


@contextlib.contextmanager
def lock_folder(folder: Path, results: str = JOURNAL) -> Iterator[None]:
    """Lock `folder` for this process, and remove what the run created there if it is refused before it has results.

    Args:
        folder: The output folder; it is created if it does not exist.
        results: Glob pattern of the files and folders inside `folder` that count as results, see `removed_if_refused`.

    Raises:
        UsageError: Another run has locked the folder.
        VitmodelError: The folder cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        cleanup = removed_if_refused(folder, results)  # remembers what was there before the lock file
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder / LOCK_FILE).open("w"))
        except OSError as error:
            raise VitmodelError(
                f"cannot write to {folder}: {error.strerror}; check space and permissions, or choose another folder"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                f"{folder} is in use by another run; wait until it ends or choose another folder"
            ) from None
        # Without this, a loader process that outlives a killed run would keep the folder locked.
        os.register_at_fork(after_in_child=lock.close)
        stack.enter_context(cleanup)
        yield


class removed_if_refused(contextlib.AbstractContextManager[None]):  # noqa: N801 (used like a function)
    """Remove what the block created in `folder` if it raises a VitmodelError before there are results.

    A run that is refused, for example because its weights do not fit, then leaves nothing behind that would stop the
    next attempt. Files and folders that existed when the object was created are kept. If there are results, everything
    is kept.

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
        current = set(self.folder.iterdir()) if self.folder.is_dir() else set()
        for path in current - self.before:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for path in self.missing:
                path.rmdir()


def read_journal(path: Path) -> dict[str, dict[str, Any]]:
    """Return the entries of a journal by key, without changing the file; none if it does not exist."""
    return _read_whole_lines(path)[0]


def _read_whole_lines(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Return the entries of a journal by key, and the number of bytes up to the end of its last whole line."""
    whole, newline, _ = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
    entries = {}
    for line in whole.splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            entries[entry["key"]] = entry
    return entries, len(whole) + len(newline)


class Journal:
    """An append-only file of finished entries by key.

    Lines that were cut short by a kill or damaged by a power failure are ignored. The file is not flushed to the disk:
    a line lost in a power failure means that its item is processed again, and a surviving line was written after its
    crop, which `write_atomic` had flushed to the disk before. Entries that cannot be made again need `durable`.

    Args:
        path: The journal file; it is created if it does not exist.
        durable: Flush each entry to the disk.

    Attributes:
        entries: The entries by key.

    Raises:
        VitmodelError: The file cannot be written to.
    """

    def __init__(self, path: Path, durable: bool = False) -> None:
        self.path = path
        self.durable = durable
        self.entries, size = _read_whole_lines(path)
        if path.exists() and path.stat().st_size > size:
            with path.open("rb+") as file:
                file.truncate(size)
        try:
            self._file = path.open("ab", buffering=0)  # without a buffer a full disk fails in `append`, not in `close`
        except OSError as error:
            raise VitmodelError(
                f"cannot write {path}: {error.strerror}; check its permissions and run the same command again"
            ) from error

    def append(self, key: str, entry: dict[str, Any]) -> None:
        """Record that `key` is finished.

        Args:
            key: Key of the item.
            entry: JSON values to be stored with it.

        Raises:
            VitmodelError: The disk is full.
        """
        self.entries[key] = {"key": key, **entry}
        try:
            line = json.dumps(self.entries[key]).encode() + b"\n"
            while line:
                line = line[self._file.write(line) :]
            if self.durable:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise VitmodelError(
                f"cannot write {self.path}: {error.strerror}; free some space and run the same command again"
            ) from error

    def close(self) -> None:
        """Close the file; `entries` stays available."""
        self._file.close()
