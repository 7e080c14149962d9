"""Write decoders.json next to this file: small frames in every transfer syntax and the hashes of their decoded pixels.

The hash of a lossless frame is that of the encoded pixels. The hash of a lossy frame is that of the output of a decoder
that the package does not use: DCMTK for JPEG and JPEG-LS (apt install dcmtk), gdcm for JPEG 2000 (its own copy of
OpenJPEG). Run this script by hand; the tests only read the table.
"""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import tempfile
from pathlib import Path

import imagecodecs
import numpy as np
from pydicom import Dataset, FileMetaDataset, dcmread, uid
from pydicom.encaps import get_frame

from vitmodel.pixels.decoding import pydicom_decoder
from vitmodel.pixels.pixel_format import PixelFormat

ROWS, COLUMNS = 23, 30
DCMTK = {
    uid.JPEGExtended12Bit: ["dcmcjpeg", "+ee", "+q", "80"],
    uid.JPEGLossless: ["dcmcjpeg", "+el", "+sv", "4"],
    uid.JPEGLosslessSV1: ["dcmcjpeg", "+e1"],
    uid.JPEGLSLossless: ["dcmcjpls", "+el"],
    uid.JPEGLSNearLossless: ["dcmcjpls", "+en", "+md", "3"],
}
LOSSLESS_KINDS = [(8, 8, False), (16, 12, False), (16, 16, False), (16, 12, True), (16, 16, True)]


def make_pixels(pixel_format: PixelFormat) -> np.ndarray:
    """Return a smooth, slightly rough pattern that uses every bit, computed in integer arithmetic only."""
    row, column = np.mgrid[:ROWS, :COLUMNS]
    smooth = row * row * 3 + column * 7 + row * column // 5
    rough = (row * 31 + column * 17) % 13
    limit = 1 << pixel_format.bits_stored
    pattern = (smooth + rough) * limit // 2600 % limit
    offset = limit // 2 if pixel_format.signed else 0
    return (pattern - offset).astype(pixel_format.dtype)


def write(path: Path, pixel_format: PixelFormat, pixels: np.ndarray) -> Dataset:
    """Write an uncompressed secondary capture and return its data set."""
    dataset = Dataset()
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    dataset.SOPInstanceUID = "1.2.3"
    dataset.Rows = ROWS
    dataset.Columns = COLUMNS
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = pixel_format.photometric
    dataset.BitsAllocated = pixel_format.bits_allocated
    dataset.BitsStored = pixel_format.bits_stored
    dataset.HighBit = pixel_format.bits_stored - 1
    dataset.PixelRepresentation = int(pixel_format.signed)
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OW"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    dataset.save_as(path, enforce_file_format=True)
    return dataset


