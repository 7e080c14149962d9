"""What an image file must offer to the pipeline, whatever its format. Knows no format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from vitmodel.errors import ImageRefusedError
from vitmodel.pixels.verdict import Remark


@dataclass(frozen=True)
class Header:
    """What a file says about its image; '' and None mean that it does not say.

    `laterality` is L or R, `view` one of the manifest's views, `spacing` the (row, column) distance of pixel centres in
    millimetres in the plane of the detector or, where the file corrects for magnification, of the breast.
    """

    rows: int
    columns: int
    bits: int
    photometric: str
    transfer_syntax: str
    voi: str = ""
    patient_id: str = ""
    image_id: str = ""
    laterality: str = ""
    view: str = ""
    machine_id: str = ""
    implant: int | None = None
    age: float | None = None
    spacing: tuple[float, float] | None = None
    remarks: tuple[Remark, ...] = ()


class ImageFile(Protocol):
    """One opened image: a header at once, pixels when asked, at full size or at a power of two below it."""

    @property
    def header(self) -> Header: ...

    @property
    def levels(self) -> int:
        """How many reductions the codec offers for less than the price of a full decode: 0 for most, 5 for JPEG 2000."""

    @property
    def decoder(self) -> str:
        """The name of the decoder that gave the pixels, known after `stored`."""

    def stored(self, level: int = 0) -> np.ndarray:
        """The stored values, H W at rows / 2^level x columns / 2^level (rounded up). Raises ImageRefusedError."""

    def grey(self, stored: np.ndarray) -> np.ndarray:
        """Stored values (H W, any size, may be averages) as float32 in [0, 1], brighter = denser, padding = 0."""


def open_image(path: Path | str, voi: int = 1, for_processing: Literal["refuse", "log"] = "refuse") -> ImageFile:
    """Open a DICOM, PNG, JPEG or TIFF file, told apart by its first bytes and not by its name; the options concern DICOM alone.

    `voi` chooses among several stored VOI LUTs or windows, from 1; `for_processing` what to do with raw detector data.
    Raises ImageRefusedError.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(132)
    except FileNotFoundError:
        raise ImageRefusedError("missing_file", f"{path} does not exist") from None
    except OSError as error:
        raise ImageRefusedError("unreadable", f"{path} cannot be opened: {error.strerror}") from None
    if start[128:] != b"DICM" and start.startswith((b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*")):
        from vitmodel.pixels.raster import RasterFile

        return RasterFile(path)
    from vitmodel.pixels.dicom import DicomFile

    return DicomFile(path, voi, for_processing)
