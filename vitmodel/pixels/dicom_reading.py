"""Read a DICOM file into a pydicom data set with a limit on the bytes and the number of reads."""

from __future__ import annotations

import io
import logging
import warnings
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast

from pydicom import Dataset, dcmread, uid

from vitmodel.archives import open_source
from vitmodel.errors import DeflatedDataError, ImageRefusedError
from vitmodel.pixels.pixel_format import MAX_PIXELS
from vitmodel.pixels.verdict import REFUSAL_REASONS
from vitmodel.utils import describe_failure

# pydicom warns about every value that violates the standard; what matters here becomes an ImageWarning instead. Its
# warnings and log messages quote the values, and a damaged header may have a patient's name anywhere.
warnings.filterwarnings("ignore", module=r"pydicom\.")
logging.getLogger("pydicom").setLevel(logging.CRITICAL)

MAX_VALUE_BYTES = 1 << 20
"""Size in bytes above which a value, such as a private copy of the raw data, is not read with the header."""
MAX_HEADER_BYTES = 64 << 20
"""Most bytes of all values read with the header; most files have less than one million."""
READ_COST = 256
"""Bytes by which each read reduces the limit, so that any number of empty values exhausts it as well."""
MAX_FIRST_LENGTH = 256
"""Greatest length in bytes of the first element of a DICOM file without a preamble."""
DEFLATED = uid.DeflatedExplicitVRLittleEndian.encode()
EXPLICIT = uid.ExplicitVRLittleEndian.encode().ljust(22, b"\0")


def read_dataset(path: Path, pixels: int = 0) -> Dataset:
    """Return the header of the file without its pixels, or its pixels without the header.

    Args:
        path: The file.
        pixels: Greatest size of the pixel data in bytes; 0 reads the header instead.

    Raises:
        ImageRefusedError: The file is missing, damaged, too large or not DICOM.
    """
    options: dict[str, Any] = {"stop_before_pixels": True, "defer_size": MAX_VALUE_BYTES}
    if pixels:
        options = {"specific_tags": ["PixelData"]}
    try:
        with open_source(path) as buffered:
            file = cast(io.RawIOBase, buffered.raw)
            start = file.read(132)
            if not starts_like_dicom(start):
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
        raise ImageRefusedError("missing_file", f"{path} does not exist; correct the path") from None
    except Exception as error:  # pydicom's exceptions for damaged bytes have no common type
        raise ImageRefusedError(
            "unreadable", f"the file cannot be parsed as DICOM ({describe_failure(error)}); copy or export it again"
        ) from error


def starts_like_dicom(start: bytes) -> bool:
    """Return whether the first 132 bytes are those of a DICOM file, with its preamble (PS3.10 section 7.1) or without.

    A file without the preamble starts with an element of group 2 or 8: its tag, and then its VR, or its length if the
    VRs are implicit.
    """
    if start[128:] == b"DICM":
        return True
    if len(start) < 132 or start[:2] not in (b"\x02\0", b"\x08\0") or start[3]:
        return False
    has_vr = start[4:6].isalpha() and start[4:6].isupper()
    return has_vr or int.from_bytes(start[4:8], "little") <= MAX_FIRST_LENGTH


class LimitedFile(io.BufferedReader):
    """A file of which only a limited number of bytes can be read, regardless of the lengths that its values declare.

    Every read also costs `READ_COST` bytes, so that no number of small values keeps a reader busy. pydicom reads the
    rest of the file without a size only before it inflates all of it; such a read raises DeflatedDataError instead.

    Args:
        file: A file opened in binary mode.
        limit: Number of bytes that may be read.
    """

    def __init__(self, file: BinaryIO | io.RawIOBase, limit: int) -> None:
        super().__init__(file)  # type: ignore[arg-type] # any file in binary mode works
        self.remaining = limit

    @property
    def name(self) -> str:
        """An empty name: pydicom asks for it, and bytes in memory have none."""
        return ""

    def read(self, size: int | None = -1) -> bytes:
        """Return the next `size` bytes.

        Raises:
            ImageRefusedError: The limit is exceeded.
            DeflatedDataError: `size` is not given.
        """
        if size is None or size < 0:
            raise DeflatedDataError
        data = super().read(min(size, max(self.remaining, 0) + 1))
        self.remaining -= len(data) + READ_COST
        if self.remaining < 0:
            raise ImageRefusedError(
                "too_large", "the file has larger or more values than any mammogram; remove its private or bulk data"
            )
        return data


def inflate(file: LimitedFile) -> BinaryIO:
    """Return the file with the data set inflated from the current position on and its transfer syntax changed.

    Raises:
        ImageRefusedError: The inflated data set is too large.
        zlib.error: The deflated data is damaged.
    """
    start = file.tell()
    limit = MAX_HEADER_BYTES + 2 * MAX_PIXELS
    file.raw.seek(0, io.SEEK_SET)
    head = file.raw.read(start).replace(DEFLATED, EXPLICIT)
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    body = stream.decompress(file.raw.read(limit), limit)
    if stream.unconsumed_tail:
        raise ImageRefusedError(
            "too_large", "the deflated file inflates to more than any mammogram; export it in another syntax"
        )
    return io.BytesIO(head + body)


def has_pixel_data_tag(path: Path) -> bool:
    """Return whether the Pixel Data tag occurs anywhere in a file in which pydicom did not find its value."""
    tag = b"\xe0\x7f\x10\0"
    end = b""
    with open_source(path) as file:
        while block := file.read(1 << 20):
            if tag in end + block:
                return True
            end = block[-len(tag) + 1 :]
    return False
