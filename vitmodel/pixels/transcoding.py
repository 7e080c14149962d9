"""Transcode a DICOM mammogram to lossless HTJ2K, which decodes many times faster than JPEG 2000."""

from __future__ import annotations

import io
from pathlib import Path

import imagecodecs
import numpy as np
from pydicom import Dataset, dcmwrite, uid
from pydicom.dataelem import RawDataElement
from pydicom.encaps import encapsulate

from vitmodel.errors import ImageRefusedError
from vitmodel.pixels import decoding, openjpeg
from vitmodel.pixels.dicom import DicomFile
from vitmodel.pixels.dicom_reading import read_dataset


def transcode(path: Path | str) -> bytes | None:
    """Return a copy of a DICOM file with its pixels as HTJ2K Lossless (transfer syntax .201, ITU-T T.814).

    Pixel values and UIDs are the same. The copy is decoded and compared before it is returned. It lacks values larger
    than 1 MiB, such as private copies of the raw data, which are never read.

    Args:
        path: A DICOM mammogram.

    Returns:
        The bytes of the copy. None if the file is HTJ2K already, if it stores grey as colour, or if it is big endian,
        whose binary tables cannot be byte-swapped reliably.

    Raises:
        ImageRefusedError: The file cannot be read, or the copy would have other pixels.
    """
    original = DicomFile(path, for_processing="log")
    pixel_format = original.pixel_format
    if pixel_format.samples > 1 or pixel_format.syntax in (*decoding.HTJ2K, uid.ExplicitVRBigEndian):
        return None
    values = decoding.decode(original.frame, pixel_format)[0]
    if pixel_format.signed:  # without the sign in the codestream, reduced levels could not be averaged
        values = decoding.to_stored_values(values, pixel_format)[0]
    frame = bytes(imagecodecs.htj2k_encode(np.ascontiguousarray(values), reversible=True))
    if not np.array_equal(openjpeg.decode(frame), values):
        raise ImageRefusedError(
            "undecodable", "the HTJ2K copy would have other pixels than its original; run etl without --transcode"
        )
    return replace_frame(read_dataset(Path(path)), frame)


def replace_frame(dataset: Dataset, frame: bytes) -> bytes:
    """Return a DICOM file with the header of `dataset` and the HTJ2K `frame` as its pixels."""
    for tag in list(dataset.keys()):  # iterating over the data set itself would read the values
        if is_deferred(dataset, tag):
            del dataset[tag]
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = uid.HTJ2KLossless
    copy = io.BytesIO()
    dcmwrite(copy, dataset, implicit_vr=False, little_endian=True, enforce_file_format=True)
    return copy.getvalue()


def is_deferred(dataset: Dataset, tag: int) -> bool:
    """Return whether the value of the element was too large to be read with the header."""
    element = dataset.get_item(tag, keep_deferred=True)
    return isinstance(element, RawDataElement) and element.value is None and element.length > 0
