"""Open, find and describe source files, whether they lie in a folder or in an archive."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
from pathlib import Path

from vitmodel.archives.index import Archive, file_status, read_index, read_kind
from vitmodel.archives.members import MemberFile, last_content
from vitmodel.archives.names import path_on_disk, path_to_text
from vitmodel.errors import ImageRefusedError, InputRefusedError


def find_member(path: Path | str) -> tuple[Archive, str] | None:
    """Return the archive that a path leads into and the name in it, '' for the archive itself; None for other paths.

    Raises:
        InputRefusedError: The archive cannot be read.
    """
    text = os.path.abspath(path_on_disk(path))
    archive = text
    while (status := file_status(archive)) is None and archive != "/":
        archive = os.path.dirname(archive)
    if status is None or not stat.S_ISREG(status.st_mode):
        return None
    state = (archive, status.st_size, status.st_mtime_ns)
    return (read_index(*state), text[len(archive) + 1 :]) if read_kind(*state) in ("zip", "tar") else None


def is_source_file(path: Path | str) -> bool:
    """Return whether a path is that of a file, in a folder or in an archive; an archive is a folder."""
    path = path_on_disk(path)
    found = None if os.path.isdir(path) else find_member(path)
    return os.path.isfile(path) if found is None else found[1] in found[0].members


def is_source_folder(path: Path | str) -> bool:
    """Return whether a path is that of a folder, of an archive or of a folder in an archive."""
    path = path_on_disk(path)
    found = None if os.path.isdir(path) else find_member(path)
    return os.path.isdir(path) if found is None else found[1] in found[0].folders


def source_exists(path: Path | str) -> bool:
    """Return whether a path is that of a file or folder, in an archive or not."""
    return os.path.exists(path_on_disk(path)) or is_source_file(path) or is_source_folder(path)


def member_paths(folder: Path | str) -> list[str]:
    """Return the paths of all files below an archive or a folder in it; none for other paths."""
    found = find_member(folder)
    if found is None:
        return []
    archive, name = found
    prefix = f"{name}/" if name else ""
    return [f"{path_to_text(archive.path)}/{member}" for member in archive.members if member.startswith(prefix)]


def folder_names(folder: Path | str) -> list[str]:
    """Return the names of the folders directly in a folder, an archive or a folder in an archive."""
    folder = path_on_disk(folder)
    if os.path.isdir(folder):
        with os.scandir(folder) as entries:
            return [path_to_text(entry.name) for entry in entries if entry.is_dir()]
    found = find_member(folder)
    if found is None:
        return []
    archive, name = found
    return [path.rpartition("/")[2] for path in archive.folders if path and path.rpartition("/")[0] == name]


def source_state(path: Path | str) -> str:
    """Return a text that changes with a file's content, without reading it; 'missing' if it does not exist.

    It holds the size and the modification time of a file or of a member of a tar, or the size and the checksum of a
    member of a zip.
    """
    try:
        status = os.stat(path_on_disk(path))
        return f"{status.st_size} {status.st_mtime_ns}"
    except NotADirectoryError:
        pass
    except (OSError, ValueError):  # a path with a NUL raises ValueError
        return "missing"
    try:
        found = find_member(path)
    except InputRefusedError:
        return "missing"
    member = None if found is None else found[0].members.get(found[1])
    return "missing" if member is None else member.state


def sha256_source(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes, in an archive or not, as 64 hex digits.

    Raises:
        OSError: The file cannot be read.
        ImageRefusedError: The member is damaged.
    """
    with open_source(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_source(path: Path | str) -> io.BufferedReader:
    """Open a file, in an archive or not, for reading in binary mode.

    Raises:
        OSError: The file does not exist, cannot be read, or is a pipe, a socket or a device.
        ImageRefusedError: The member or its archive is damaged; reading may raise it later.
    """
    try:
        return open(path_on_disk(path), "rb", opener=_open_regular)
    except NotADirectoryError:  # the path leads through a file: an archive?
        try:
            found = find_member(path)
        except InputRefusedError as refusal:
            raise ImageRefusedError.of(refusal) from refusal
        if found is None or found[1] not in found[0].members:
            raise FileNotFoundError(2, "no such member in the archive", str(path)) from None
        return io.BufferedReader(MemberFile(last_content(*found)))


def _open_regular(path: str, flags: int) -> int:
    """Open a regular file or a folder, which `open` refuses itself. A pipe would wait for a writer that may never come.

    Raises:
        OSError: The path is that of a pipe, a socket or a device.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK)  # without effect on a regular file
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is not a regular file but a pipe, a socket or a device", path)
