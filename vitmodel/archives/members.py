"""Read the bytes of a member of an archive at any position, unpacked once and only as far as they are needed."""

from __future__ import annotations

import functools
import io
import os
import struct
import threading
import zipfile
from typing import TYPE_CHECKING, BinaryIO, cast

from vitmodel.archives.index import DAMAGE, Archive, Member
from vitmodel.errors import ImageRefusedError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_MEMBER_BYTES = 1 << 30
"""Most bytes of a member that are unpacked into memory; the largest mammogram has about 200 million."""
ZIP_LOCAL_HEADER = struct.Struct("<26x2H")
"""Lengths of the name and of the extra field at the end of a member's local header (APPNOTE 4.3.7)."""


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


def last_content(archive: Archive, name: str) -> MemberContent:
    key = (os.getpid(), archive.path, name, archive.members[name])
    if getattr(_last, "key", None) != key:
        _last.content = MemberContent(archive, name)
        _last.key = key
    return cast(MemberContent, _last.content)
