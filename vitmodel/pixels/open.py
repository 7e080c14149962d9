"""Open an image file of any supported format."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from vitmodel.archives import open_source
from vitmodel.config import Preprocessing
from vitmodel.errors import ImageRefusedError
from vitmodel.pixels.dicom import DicomFile
from vitmodel.pixels.header import ImageFile
from vitmodel.pixels.picture_header import picture_format, unsupported_format
from vitmodel.pixels.picture_range import GreyRange
from vitmodel.pixels.raster import RasterFile


def open_image(
    path: Path | str,
    voi: int = 1,
    for_processing: Literal["refuse", "log"] = "refuse",
    picture_range: str = "auto",
) -> ImageFile:
    """Return the opened image file.

    The format is recognised by the first bytes, not by the file name.

    Args:
        path: A DICOM, PNG, JPEG, TIFF, JPEG 2000, BMP or PGM file, in a folder or in an archive.
        voi: Which of several stored VOI LUTs or windows to use, counted from 1. DICOM only.
        for_processing: Whether raw detector data is refused or shown as its inverted logarithm. DICOM only.
        picture_range: Which values are black and white: auto, full, percentile or LOW:HIGH. Pictures only.

    Raises:
        ImageRefusedError: The file is missing, cannot be read, or is not an image of a supported format.
    """
    path = Path(path)
    try:
        with open_source(path) as file:
            start = file.read(132)
    except FileNotFoundError:
        raise ImageRefusedError("missing_file", f"{path} does not exist; correct the path") from None
    except OSError as error:
        raise ImageRefusedError(
            "unreadable", f"{path} cannot be opened ({error.strerror}); check its permissions"
        ) from None
    if start[128:] != b"DICM":
        if picture_format(start):
            return RasterFile(path, picture_range)
        name = unsupported_format(start)
        if name:
            raise ImageRefusedError(
                "not_an_image", f"the file is {name}, a format that is not read; save it as a DICOM, PNG or TIFF image"
            )
    return DicomFile(path, voi, for_processing)


def open_as_cropped(path: Path | str, preprocessing: Preprocessing, voi: str | None) -> ImageFile:
    """Return the opened image file with the grey range that its crop has.

    Args:
        path: File of the image.
        preprocessing: The settings of the crop.
        voi: The range that the manifest's column `voi` records for the crop; empty if it is unknown.

    Raises:
        ImageRefusedError: The image cannot be opened or read.
    """
    recorded = voi if isinstance(voi, str) else ""
    picture_range = recorded if GreyRange.parse(recorded) else preprocessing.picture_range
    file = open_image(path, preprocessing.voi, preprocessing.for_processing, picture_range)
    if recorded.startswith("range "):  # the name that `use_own_range` records
        file.use_own_range()
    return file
