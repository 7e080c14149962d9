"""Recognise zips and tars and read their indexes: the directory of a zip, or the headers of a tar."""

from __future__ import annotations

import functools
import lzma
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vitmodel.archives.names import path_on_disk
from vitmodel.errors import InputRefusedError

MAX_MEMBERS = 10_000_000
"""Most members of an archive; the largest public releases have about one million."""
COMPRESSED_STARTS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!\x1a\x07": "RAR",
}
"""First bytes of archives that cannot be read without unpacking them."""
ZIP_STARTS = (b"PK\3\4", b"PK\5\6", b"PK\7\x08")
OFFICE_SUFFIXES = (".xlsx", ".xlsm", ".ods", ".docx", ".pptx")
"""Suffixes of documents that are zips inside."""
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError, EOFError, struct.error, RuntimeError)
"""Exceptions of the standard library for damaged or unsupported members; bz2 raises OSError without a number."""


class Member(NamedTuple):
    """The place of a member in its archive.

    Attributes:
        offset: Position of its local header in a zip, of its bytes in a tar.
        size: Number of its bytes.
        state: Text that changes with the content: size, time and, in a zip, the checksum.
        stored_size: Number of its bytes in the archive.
        method: Compression method of a zip; None in a tar.
        checksum: CRC-32 of its bytes in a zip.
    """

    offset: int
    size: int
    state: str
    stored_size: int = 0
    method: int | None = None
    checksum: int = 0


@dataclass(frozen=True)
class Archive:
    """The index of an archive.

    Attributes:
        path: The archive.
        members: The regular files in it by name, in the archive's order.
        notes: What is passed over, for the user.
    """

    path: str
    members: dict[str, Member]
    notes: tuple[str, ...]

    @functools.cached_property
    def folders(self) -> frozenset[str]:
        """The names of all folders in the archive; '' is the archive itself."""
        names = {""}
        for name in self.members:
            while (name := name.rpartition("/")[0]) not in names:
                names.add(name)
        return frozenset(names)


def is_archive(path: Path | str) -> bool:
    """Return whether a path is that of a zip or of an uncompressed tar, by its content."""
    return archive_kind(path) in ("zip", "tar")


def archive_kind(path: Path | str) -> str:
    """Return zip, tar, the name of a compression that allows no access to single members, or '' for any other file."""
    status = file_status(path)
    if status is None or not stat.S_ISREG(status.st_mode):
        return ""
    return read_kind(os.path.abspath(path_on_disk(path)), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def read_kind(path: str, size: int, modified: int) -> str:
    """Return the kind of a regular file; one with another size or time is read again."""
    name = path.lower()
    if name.endswith(OFFICE_SUFFIXES):
        return ""
    try:
        with open(path, "rb") as file:
            start = file.read(512)
        # A zip may follow a program that unpacks it.
        if start.startswith(ZIP_STARTS) or (name.endswith(".zip") and zipfile.is_zipfile(path)):
            return "zip"
    except OSError:
        return ""
    if start[257:262] == b"ustar" or (name.endswith(".tar") and _is_old_tar(start)):
        return "tar"
    if name.endswith(ARCHIVE_SUFFIXES):
        return next((kind for magic, kind in COMPRESSED_STARTS.items() if start.startswith(magic)), "")
    return ""


def _is_old_tar(start: bytes) -> bool:
    """Return whether 512 bytes are a valid header of a tar, which has no magic number before POSIX.1-1988."""
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "replace")
    except tarfile.HeaderError:
        return False
    return True


def check_readable(path: Path | str) -> None:
    """Check that a source is no archive that would have to be unpacked.

    Raises:
        InputRefusedError: The source is such an archive; the message says what to do.
    """
    kind = archive_kind(path)
    if kind not in ("", "zip", "tar"):
        raise InputRefusedError(
            "unreadable",
            f"{path} is compressed as a whole ({kind}), so that its images cannot be read one by one; unpack it and "
            "pass the folder, or make a zip or an uncompressed tar of it",
        )


