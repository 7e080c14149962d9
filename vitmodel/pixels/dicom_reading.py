"""A DICOM file's bytes as a dataset, within a budget of bytes and reads. Knows no tag but the transfer syntax."""

from __future__ import annotations

import io
import mmap
import warnings
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from pydicom import Dataset, dcmread, uid

from vitmodel.errors import DeflatedDataError, ImageRefusedError
from vitmodel.pixels import decoding
from vitmodel.pixels.verdict import REFUSAL_REASONS

# pydicom warns of every value that breaks the standard's small print; what matters here becomes a remark instead.
warnings.filterwarnings("ignore", module=r"pydicom\.")

MAX_VALUE_BYTES = 1 << 20
"""Bytes; larger values, such as private copies of the raw data, are never read with the header."""
MAX_HEADER_BYTES = 64 << 20
"""Bytes of all values that are read with the header; most files have less than one million."""
READ_COST = 256
"""Bytes of that for each read, so that values without length run out as well."""
DEFLATED, EXPLICIT = uid.DeflatedExplicitVRLittleEndian.encode(), uid.ExplicitVRLittleEndian.encode().ljust(22, b"\0")


def read_dataset(path: Path, pixels: int = 0) -> Dataset:
    """The file's header without its pixels or, of at most `pixels` bytes, its pixels without its header. Raises ImageRefusedError."""
    options: dict[str, Any] = (
        {"specific_tags": ["PixelData"]} if pixels else {"stop_before_pixels": True, "defer_size": MAX_VALUE_BYTES}
    )
    try:
        with path.open("rb", buffering=0) as file:
            start = file.read(132)
            if start[128:] != b"DICM" and start[:2] not in (
                b"\x02\0",
                b"\x08\0",
            ):  # files of old begin with their first group
                raise ImageRefusedError("not_an_image", REFUSAL_REASONS["not_an_image"])
            file.seek(0)
            limited = LimitedFile(file, MAX_HEADER_BYTES + pixels)
            try:
                return dcmread(limited, force=True, **options)
            except DeflatedDataError:
                dataset = dcmread(LimitedFile(inflate(limited), MAX_HEADER_BYTES + pixels), force=True, **options)
                dataset.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
                return dataset
    except ImageRefusedError:
        raise
    except FileNotFoundError:
        raise ImageRefusedError("missing_file", f"{path} does not exist") from None
    except Exception as error:  # what pydicom raises on damaged bytes has no common type
        raise ImageRefusedError("unreadable", f"the file cannot be parsed as DICOM: {error}") from error


class LimitedFile(io.BufferedReader):
    """A file of which only so many bytes can be read, whatever lengths it states: what would be more is refused, not stored.

    Every read also costs `READ_COST` bytes, so that no number of small values keeps a reader busy. To read what is left without
    saying how much is what pydicom does before it inflates the whole of it; that raises DeflatedDataError instead.
    """

    def __init__(self, file: BinaryIO, limit: int) -> None:
        super().__init__(file)  # type: ignore[arg-type] # any file in binary mode will do
        self.remaining = limit

    @property
    def name(self) -> str:
        """None that anybody needs; bytes in memory have none either, and pydicom asks."""
        return ""

    def read(self, size: int | None = -1) -> bytes:
        """The next `size` bytes. Raises ImageRefusedError and DeflatedDataError."""
        if size is None or size < 0:
            raise DeflatedDataError
        data = super().read(min(size, max(self.remaining, 0) + 1))
        self.remaining -= len(data) + READ_COST
        if self.remaining < 0:
            raise ImageRefusedError("too_large", "the file holds larger or more values than any mammogram")
        return data


def inflate(file: LimitedFile) -> BinaryIO:
    """Return the file with the data set inflated from the current position on, and its transfer syntax renamed to match.

    Raises ImageRefusedError if the inflated data set is too large, zlib.error if it is damaged.
    """
    at, limit = file.tell(), MAX_HEADER_BYTES + 2 * decoding.MAX_PIXELS
    file.raw.seek(0, io.SEEK_SET)
    head = file.raw.read(at).replace(DEFLATED, EXPLICIT)
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    body = stream.decompress(file.raw.read(limit), limit)
    if stream.unconsumed_tail:
        raise ImageRefusedError("too_large", "the file inflates to more than any mammogram")
    return io.BytesIO(head + body)


def has_pixel_data_tag(path: Path) -> bool:
    """Whether the Pixel Data tag stands anywhere in a file in which pydicom did not find its value."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"\xe0\x7f\x10\0") >= 0
