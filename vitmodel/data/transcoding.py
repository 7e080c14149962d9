"""Lossless High-Throughput JPEG 2000 copies of DICOM mammograms, which decode many times faster at any size. Knows no crop and no table."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import imagecodecs
import numpy as np
from pydicom import Dataset, uid
from pydicom.encaps import encapsulate

from vitmodel.pixels import decoding
from vitmodel.pixels.dicom import DicomFile, read_dataset
from vitmodel.pixels.image import open_image
from vitmodel.pixels.verdict import ImageRefused
from vitmodel.utils import VitmodelError, atomic_path

SIZ_DEPTH = 42
"""Where a codestream's first component states its bits and sign: Ssiz (ITU-T T.800 A.5.1), the SIZ segment being the first."""


def transcode(source: Path, target: Path) -> bool:
    """Write a copy of the DICOM file `source` to `target` as HTJ2K lossless; whether there is one now.

    There is none of a picture (PNG, ...), and none of a file that would not show the very same: whose pixels or tags break what its
    header says of them. The copy is read back and compared before it counts. It keeps all tags but values of more than 1 MiB, such as private
    copies of the raw data. Raises VitmodelError on a full disk.
    """
    try:
        file = open_image(source)
        if not isinstance(file, DicomFile):
            return False
        values, assumed = decoding.interpret(decoding.decode(file.frame, file.layout)[0], file.layout)
        if assumed or file.layout.overlay_bits:
            return False
        dataset = tags_to_keep(read_dataset(source, pixels=False))
        dataset.PixelData = encapsulate([encode(values, file.layout.stored, file.layout.signed)])
        dataset["PixelData"].VR = "OB"
        dataset.ensure_file_meta()
        dataset.file_meta.TransferSyntaxUID = uid.HTJ2KLossless
        with atomic_path(target) as temporary:
            dataset.save_as(temporary, enforce_file_format=True)
            check(DicomFile(temporary), file, values)
    except VitmodelError:
        raise
    except Exception:  # noqa: BLE001 - pydicom writes damaged tags or raises anything; the source itself then stays the image's file
        return False
    return True


def encode(values: np.ndarray, bits: int, signed: bool) -> bytes:
    """H W stored values of `bits` bits as an HTJ2K codestream of that very depth.

    The encoder knows 8 and 16 bits alone. What the standard does to unsigned samples, subtracting half their range (ITU-T T.800 G.1),
    is therefore done here, and the depth is written into the header afterwards.
    """
    half = 0 if signed else 1 << (bits - 1)
    centred = (values.astype(np.uint16) - np.uint16(half)).view(np.int16)
    stream = bytearray(imagecodecs.htj2k_encode(centred, reversible=True))
    stream[SIZ_DEPTH] = (bits - 1) | (signed << 7)
    return bytes(stream)


def tags_to_keep(dataset: Dataset) -> Dataset:
    """`dataset` without the values that were left in the file, and with all others decoded if they must be encoded anew."""
    for tag in list(dataset.keys()):
        element = dataset.get_item(tag, keep_deferred=True)
        if element is not None and element.is_raw and element.value is None and element.length:
            del dataset[tag]
    if dataset.original_encoding != (False, True):
        for _ in dataset.iterall():  # explicit little endian is what HTJ2K files are written in (PS3.5 A.4)
            pass
    return dataset


def check(copy: DicomFile, source: DicomFile, values: np.ndarray) -> None:
    """Compare a copy with its source: stored values, header, and the grey that is shown. Raises ImageRefused."""
    stored, _ = decoding.interpret(decoding.decode(copy.frame, copy.layout)[0], copy.layout)
    same_header = dataclasses.replace(copy.header, transfer_syntax=source.header.transfer_syntax) == source.header
    if not (same_header and np.array_equal(stored, values) and np.array_equal(copy.grey(stored[::8, ::8]), source.grey(stored[::8, ::8]))):
        raise ImageRefused("failed", "the HTJ2K copy differs from its source")