def open_archive(path: Path | str) -> Archive:
    """Return the index of the archive at `path`.

    Raises:
        InputRefusedError: The archive is damaged, cut short, encrypted or split.
    """
    path = path_on_disk(path)
    status = os.stat(path)
    return read_index(os.path.abspath(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=16)
def read_index(path: str, size: int, modified: int) -> Archive:
    """Read the index of an archive; one with another size or time is read again."""
    members: dict[str, Member] = {}
    unsafe: list[str] = []
    repeated: list[str] = []
    links: list[str] = []
    for name, member in archive_entries(path):
        if name.endswith("/"):
            continue
        parts = [part for part in name.split("/") if part not in ("", ".")]
        clean = "/".join(parts)
        if member is None:
            links.append(name)
            continue
        if not parts or ".." in parts or "\0" in clean:
            unsafe.append(name)
            continue
        if clean in members:
            repeated.append(name)
        members[clean] = member
        if len(members) > MAX_MEMBERS:
            raise InputRefusedError("too_large", f"{path} has more than {MAX_MEMBERS} members; divide it")
    nested = [name for name in members if name.lower().endswith(ARCHIVE_SUFFIXES)]
    notes = (
        _note(unsafe, "members have names that lead out of the archive and are left out"),
        _note(links, "links and sparse files are left out; make the archive of plain files (tar --dereference)"),
        _note(repeated, "names occur again; the last member of a name is read, as when unpacking"),
        _note(nested, "archives lie in this archive and are not read; unpack the outer one and pass them"),
    )
    return Archive(path, members, tuple(filter(None, notes)))


def _note(names: list[str], problem: str) -> str:
    return f"{len(names)} {problem}, such as {names[0]!r}" if names else ""


def archive_entries(path: str) -> Iterator[tuple[str, Member | None]]:
    """Yield name and place of each entry of a zip or tar; None for a link and for a folder, whose name ends with /.

    Raises:
        InputRefusedError: The archive is damaged, cut short, encrypted or split.
    """
    return _zip_entries(path) if archive_kind(path) == "zip" else _tar_entries(path)


def _zip_entries(path: str) -> Iterator[tuple[str, Member | None]]:
    """Yield name and place of each file in a zip; None for a link and for a folder."""
    try:
        with zipfile.ZipFile(path) as content:
            infos = content.infolist()
    except (*DAMAGE, OSError, ValueError) as error:
        advice = "copy it again; of a zip in several parts, join the parts first (zip -s 0)"
        raise InputRefusedError("unreadable", f"{path} cannot be read as a zip: {error}; {advice}") from None
    if any(info.flag_bits & 1 for info in infos):
        raise InputRefusedError("unreadable", f"{path} is encrypted; unpack it and pass the folder")
    for info in infos:
        name = info.filename.replace("\\", "/")
        if stat.S_ISLNK(info.external_attr >> 16):
            yield name.rstrip("/"), None
        elif name.endswith("/"):
            yield name, None
        else:
            state = f"{info.file_size} {info.CRC:08x}"
            yield (
                name,
                Member(info.header_offset, info.file_size, state, info.compress_size, info.compress_type, info.CRC),
            )


def _tar_entries(path: str) -> Iterator[tuple[str, Member | None]]:
    """Yield name and place of each file in a tar; None for a link, a sparse file and a folder."""
    length = os.path.getsize(path)
    try:
        with tarfile.open(path, "r:", errors="replace") as content:
            for info in content:
                content.members.clear()  # type: ignore[attr-defined] # tarfile keeps every header that it has read
                if info.islnk() or info.issym() or info.issparse():
                    yield info.name.rstrip("/"), None
                elif info.isdir():
                    yield f"{info.name.rstrip('/')}/", None
                elif info.isreg():
                    if info.offset_data + info.size > length:
                        raise tarfile.ReadError(f"{info.name} is cut short")
                    yield info.name, Member(info.offset_data, info.size, f"{info.size} {info.mtime}")
            _check_end(path, content.offset)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise InputRefusedError("unreadable", f"{path} cannot be read as a tar: {error}; copy it again") from None


def _check_end(path: str, offset: int) -> None:
    """Check that the members of a tar end with a block of zeros or the file: tarfile also stops at a damaged header.

    Raises:
        tarfile.ReadError: There is a damaged header at `offset`.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        if any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError(f"the header at byte {offset} is damaged")


def file_status(path: Path | str) -> os.stat_result | None:
    """Return the status of a path, or None if it does not exist or cannot be reached."""
    try:
        return os.stat(path_on_disk(path))
    except (OSError, ValueError):
        return None