def encode_with_dcmtk(pixel_format: PixelFormat, pixels: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Return a frame encoded by DCMTK and the pixels to which DCMTK decodes it."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain"
        compressed = Path(folder) / "compressed"
        decompressed = Path(folder) / "decompressed"
        write(plain, pixel_format, pixels)
        program, *options = DCMTK[uid.UID(pixel_format.syntax)]
        subprocess.run([program, *options, plain, compressed], check=True)
        decoder = "dcmdjpls" if program == "dcmcjpls" else "dcmdjpeg"
        subprocess.run([decoder, compressed, decompressed], check=True)
        values = np.frombuffer(dcmread(decompressed).PixelData, pixel_format.dtype)
        frame = get_frame(dcmread(compressed).PixelData, 0, number_of_frames=1)
        return frame, values[: ROWS * COLUMNS].reshape(ROWS, COLUMNS)


def encode(pixel_format: PixelFormat, pixels: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Return the frame and the pixels to which it must decode."""
    match pixel_format.syntax:
        case uid.ImplicitVRLittleEndian | uid.ExplicitVRLittleEndian | uid.DeflatedExplicitVRLittleEndian:
            return pixels.astype(pixel_format.dtype.newbyteorder("<")).tobytes(), pixels
        case uid.ExplicitVRBigEndian:
            return pixels.astype(pixel_format.dtype.newbyteorder(">")).tobytes(), pixels
        case uid.RLELossless:
            with tempfile.NamedTemporaryFile() as file:
                dataset = write(Path(file.name), pixel_format, pixels)
                dataset.compress(uid.RLELossless, encoding_plugin="pydicom")
            return get_frame(dataset.PixelData, 0, number_of_frames=1), pixels
        case uid.JPEGBaseline8Bit:
            frame = bytes(imagecodecs.jpeg8_encode(pixels, level=80))
            return frame, pydicom_decoder("gdcm")(frame, pixel_format, 0)
        case uid.JPEG2000Lossless:
            return bytes(
                imagecodecs.jpeg2k_encode(
                    pixels, codecformat="j2k", bitspersample=pixel_format.bits_stored, resolutions=4
                )
            ), pixels
        case uid.JPEG2000:
            frame = bytes(
                imagecodecs.jpeg2k_encode(
                    pixels, level=95, codecformat="j2k", bitspersample=pixel_format.bits_stored, reversible=False
                )
            )
            return frame, pydicom_decoder("gdcm")(frame, pixel_format, 0)
        case uid.HTJ2KLossless:
            return bytes(imagecodecs.htj2k_encode(pixels, reversible=True, resolutions=4)), pixels
        case uid.HTJ2KLosslessRPCL:
            return bytes(imagecodecs.htj2k_encode(pixels, reversible=True, resolutions=4, tlm=True)), pixels
        case uid.HTJ2K:
            frame = bytes(imagecodecs.htj2k_encode(pixels, level=0.0001, reversible=False))
            return frame, imagecodecs.jpeg2k_decode(frame)
        case _:
            return encode_with_dcmtk(pixel_format, pixels)


def list_formats() -> list[PixelFormat]:
    """Return all kinds of pixels for the lossless syntaxes, and the kinds that occur for the others."""
    native = [
        uid.ImplicitVRLittleEndian,
        uid.ExplicitVRLittleEndian,
        uid.DeflatedExplicitVRLittleEndian,
        uid.ExplicitVRBigEndian,
    ]
    lossless = [uid.RLELossless, uid.JPEGLossless, uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEG2000Lossless]
    high_throughput = [uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL]
    lossy = [uid.JPEGLSNearLossless, uid.JPEG2000, uid.HTJ2K]
    kinds = [(syntax, kind) for syntax in (*native, *lossless, *high_throughput) for kind in LOSSLESS_KINDS]
    kinds += [
        (uid.JPEGBaseline8Bit, (8, 8, False)),
        (uid.JPEGExtended12Bit, (8, 8, False)),
        (uid.JPEGExtended12Bit, (16, 12, False)),
    ]
    kinds += [(syntax, kind) for syntax in lossy for kind in LOSSLESS_KINDS[:3]]
    photometric = {12: "MONOCHROME1"}  # must make no difference
    return [
        PixelFormat(str(syntax), ROWS, COLUMNS, allocated, stored, signed, photometric.get(stored, "MONOCHROME2"))
        for syntax, (allocated, stored, signed) in kinds
    ]


def main() -> None:
    """Write the table."""
    table = []
    for pixel_format in list_formats():
        frame, pixels = encode(pixel_format, make_pixels(pixel_format))
        stored = np.ascontiguousarray(pixels.astype(pixel_format.dtype))
        table.append(
            {
                "syntax": pixel_format.syntax,
                "name": uid.UID(pixel_format.syntax).name,
                "allocated": pixel_format.bits_allocated,
                "stored": pixel_format.bits_stored,
                "signed": pixel_format.signed,
                "photometric": pixel_format.photometric,
                "sha256": hashlib.sha256(stored.tobytes()).hexdigest(),
                "frame": base64.b64encode(frame).decode(),
            }
        )
    lines = ",\n".join(json.dumps(row) for row in table)
    Path(__file__).with_name("decoders.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
