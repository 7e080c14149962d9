"""Read the members of zip and tar archives without unpacking them.

A path below an archive names a member: `/data/release.zip/train_images/1/2.dcm` is the member `train_images/1/2.dcm` of
the file `/data/release.zip`. `open_source` and the other functions here accept such a path as well as that of a file.
The index of an archive is read once per process, from the directory of a zip or the headers of a tar.
"""

from __future__ import annotations

import functools
import hashlib
import io
import lzma
import os
import stat
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, cast

from vitmodel.errors import ImageRefusedError, InputRefusedError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_MEMBER_BYTES = 1 << 30
"""Most bytes of a member that are unpacked into memory; the largest mammogram has about 200 million."""
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
ZIP_LOCAL_HEADER = struct.Struct("<26x2H")
"""Lengths of the name and of the extra field at the end of a member's local header (APPNOTE 4.3.7)."""
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
    status = _status(path)
    if status is None or not stat.S_ISREG(status.st_mode):
        return ""
    return _read_kind(os.path.abspath(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _read_kind(path: str, size: int, modified: int) -> str:
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
    status = os.stat(path)
    return _read_index(os.path.abspath(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _read_index(path: str, size: int, modified: int) -> Archive:
    """Read the index of an archive; one with another size or time is read again."""
    entries = _zip_entries(path) if archive_kind(path) == "zip" else _tar_entries(path)
    members: dict[str, Member] = {}
    unsafe: list[str] = []
    repeated: list[str] = []
    links: list[str] = []
    for name, member in entries:
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
        _note(links, "links are left out; make the archive with the files that they lead to (tar --dereference)"),
        _note(repeated, "names occur again; the last member of a name is read, as when unpacking"),
        _note(nested, "archives lie in this archive and are not read; unpack the outer one and pass them"),
    )
    return Archive(path, members, tuple(filter(None, notes)))


def _note(names: list[str], problem: str) -> str:
    return f"{len(names)} {problem}, such as {names[0]!r}" if names else ""


def _zip_entries(path: str) -> Iterator[tuple[str, Member | None]]:
    """Yield name and place of each file in a zip; None for a link."""
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
            yield name, None
        elif not name.endswith("/"):
            state = f"{info.file_size} {info.CRC:08x}"
            yield (
                name,
                Member(info.header_offset, info.file_size, state, info.compress_size, info.compress_type, info.CRC),
            )


def _tar_entries(path: str) -> Iterator[tuple[str, Member | None]]:
    """Yield name and place of each file in a tar; None for a link."""
    length = os.path.getsize(path)
    try:
        with tarfile.open(path, "r:", errors="replace") as content:
            for info in content:
                content.members.clear()  # type: ignore[attr-defined] # tarfile keeps every header that it has read
                if info.islnk() or info.issym() or info.issparse():
                    yield info.name, None
                elif info.isreg():
                    if info.offset_data + info.size > length:
                        raise tarfile.ReadError(f"{info.name} is cut short")
                    yield info.name, Member(info.offset_data, info.size, f"{info.size} {info.mtime}")
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise InputRefusedError("unreadable", f"{path} cannot be read as a tar: {error}; copy it again") from None


def find_member(path: Path | str) -> tuple[Archive, str] | None:
    """Return the archive that a path leads into and the name in it, '' for the archive itself; None for other paths.

    Raises:
        InputRefusedError: The archive cannot be read.
    """
    text = os.path.abspath(path)
    archive = text
    while (status := _status(archive)) is None and archive != "/":
        archive = os.path.dirname(archive)
    if status is None or not stat.S_ISREG(status.st_mode):
        return None
    state = (archive, status.st_size, status.st_mtime_ns)
    return (_read_index(*state), text[len(archive) + 1 :]) if _read_kind(*state) in ("zip", "tar") else None


def _status(path: Path | str) -> os.stat_result | None:
    """Return the status of a path, or None if it does not exist or cannot be reached."""
    try:
        return os.stat(path)
    except (OSError, ValueError):
        return None


def is_source_file(path: Path | str) -> bool:
    """Return whether a path is that of a file, in a folder or in an archive; an archive is a folder."""
    found = None if os.path.isdir(path) else find_member(path)
    return os.path.isfile(path) if found is None else found[1] in found[0].members


def is_source_folder(path: Path | str) -> bool:
    """Return whether a path is that of a folder, of an archive or of a folder in an archive."""
    found = None if os.path.isdir(path) else find_member(path)
    return os.path.isdir(path) if found is None else found[1] in found[0].folders


def source_exists(path: Path | str) -> bool:
    """Return whether a path is that of a file or folder, in an archive or not."""
    return os.path.exists(path) or is_source_file(path) or is_source_folder(path)


def member_paths(folder: Path | str) -> list[str]:
    """Return the paths of all files below an archive or a folder in it; none for other paths."""
    found = find_member(folder)
    if found is None:
        return []
    archive, name = found
    prefix = f"{name}/" if name else ""
    return [f"{archive.path}/{member}" for member in archive.members if member.startswith(prefix)]


def folder_names(folder: Path | str) -> list[str]:
    """Return the names of the folders directly in a folder, an archive or a folder in an archive."""
    if os.path.isdir(folder):
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_dir()]
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
        status = os.stat(path)
        return f"{status.st_size} {status.st_mtime_ns}"
    except NotADirectoryError:
        pass
    except OSError:
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
        OSError: The file does not exist or cannot be read.
        ImageRefusedError: The member or its archive is damaged; reading may raise it later.
    """
    try:
        return open(path, "rb")
    except NotADirectoryError:  # the path leads through a file: an archive?
        try:
            found = find_member(path)
        except InputRefusedError as refusal:
            raise ImageRefusedError(refusal.code, refusal.message) from refusal
        if found is None or found[1] not in found[0].members:
            raise FileNotFoundError(2, "no such member in the archive", str(path)) from None
        return io.BufferedReader(MemberFile(_content(*found)))


class MemberFile(io.RawIOBase):
    """A member of an archive as a file that can be read at any position.

    Args:
        content: The bytes of the member.
    """

    def __init__(self, content: MemberContent) -> None:
        super().__init__()
        self._content = content
        self._position = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position, as in any file, and return it."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._content.member.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill `buffer` from the current position on and return the number of bytes."""
        view = memoryview(buffer).cast("B")
        data = self._content.read(self._position, len(view))
        view[: len(data)] = data
        self._position += len(data)
        return len(data)


class MemberContent:
    """The bytes of a member, unpacked once and only as far as they are needed.

    Args:
        archive: The archive.
        name: Name of the member.
    """

    def __init__(self, archive: Archive, name: str) -> None:
        self.path = f"{archive.path}/{name}"
        self.member = archive.members[name]
        self._archive = archive
        self._bytes = bytearray()
        self._damage = ""

    @functools.cached_property
    def _packed(self) -> BinaryIO:
        return _open_packed(self._archive, self.member)

    def read(self, position: int, size: int) -> bytes:
        """Return up to `size` bytes from `position` on.

        Raises:
            ImageRefusedError: The member is damaged or too large.
        """
        end = min(position + size, self.member.size)
        if end > MAX_MEMBER_BYTES:
            raise ImageRefusedError(
                "too_large", f"{self.path} has more than {MAX_MEMBER_BYTES >> 20} MiB unpacked; leave it out"
            )
        try:
            while len(self._bytes) < end and not self._damage:
                block = self._packed.read(max(end - len(self._bytes), io.DEFAULT_BUFFER_SIZE))
                self._bytes += block[: self.member.size - len(self._bytes)]
                if not block:
                    self._damage = "it is cut short"
        except (*DAMAGE, OSError) as error:
            self._damage = str(error)
        if len(self._bytes) < end:
            raise ImageRefusedError(
                "unreadable", f"{self.path} is damaged in its archive ({self._damage}); copy the archive again"
            )
        return bytes(memoryview(self._bytes)[position:end])


def _open_packed(archive: Archive, member: Member) -> BinaryIO:
    """Return a file that gives the unpacked bytes of a member in order, and checks their CRC-32 at the end of a zip's.

    Each member has a file object of its own: a shared one could not be read by several threads or after a fork.
    """
    file = open(archive.path, "rb")  # noqa: SIM115 (closed with the returned object)
    file.seek(member.offset)
    if member.method is None:
        return file
    header = file.read(30)
    if not header.startswith(b"PK\3\4") or len(header) < 30:
        raise ImageRefusedError("unreadable", f"{archive.path} is damaged at byte {member.offset}; copy it again")
    file.seek(sum(ZIP_LOCAL_HEADER.unpack(header)), io.SEEK_CUR)
    info = zipfile.ZipInfo()
    info.compress_type = member.method
    info.compress_size = member.stored_size
    info.file_size = member.size
    info.CRC = member.checksum
    return cast(BinaryIO, zipfile.ZipExtFile(file, "r", info, close_fileobj=True))


_last = threading.local()
"""The content of the member that each thread has opened last, because a file is opened several times for one crop."""


def _content(archive: Archive, name: str) -> MemberContent:
    key = (os.getpid(), archive.path, name, archive.members[name])
    if getattr(_last, "key", None) != key:
        _last.content = MemberContent(archive, name)
        _last.key = key
    return cast(MemberContent, _last.content)
