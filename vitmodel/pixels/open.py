"""Open an image file of any supported format."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from vitmodel.errors import ImageRefusedError
from vitmodel.pixels.dicom import DicomFile
from vitmodel.pixels.header import ImageFile
from vitmodel.pixels.raster import PICTURE_STARTS, RasterFile


def open_image(path: Path | str, voi: int = 1, for_processing: Literal["refuse", "log"] = "refuse") -> ImageFile:
    """Return the opened image file.

    The format is recognised by the first bytes, not by the file name.

    Args:
        path: A DICOM, PNG, JPEG, TIFF, JPEG 2000, BMP or PGM file.
        voi: Which of several stored VOI LUTs or windows to use, counted from 1. DICOM only.
        for_processing: Whether raw detector data is refused or shown as its inverted logarithm. DICOM only.

    Raises:
        ImageRefusedError: The file is missing, cannot be read, or is not an image of a supported format.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(132)
    except FileNotFoundError:
        raise ImageRefusedError("missing_file", f"{path} does not exist; correct the path") from None
    except OSError as error:
        raise ImageRefusedError(
            "unreadable", f"{path} cannot be opened ({error.strerror}); check its permissions"
        ) from None
    if start[128:] != b"DICM" and start.startswith(PICTURE_STARTS):
        return RasterFile(path)
    return DicomFile(path, voi, for_processing)
