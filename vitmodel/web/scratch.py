"""Temporary folders of a server that are gone after it, even if it was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

PREFIX = "vitmodel-server-"


class Scratch:
    """A folder for temporary files in the system's temporary folder, locked while this process lives.

    Making one removes those of this user whose process is gone. The lock is that of the kernel, so that it ends with
    the process, however it ends.
    """

    def __init__(self) -> None:
        remove_leftovers()
        while True:
            self.folder = Path(tempfile.mkdtemp(prefix=PREFIX))
            self._lock = _lock(self.folder)
            if self._lock is not None and self.folder.exists():  # else another process removed it before the lock
                return
            self.remove()

    def new_folder(self) -> Path:
        """Return a new empty folder."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def discard(self, folder: Path) -> None:
        """Delete one of the new folders."""
        shutil.rmtree(folder, ignore_errors=True)

    def remove(self) -> None:
        """Delete the folder with everything in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _lock(folder: Path) -> int | None:
    """Return the descriptor of a folder with an exclusive lock; None if another process holds it or it is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def remove_leftovers() -> int:
    """Delete the folders of killed servers of this user and return their number."""
    removed = 0
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                continue
            descriptor = _lock(folder)
            if descriptor is None:
                continue
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)
            removed += 1
    return removed
