"""A DICOM mammogram as a lossless HTJ2K copy, which is decoded many times faster than JPEG 2000. Knows no release and writes no file."""

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
    """The DICOM file at `path` with its pixels as HTJ2K Lossless (transfer syntax .201, ITU-T T.814); same values, same UIDs.

    None where a copy gains nothing (HTJ2K already) or could lose something (big endian, whose binary tables nobody can swap for sure).
    The copy is decoded again before it is returned. It leaves out what is never read: values of a megabyte and more, such as private
    copies of the raw data. Raises ImageRefusedError.
    """
    original = DicomFile(path, for_processing="log")
    pixel_format = original.pixel_format
    if pixel_format.syntax in (*decoding.HTJ2K, uid.ExplicitVRBigEndian):
        return None
    values = decoding.decode(original.frame, pixel_format)[0]
    if pixel_format.signed:  # the codestream must say so too, or no level of it could be averaged
        values = decoding.to_stored_values(values, pixel_format)[0]
    frame = bytes(imagecodecs.htj2k_encode(np.ascontiguousarray(values), reversible=True))
    if not np.array_equal(openjpeg.decode(frame), values):
        raise ImageRefusedError("undecodable", "an HTJ2K copy would have other pixels")
    return replace_frame(read_dataset(Path(path)), frame)


def replace_frame(dataset: Dataset, frame: bytes) -> bytes:
    """The DICOM file of `dataset` with `frame` as its pixels."""
    for tag in [tag for tag in dataset.keys() if is_deferred(dataset, tag)]:  # noqa: SIM118 (iterating over it would read the values)
        del dataset[tag]
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = uid.HTJ2KLossless
    copy = io.BytesIO()
    dcmwrite(copy, dataset, implicit_vr=False, little_endian=True, enforce_file_format=True)
    return copy.getvalue()


def is_deferred(dataset: Dataset, tag: int) -> bool:
    """Whether the element's value was too large to be read with the header."""
    element = dataset.get_item(tag, keep_deferred=True)
    return isinstance(element, RawDataElement) and element.value is None and element.length > 0
