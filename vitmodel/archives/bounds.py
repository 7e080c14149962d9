"""Check that an archive of a stranger is small enough to be read, before it is."""

from __future__ import annotations

import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vitmodel.archives.index import archive_entries, archive_kind
from vitmodel.errors import RequestRefusedError

END_RECORD = b"PK\5\6"
END_SIZE = 22
END64_LOCATOR = b"PK\6\7"
LOCATOR_SIZE = 20
ENTRY_BYTES = 1024
"""Most bytes that an entry of a zip's directory takes, on average: its name, times and permissions."""
TOO_LARGE = 413
NOT_USABLE = 422


@dataclass(frozen=True)
class ArchiveBounds:
    """The bounds of an archive.

    Attributes:
        entries: Largest number of files, folders and links.
        depth: Largest number of folders around a file.
        size: Largest sum of the unpacked sizes in bytes.
        seconds: Longest time for reading the index.
        name: Largest number of bytes of a file's or a folder's name; that of Linux.
    """

    entries: int
    depth: int
    size: int
    seconds: float
    name: int = 255


def check_bounds(path: Path, bounds: ArchiveBounds, title: str) -> None:
    """Check the index of a zip or tar.

    Args:
        path: The archive.
        bounds: The bounds.
        title: How the messages call the archive.

    Raises:
        RequestRefusedError: 413 if it exceeds a bound; 422 if it holds a link, a name twice, or a name that is both a
            file's and a folder's.
        InputRefusedError: The archive is damaged.
    """
    if archive_kind(path) == "zip" and _directory_size(path) > bounds.entries * ENTRY_BYTES:
        raise _too_many(title, bounds)
    start = time.monotonic()
    size = 0
    names: set[str] = set()
    folders: set[str] = set()
    for number, (name, member) in enumerate(archive_entries(str(path)), 1):
        if number > bounds.entries:
            raise _too_many(title, bounds)
        if time.monotonic() - start > bounds.seconds:
            raise RequestRefusedError(
                TOO_LARGE, f"the index of {title} takes more than {bounds.seconds:g} s to read; send fewer images"
            )
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if len(parts) > bounds.depth + 1:
            raise RequestRefusedError(
                TOO_LARGE, f"{title} has more than {bounds.depth} folders in each other; pack it with fewer"
            )
        if any(len(os.fsencode(part)) > bounds.name for part in parts):
            raise RequestRefusedError(
                NOT_USABLE, f"{title} holds a name of more than {bounds.name} bytes; give its files shorter names"
            )
        folders.update("/".join(parts[:length]) for length in range(1, len(parts)))
        if member is None:
            if not name.endswith("/"):
                raise RequestRefusedError(
                    NOT_USABLE, f"{title} holds a link or a sparse file; pack the files themselves"
                )
            continue
        size += member.size
        if size > bounds.size:
            raise RequestRefusedError(
                TOO_LARGE, f"the unpacked content of {title} is larger than {bounds.size // 1_000_000} MB; "
                "send fewer images, or start the server with a larger --upload-limit"
            )  # fmt: skip
        clean = "/".join(parts)
        if clean in names:
            raise RequestRefusedError(NOT_USABLE, f"{title} holds a name twice; give each file a name of its own")
        names.add(clean)
    if names & folders:
        raise RequestRefusedError(
            NOT_USABLE, f"{title} holds a name as that of a file and of a folder; give each a name of its own"
        )


def _too_many(title: str, bounds: ArchiveBounds) -> RequestRefusedError:
    return RequestRefusedError(TOO_LARGE, f"{title} holds more than {bounds.entries} entries; send fewer images")


def _directory_size(path: Path) -> int:
    """Return the size of a zip's directory in bytes, without reading it (APPNOTE.TXT, 4.3.14 to 4.3.16); 0 = unknown.

    Python's zipfile reads a directory of this size into memory as a whole.
    """
    with path.open("rb") as file:
        length = file.seek(0, os.SEEK_END)
        start = max(0, length - END_SIZE - 0xFFFF)
        file.seek(start)
        tail = file.read()
        place = tail.rfind(END_RECORD)
        if place < 0 or len(tail) - place < END_SIZE:
            return 0
        (size,) = struct.unpack_from("<I", tail, place + 12)
        return _directory_size64(file, start + place) or int(size)


def _directory_size64(file: BinaryIO, end: int) -> int:
    """Return the size of a zip64's directory; 0 if the zip is none. `end` is the place of its end record."""
    if end < LOCATOR_SIZE:
        return 0
    file.seek(end - LOCATOR_SIZE)
    locator = file.read(LOCATOR_SIZE)
    if not locator.startswith(END64_LOCATOR):
        return 0
    (place,) = struct.unpack_from("<Q", locator, 8)
    file.seek(min(place, end))
    record = file.read(56)
    return int(struct.unpack_from("<Q", record, 40)[0]) if len(record) == 56 else 0
