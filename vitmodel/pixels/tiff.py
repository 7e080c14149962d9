"""Read the directories of a TIFF file (TIFF 6.0, section 2; BigTIFF) and choose the page that holds the picture.

EXIF data has the same layout, so the orientation of a JPEG or PNG is read here, too.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import BinaryIO

from vitmodel.errors import ImageRefusedError

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of a TIFF file; + marks BigTIFF, whose offsets have 64 bits."""
MAX_PAGES = 1000
"""Most pages that are listed."""
MAX_ENTRIES = 1000
"""Most entries of a directory; they rarely have more than 30."""
MAX_VALUES = 1 << 20
"""Most values of an entry that are read, such as the offset of each strip."""
VALUE_TYPES = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 18: "Q"}
"""struct format of each integer type; other values are not needed."""

SUBFILE_TYPE, OLD_SUBFILE_TYPE, WIDTH, HEIGHT, BITS, PHOTOMETRIC = 254, 255, 256, 257, 258, 262
STRIP_OFFSETS, ORIENTATION, SAMPLES, STRIP_SIZES, TILE_OFFSETS, TILE_SIZES = 273, 274, 277, 279, 324, 325
WHITE_IS_ZERO, PALETTE = 0, 3
"""Values of PhotometricInterpretation."""

Directory = dict[int, tuple[int, ...]]
"""The integer values of each tag."""


@dataclass(frozen=True)
class TiffPage:
    """One page of a TIFF file."""

    number: int
    rows: int
    columns: int
    bits: int
    samples: int
    photometric: int
    orientation: int
    end: int
    """Position in the file at which the data of the page ends."""


def read_tiff_page(file: BinaryIO) -> TiffPage:
    """Return the only page of a TIFF file that is not a preview or a mask.

    Raises:
        ImageRefusedError: The file has several such pages.
        ValueError: A directory is damaged.
        KeyError: A directory does not state the size.
        struct.error: The file is cut short.
    """
    directories = read_directories(file)
    pages = [_page(number, directory) for number, directory in enumerate(directories)]
    longest = max((max(page.rows, page.columns) for page in pages), default=0)
    full = [
        page
        for page, directory in zip(pages, directories, strict=True)
        if not _is_preview(directory) and max(page.rows, page.columns) > longest / 2
    ]
    if len(full) > 1:
        raise ImageRefusedError("multi_frame", f"the file contains {len(full)} pictures instead of one; split it")
    if not full:
        raise ValueError("the file has no page with a picture")
    return full[0]


def _page(number: int, directory: Directory) -> TiffPage:
    """Return the page that a directory describes."""
    offsets = directory.get(TILE_OFFSETS) or directory.get(STRIP_OFFSETS, ())
    sizes = directory.get(TILE_SIZES) or directory.get(STRIP_SIZES, ())
    return TiffPage(
        number=number,
        rows=directory[HEIGHT][0],
        columns=directory[WIDTH][0],
        bits=max(directory.get(BITS, (1,))),
        samples=directory.get(SAMPLES, (1,))[0],
        photometric=directory.get(PHOTOMETRIC, (1,))[0],
        orientation=directory.get(ORIENTATION, (1,))[0],
        end=max((offset + size for offset, size in zip(offsets, sizes, strict=False)), default=0),
    )


def _is_preview(directory: Directory) -> bool:
    """Return whether a page is a reduced version of another page or a transparency mask."""
    return bool(directory.get(SUBFILE_TYPE, (0,))[0] & 0b101) or directory.get(OLD_SUBFILE_TYPE, (1,))[0] == 2


def read_directories(file: BinaryIO, limit: int = MAX_PAGES) -> list[Directory]:
    """Return the directories of a TIFF file or of EXIF data, one per page.

    Raises:
        ValueError: A directory is damaged or is its own successor.
        struct.error: The file is cut short.
    """
    file.seek(0)
    start = file.read(8)
    order = "<" if start[:2] == b"II" else ">"
    big = start[2:4] in (b"+\0", b"\0+")
    if big:
        (position,) = struct.unpack(order + "Q", file.read(8))
    else:
        (position,) = struct.unpack(order + "I", start[4:])
    directories: list[Directory] = []
    visited: set[int] = set()
    while position and len(directories) < limit:
        if position in visited:
            raise ValueError("the directories of the file form a loop")
        visited.add(position)
        directory, position = _read_directory(file, position, order, big)
        directories.append(directory)
    return directories


def _read_directory(file: BinaryIO, position: int, order: str, big: bool) -> tuple[Directory, int]:
    """Return the directory at `position` and the position of the next one, 0 after the last."""
    head, entry, offset = ("Q", "HHQ8s", "Q") if big else ("H", "HHI4s", "I")
    file.seek(position)
    (count,) = struct.unpack(order + head, file.read(struct.calcsize("<" + head)))
    if not 1 <= count <= MAX_ENTRIES:
        raise ValueError(f"a directory of the file states {count} entries")
    size = struct.calcsize("<" + entry)
    table = file.read(count * size)
    (following,) = struct.unpack(order + offset, file.read(struct.calcsize("<" + offset)).ljust(8 if big else 4, b"\0"))
    directory: Directory = {}
    for tag, kind, number, inline in struct.iter_unpack(order + entry, table):
        if kind not in VALUE_TYPES or not 0 < number <= MAX_VALUES:
            continue
        length = number * struct.calcsize("<" + VALUE_TYPES[kind])
        if length > len(inline):
            file.seek(struct.unpack(order + offset, inline)[0])
            inline = file.read(length)
        directory[tag] = struct.unpack(f"{order}{number}{VALUE_TYPES[kind]}", inline[:length])
    return directory, following


def read_exif_orientation(exif: bytes) -> int:
    """Return the orientation (1 to 8) that EXIF data states, 1 if it states none or is damaged."""
    try:
        return read_directories(io.BytesIO(exif), limit=1)[0].get(ORIENTATION, (1,))[0]
    except (ValueError, IndexError, OverflowError, struct.error):
        return 1
