"""Try hostile files in the ETL: handmade decompression bombs, and mutants of good files. Prints their outcomes.

python benchmarks/fuzz.py [--mutants 5000] [--jobs 2] [--json FILE] [--again NAME NUMBER FILE]

Every file is tried in a process that may die (`vitmodel.jobs.workers`), with limits on time and address space. Its
outcome is a crop, a refusal with its reason, or `died` or `hung`. The benchmark exists to find the last two and then
exits with status 1. A mutant is determined by the name of its seed file and its number, so that `--again` can recreate
it.
"""

from __future__ import annotations

import argparse
import base64
import functools
import io
import json
import random
import resource
import struct
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import imagecodecs
import numpy as np
from PIL import Image
from pydicom import Dataset, FileMetaDataset, uid
from pydicom.encaps import encapsulate

from vitmodel.config import Preprocessing, Size
from vitmodel.data.cropping import SourceImage, crop_image
from vitmodel.errors import VitmodelError
from vitmodel.jobs.workers import process_per_thread
from vitmodel.phantoms.anatomy import BreastPhantom, render
from vitmodel.pixels.identity import read_identity
from vitmodel.releases.inputs import read_inputs
from vitmodel.utils import progress, to_json, write_atomic

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
GOLDEN = ROOT / "tests" / "golden" / "decoders.json"
TIME_LIMIT = 120.0
ADDRESS_SPACE = 4 << 30
"""Bytes that a process may map in addition to those mapped at its start."""
GIGA = 2_000_000_000
REAL = 0.15
"""Fraction of the mutants that are made of real files, which are a hundred times larger."""


class Outcome(NamedTuple):
    """Outcome of one file."""

    name: str
    verdict: str
    """ok, warned, a code of `verdict.REFUSAL_REASONS`, died or hung."""
    remark: str
    seconds: float
    """CPU time, which does not depend on other work of the machine."""
    megabytes: float
    """Increase of the peak resident memory of the process over its memory before the file."""


def dicom(
    pixels: bytes | None = None,
    rows: int = 128,
    columns: int = 104,
    syntax: str = uid.ExplicitVRLittleEndian,
    **tags: Any,
) -> bytes:
    """Return a mammogram with 12 of 16 bits, a window, a VOI LUT and padding.

    Args:
        pixels: Pixel data; None = those of a phantom.
        rows: Number of rows in the header.
        columns: Number of columns in the header.
        syntax: Transfer syntax UID.
        **tags: Further attributes by keyword.
    """
    ds = Dataset()
    ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.2"
    ds.SOPInstanceUID = "1.2.3"
    ds.PatientID = "1"
    ds.Modality = "MG"
    ds.ImageLaterality = "L"
    ds.ViewPosition = "CC"
    ds.PresentationIntentType = "FOR PRESENTATION"
    ds.Rows = rows
    ds.Columns = columns
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.BitsAllocated = 16
    ds.BitsStored = 12
    ds.PixelRepresentation = 0
    ds.PixelPaddingValue = 0
    ds.WindowCenter = [2048, 1000]
    ds.WindowWidth = [4096, 500]
    ds.ImagerPixelSpacing = [0.1, 0.1]
    item = Dataset()
    item.LUTDescriptor = [4096, 0, 12]
    item.add_new("LUTData", "OW", np.arange(4096, dtype="<u2").tobytes())
    ds.VOILUTSequence = [item]
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    ds.HighBit = ds.BitsStored - 1
    ds.PixelData = (phantom() >> 4).tobytes() if pixels is None else pixels
    ds["PixelData"].VR = "OW"
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = uid.UID(syntax)
    file = io.BytesIO()
    ds.save_as(file, enforce_file_format=True)
    return file.getvalue()


@functools.cache
def phantom() -> np.ndarray:
    """Return a phantom of 128 x 104 pixels with 16 bits."""
    return np.rint(render(BreastPhantom(seed=1), "CC", Size(128, 104)).image * 65535).astype(np.uint16)


@functools.cache
def small_seeds() -> dict[str, bytes]:
    """Return good files of a few kilobytes by name, in every transfer syntax of the golden table and picture format."""
    seeds = {
        "native": dicom(),
        "deflated": dicom(syntax=uid.DeflatedExplicitVRLittleEndian),
        "implicit": dicom(syntax=uid.ImplicitVRLittleEndian),
    }
    options = {"codecformat": "j2k", "bitspersample": 12, "reversible": True}
    coders: dict[str, tuple[str, Callable[[np.ndarray], bytes]]] = {
        "jpeg 2000": (uid.JPEG2000Lossless, lambda image: imagecodecs.jpeg2k_encode(image, **options)),
        "htj2k": (uid.HTJ2KLossless, lambda image: imagecodecs.htj2k_encode(image, reversible=True)),
        "jpeg-ls": (uid.JPEGLSLossless, imagecodecs.jpegls_encode),
        "jpeg lossless": (uid.JPEGLosslessSV1, lambda image: imagecodecs.ljpeg_encode(image, bitspersample=16)),
    }  # fmt: skip
    for name, (syntax, encode) in coders.items():
        tags = {"BitsStored": 16} if name == "jpeg lossless" else {}
        seeds[name] = dicom(encapsulate([bytes(encode(phantom() >> (0 if tags else 4)))]), syntax=syntax, **tags)
    for row in json.loads(GOLDEN.read_text()):
        frame = base64.b64decode(row["frame"])
        tags = {
            "BitsAllocated": row["allocated"],
            "BitsStored": row["stored"],
            "PixelRepresentation": int(row["signed"]),
        }
        data = encapsulate([frame]) if uid.UID(row["syntax"]).is_encapsulated else frame
        if row["syntax"] != uid.ExplicitVRBigEndian:
            seeds[f"golden {row['name']} {row['stored']}"] = dicom(data, 23, 30, row["syntax"], **tags)
    grey = (phantom() >> 8).astype(np.uint8)
    grey_as_rgb = np.repeat(grey[..., None], 3, axis=2)
    colours = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "BitsAllocated": 8, "BitsStored": 8}
    seeds["rgb"] = dicom(grey_as_rgb.tobytes(), PhotometricInterpretation="RGB", **colours)
    table = np.arange(256, dtype="u1").tobytes()
    palette = {f"{name}PaletteColorLookupTableData": table for name in ("Red", "Green", "Blue")}
    palette |= {f"{name}PaletteColorLookupTableDescriptor": [256, 0, 8] for name in ("Red", "Green", "Blue")}
    bits = {"BitsAllocated": 8, "BitsStored": 8}
    seeds["palette"] = dicom(grey.tobytes(), PhotometricInterpretation="PALETTE COLOR", **bits, **palette)
    seeds |= {
        "jp2": bytes(imagecodecs.jpeg2k_encode(phantom(), codecformat="jp2", reversible=True)),
        "jpg 12 bits": bytes(imagecodecs.jpeg8_encode(phantom() >> 4, bitspersample=12)),
        "pgm text": b"P2 104 128 255\n" + b" ".join(b"%d" % value for value in grey.flat),
        "tif of floats": save_tiff(Image.fromarray(phantom() / np.float32(65535))),
        "tif big": save_tiff(Image.fromarray(phantom()), big_tiff=True),
        "tif packed bits": save_tiff(Image.fromarray(grey), compression="packbits"),
        "tif of jpeg": save_tiff(Image.fromarray(grey), compression="jpeg"),
        "tif with a preview": save_tiff(
            Image.fromarray(grey[::4, ::4]), save_all=True, append_images=[Image.fromarray(grey)]
        ),
        "tif palette": save_tiff(Image.fromarray(grey).convert("P")),
    }
    pictures = {
        "bmp": (grey, []),
        "pgm": (phantom(), []),
        "png rgba": (np.dstack([grey_as_rgb, np.full_like(grey, 255)]), []),
        "png": (phantom(), []),
        "png 8 bits": ((phantom() >> 8).astype(np.uint8), []),
        "jpg": ((phantom() >> 8).astype(np.uint8), []),
        "jpg progressive": ((phantom() >> 8).astype(np.uint8), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]),
        "tif": (phantom(), [cv2.IMWRITE_TIFF_COMPRESSION, 1]),
        "tif lzw": (phantom(), [cv2.IMWRITE_TIFF_COMPRESSION, 5]),
        "tif deflate": (phantom(), [cv2.IMWRITE_TIFF_COMPRESSION, 8]),
    }
    return seeds | {name: cv2.imencode(f".{name[:3]}", *arguments)[1].tobytes() for name, arguments in pictures.items()}


def save_tiff(image: Image.Image, **options: Any) -> bytes:
    """Return an image as a TIFF file."""
    file = io.BytesIO()
    image.save(file, "TIFF", **options)
    return file.getvalue()


@functools.cache
def source_seeds() -> dict[str, bytes]:
    """Return good archives, tables and foreign formats by name; a name starts with the suffix of its files."""
    members = {"p1/a.dcm": dicom(), "p1/b.png": small_seeds()["png"], "notes.txt": b"text"}
    archives = {}
    for name, method in (("zip", zipfile.ZIP_STORED), ("zip deflated", zipfile.ZIP_DEFLATED)):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as packed:
            for member, content in members.items():
                packed.writestr(member, content)
        archives[name] = file.getvalue()
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for member, content in members.items():
            information = tarfile.TarInfo(member)
            information.size = len(content)
            tar.addfile(information, io.BytesIO(content))
    rows = [["patient_id", "path", "laterality", "cancer"], *([str(n), f"{n}.png", "L", str(n % 2)] for n in range(20))]
    text = "\n".join(map(";".join, rows))
    volume = phantom()[..., None]
    array = io.BytesIO()
    np.save(array, volume)
    head = struct.pack("<i36x8h", 348, 3, *volume.shape, 1, 1, 1, 1).ljust(344, b"\0") + b"n+1\0" + bytes(4)
    meta = b"ObjectType = Image\nNDims = 3\nDimSize = 104 128 1\nElementType = MET_USHORT\nElementDataFile = LOCAL\n"
    return archives | {
        "tar": file.getvalue(),
        "csv": text.encode(),
        "csv utf-16": text.replace(";", ",").encode("utf-16"),
        "xlsx": spreadsheet(rows),
        "npy": array.getvalue(),
        "nii": head + volume.tobytes(),
        "mha": meta + volume.tobytes(),
    }


def spreadsheet(rows: list[list[str]]) -> bytes:
    """Return the rows as an xlsx file of inline text."""
    cells = "".join(
        "<row>" + "".join(f'<c t="inlineStr"><is><t>{cell}</t></is></c>' for cell in row) + "</row>" for row in rows
    )
    office = "http://schemas.openxmlformats.org"
    main = f"{office}/spreadsheetml/2006/main"
    kind = "application/vnd.openxmlformats-officedocument.spreadsheetml"
    relations = f'<Relationships xmlns="{office}/package/2006/relationships"><Relationship Id="r1" Type="'
    relation = f"{relations}{office}/officeDocument/2006/relationships/"
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{office}/package/2006/content-types">'
        f'<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/xl/workbook.xml" ContentType="{kind}.sheet.main+xml"/>'
        f'<Override PartName="/xl/sheet.xml" ContentType="{kind}.worksheet+xml"/></Types>',
        "_rels/.rels": f'{relation}officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{office}/officeDocument/2006/relationships"><sheets>'
        '<sheet name="a" sheetId="1" r:id="r1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'{relation}worksheet" Target="sheet.xml"/></Relationships>',
        "xl/sheet.xml": f'<worksheet xmlns="{main}"><sheetData>{cells}</sheetData></worksheet>',
    }
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, text in parts.items():
            packed.writestr(name, text)
    return file.getvalue()


def real_seeds() -> dict[str, Path]:
    """Return the available real files by name."""
    files = [
        *DATA.glob("rsna_dicom/**/*.dcm"),
        *DATA.glob("dicom_edge/**/*.dcm"),
        *sorted(DATA.glob("mias_512/images/*.png"))[:5],
    ]
    return {path.name: path for path in files}


def mutant(name: str, number: int) -> bytes:
    """Return the seed file `name` with random damage to bytes, numbers and spans, mostly in the headers."""
    seeds = small_seeds() | source_seeds()
    data = bytearray(seeds[name] if name in seeds else real_seeds()[name].read_bytes())
    rng = random.Random(f"{name} {number}")
    pixels = max(data.find(b"\xe0\x7f\x10\0"), 0)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        begin, end = rng.choice(((0, len(data)), (0, 2000), (pixels, pixels + 300)))
        at = min(rng.randrange(begin, max(end, begin + 1)), len(data) - 1)
        size = rng.choice((1, 2, 4, 16, 100, 2000))
        match rng.randrange(8):
            case 0 | 1 | 2:
                data[at] = rng.randrange(256)
            case 3:
                data[at] ^= 1 << rng.randrange(8)
            case 4:
                data[at : at + size] = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * min(size, 4)
            case 5:
                del data[at : at + size]
            case 6:
                data[at:at] = data[rng.randrange(len(data)) :][:size]
            case 7:
                data[at:at] = rng.randbytes(size)
        if len(data) < 8:
            break
    return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 else data)


def try_file(name: str, path: Path) -> Outcome:
    """Crop one file and return its outcome with time and memory."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = peak()
    start = time.process_time()
    is_source = name.partition(" #")[0] in source_seeds()
    try:
        record = try_source(path) if is_source else crop(path)
    except Exception as error:  # noqa: BLE001 (any but a refusal is what the benchmark looks for)
        record = {"status": "refused", "reason": "failed", "remark": f"{type(error).__name__}: {error}"}
    verdict = record["reason"] if record["status"] == "refused" else record["status"]
    return Outcome(name, str(verdict), str(record["remark"] or ""), time.process_time() - start, peak() - before)


def crop(path: Path) -> Mapping[str, Any]:
    """Read the identity of an image and crop it; return the columns of its row."""
    read_identity(path)
    return crop_image(SourceImage(path, "L"), Preprocessing(size=Size(64, 32))).record


def try_source(path: Path) -> Mapping[str, Any]:
    """Read a table, an archive or a foreign file as `predict` does, and crop its images; return the worst verdict."""
    try:
        table = read_inputs([str(path)], "auto")
    except VitmodelError as error:
        return {"status": "refused", "reason": "refused as a whole", "remark": str(error)}
    records = [row for row in table.to_dict("records") if row["status"] == "refused"]
    records += [dict(crop(Path(row["path"]))) for row in table.to_dict("records") if row["status"] != "refused"]
    return max(records, key=lambda record: (record["reason"] == "failed", record["status"] == "refused"))


def peak() -> float:
    """Return the peak resident memory of this process in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def try_mutant(case: tuple[str, int]) -> Outcome:
    """Make a mutant and try it within the memory limit of a worker."""
    limit_memory()
    with tempfile.NamedTemporaryFile(suffix=f".{case[0].split()[0]}" if case[0] in source_seeds() else "") as file:
        file.write(mutant(*case))
        file.flush()
        return try_file(f"{case[0]} #{case[1]}", Path(file.name))


def try_bomb(case: tuple[str, Path]) -> Outcome:
    """Try the file of a bomb within the memory limit of a worker."""
    limit_memory()
    return try_file(*case)


def write_bombs(folder: Path, leave_out: Collection[str] = ()) -> Iterator[tuple[str, Path]]:
    """Write the bombs to `folder`; yield the name and file of each.

    Formats in `leave_out` (the part of the name before a colon) are skipped.
    """
    for number, make in enumerate(BOMBS):
        name = (make.__doc__ or "").strip().rstrip(".")
        path = folder / str(number)
        if name.partition(":")[0] in leave_out:
            continue
        with path.open("wb") as file:
            for part in make():  # a number stands for that many zeros, written as a hole that needs no disk space
                file.seek(part, io.SEEK_CUR) if isinstance(part, int) else file.write(part)
            file.truncate()
        yield name, path


@functools.cache
def limit_memory() -> None:
    """Limit the address space of this process to `ADDRESS_SPACE` more bytes; further calls do nothing."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESS_SPACE, mapped + ADDRESS_SPACE))


# Bombs: each function yields the parts of a file. Its docstring is the name of the bomb in the table.
Parts = Iterator[bytes | int]


def split(before: bytes = b"\x28\0\x02\0US") -> tuple[bytes, bytes]:
    """Return a good file split before the first occurrence of `before`, by default where a private tag fits."""
    data = dicom()
    at = data.index(before)
    return data[:at], data[at:]


def private(length: int, kind: bytes = b"OB") -> bytes:
    """Return the header of a private element."""
    return b"\x09\0\x10\x10" + kind + b"\0\0" + struct.pack("<I", length)


END_OF_SEQUENCE = b"\xfe\xff\xdd\xe0\0\0\0\0"
ENDLESS = 0xFFFFFFFF


def private_tag() -> Parts:
    """a private tag of 2 GB."""
    head, tail = split()
    yield from (head, private(GIGA), GIGA, tail)


def endless_private_tag() -> Parts:
    """a private tag of 2 GB without a stated length."""
    head, tail = split()
    yield from (head, private(ENDLESS), GIGA, END_OF_SEQUENCE, tail)


def endless_unknown_tag() -> Parts:
    """2 GB of zeros where a sequence of items is expected."""
    head, tail = split()
    yield from (head, private(ENDLESS, b"UN"), GIGA, END_OF_SEQUENCE, tail)


def character_set() -> Parts:
    """a character set of 2 GB."""
    head, tail = split(b"\x08\0\x16\0UI")
    yield from (head, b"\x08\0\x05\0UN\0\0" + struct.pack("<I", GIGA), GIGA, tail)


def many_values() -> Parts:
    """2,000 private tags of 1 MB."""
    head, tail = split()
    yield head
    for _ in range(2000):
        yield from (private(1_000_000), 1_000_000)
    yield tail


def deep_sequences() -> Parts:
    """sequences 200,000 deep."""
    head, tail = split()
    yield from (head, (b"\x09\0\x10\x10SQ\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff") * 200_000, tail)


def many_items() -> Parts:
    """a sequence of 3,000,000 items."""
    head, tail = split()
    yield from (head, private(ENDLESS, b"SQ"), b"\xfe\xff\0\xe0\0\0\0\0" * 3_000_000, END_OF_SEQUENCE, tail)


def too_many_pixels() -> Parts:
    """65,535 x 65,535 pixels, the most that DICOM can say."""
    yield dicom(bytes(100), 65535, 65535)


def long_pixel_data() -> Parts:
    """4 GB of pixels where 27 kB are stated."""
    yield from (
        dicom().partition(b"\xe0\x7f\x10\0OW")[0],
        b"\xe0\x7f\x10\0OW\0\0",
        struct.pack("<I", 2 * GIGA),
        2 * GIGA,
    )


def long_fragment() -> Parts:
    """a compressed fragment of 2 GB."""
    head = dicom(encapsulate([b"\xff\xd8\xff\xd9"]), syntax=uid.JPEGLosslessSV1).partition(b"\xe0\x7f\x10\0")[0]
    yield from (
        head,
        b"\xe0\x7f\x10\0OB\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\0\0\0\0\xfe\xff\0\xe0",
        struct.pack("<I", GIGA),
        GIGA,
        END_OF_SEQUENCE,
    )


def many_fragments() -> Parts:
    """2,000,000 empty fragments."""
    head = dicom(encapsulate([b"\xff\xd8\xff\xd9"]), syntax=uid.JPEGLosslessSV1).partition(b"\xe0\x7f\x10\0")[0]
    yield from (head, b"\xe0\x7f\x10\0OB\0\0\xff\xff\xff\xff", b"\xfe\xff\0\xe0\0\0\0\0" * 2_000_000, END_OF_SEQUENCE)


def deflated_private_tag() -> Parts:
    """3 MB that inflate to 3 GB."""
    head, tail = split()
    start = head.index(b"\x08\0\x16\0UI")
    good = dicom(syntax=uid.DeflatedExplicitVRLittleEndian)
    coder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    yield good[: 144 + struct.unpack_from("<I", good, 140)[0]]
    yield coder.compress(head[start:] + private(3 << 30)) + coder.flush(zlib.Z_FULL_FLUSH) + deflated_zeros(3 << 30)
    yield coder.compress(tail) + coder.flush()


def deflated_zeros(count: int) -> bytes:
    """Return deflated zeros, a whole number of MiB; the block is repeated, which is valid after a full flush."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return (coder.compress(bytes(1 << 20)) + coder.flush(zlib.Z_FULL_FLUSH)) * (count >> 20)


def zlib_zeros(count: int) -> bytes:
    """Return at least `count` zeros as a zlib stream."""
    count = -(-count >> 20) << 20
    return b"\x78\xda" + deflated_zeros(count) + b"\x03\0" + struct.pack(">I", count % 65521 << 16 | 1)


BLANK = 10_000
"""Rows and columns of the largest image that is not refused for its size alone."""


def compressed(syntax: str, encode: Callable[[np.ndarray], Any], dtype: str = "u2") -> bytes:
    """Return an empty image of the largest size in a compressed transfer syntax."""
    frame = bytes(encode(np.zeros((BLANK, BLANK), dtype)))
    bits = 8 * np.dtype(dtype).itemsize
    return dicom(encapsulate([frame]), BLANK, BLANK, syntax, BitsAllocated=bits, BitsStored=bits)


def blank_jpeg_2000() -> Parts:
    """JPEG 2000: 100,000,000 pixels in a few kB."""
    yield compressed(
        uid.JPEG2000Lossless, lambda image: imagecodecs.jpeg2k_encode(image, codecformat="j2k", reversible=True)
    )


def blank_jpeg_2000_without_levels() -> Parts:
    """JPEG 2000: the same in one resolution level."""
    yield compressed(
        uid.JPEG2000Lossless,
        lambda image: imagecodecs.jpeg2k_encode(image, codecformat="j2k", reversible=True, resolutions=1),
    )


def jpeg_2000_of_blocks(change: Callable[[bytearray], None]) -> bytes:
    """Return an empty JPEG 2000 image of the largest size with a changed coding style (COD)."""
    frame = bytes(imagecodecs.jpeg2k_encode(np.zeros((BLANK, BLANK), "u2"), codecformat="j2k", reversible=True))
    at = frame.index(b"\xff\x52")
    end = at + 2 + int.from_bytes(frame[at + 2 : at + 4])
    style = bytearray(frame[at:end])
    change(style)
    style[2:4] = (len(style) - 2).to_bytes(2)
    return dicom(encapsulate([frame[:at] + style + frame[end:]]), BLANK, BLANK, uid.JPEG2000Lossless, BitsStored=16)


def jpeg_2000_precincts() -> Parts:
    """JPEG 2000: 100,000,000 pixels in precincts of 2 x 2."""

    def change(style: bytearray) -> None:
        style[4] |= 1
        style += bytes([0x11]) * (style[9] + 1)

    yield jpeg_2000_of_blocks(change)


def jpeg_2000_blocks() -> Parts:
    """JPEG 2000: 100,000,000 pixels in code blocks of 4 x 4."""

    def change(style: bytearray) -> None:
        style[10] = style[11] = 0

    yield jpeg_2000_of_blocks(change)


def jpeg_2000_layers() -> Parts:
    """JPEG 2000: 100,000,000 pixels in 65,535 quality layers."""

    def change(style: bytearray) -> None:
        style[6:8] = b"\xff\xff"

    yield jpeg_2000_of_blocks(change)


def blank_htj2k() -> Parts:
    """HTJ2K: 100,000,000 pixels in a few kB."""
    yield compressed(uid.HTJ2KLossless, lambda image: imagecodecs.htj2k_encode(image, reversible=True))


def blank_jpeg_ls() -> Parts:
    """JPEG-LS: 100,000,000 pixels in a few kB."""
    yield compressed(uid.JPEGLSLossless, imagecodecs.jpegls_encode)


def blank_jpeg_lossless() -> Parts:
    """JPEG lossless: 100,000,000 pixels in 12 MB."""
    yield compressed(uid.JPEGLosslessSV1, lambda image: imagecodecs.ljpeg_encode(image, bitspersample=16))


def blank_jpeg() -> Parts:
    """JPEG: 100,000,000 pixels."""
    yield compressed(uid.JPEGBaseline8Bit, imagecodecs.jpeg8_encode, "u1")


def rle_bomb() -> Parts:
    """RLE: 8 MB that unpack to 1 GB where 27 kB are stated."""
    run = b"\x81\0" * (4 << 20)
    frame = struct.pack("<16I", 2, 64, 64 + len(run), *[0] * 13) + 2 * run
    yield dicom(encapsulate([frame]), syntax=uid.RLELossless)


def rle_bomb_of_the_largest_size() -> Parts:
    """RLE: 100,000,000 pixels in 3 MB."""
    run = b"\x81\0" * (-(-BLANK * BLANK // 128))
    frame = struct.pack("<16I", 2, 64, 64 + len(run), *[0] * 13) + 2 * run
    yield dicom(encapsulate([frame]), BLANK, BLANK, uid.RLELossless)


def progressive_scans(rows: int, columns: int, scans: int) -> bytes:
    """Return a progressive JPEG with many redundant scans after the first (a known attack on libjpeg)."""
    data = cv2.imencode(".jpg", np.zeros((rows, columns), np.uint8), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + b"\xff\xd9"


def progressive_jpeg() -> Parts:
    """a progressive JPEG picture of 25,000,000 pixels in 2,000 scans."""
    yield progressive_scans(5000, 5000, 2000)


def progressive_jpeg_in_dicom() -> Parts:
    """the same in DICOM."""
    frame = progressive_scans(5000, 5000, 2000)
    yield dicom(encapsulate([frame]), 5000, 5000, uid.JPEGBaseline8Bit, BitsAllocated=8, BitsStored=8)


def png(rows: int, columns: int, colour: int, bits: int, data: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """Return a PNG with a header, the `extra` chunks and compressed `data`."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", columns, rows, bits, colour, 0, 0, 0)),
        *extra,
        (b"IDAT", data),
        (b"IEND", b""),
    ]
    packed = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def huge_png() -> Parts:
    """PNG: a header of 100,000 x 100,000."""
    yield png(100_000, 100_000, 0, 16, zlib.compress(bytes(100)))


def blank_png() -> Parts:
    """PNG: 100,000,000 pixels of 16 bits in 200 kB."""
    yield png(BLANK, BLANK, 0, 16, zlib_zeros(BLANK * (2 * BLANK + 1)))


def blank_colour_png() -> Parts:
    """PNG: 100,000,000 pixels of 4 x 16 bits in 800 kB."""
    yield png(BLANK, BLANK, 6, 16, zlib_zeros(BLANK * (8 * BLANK + 1)))


def text_png() -> Parts:
    """PNG: texts and a profile that unpack to 1 GB each."""
    text = zlib_zeros(1 << 30)
    yield png(128, 128, 0, 8, zlib.compress(bytes(128 * 129)), (b"iCCP", b"a\0\0" + text), (b"zTXt", b"a\0\0" + text))


def long_png() -> Parts:
    """PNG: a text chunk of 2 GB."""
    good = png(128, 128, 0, 8, zlib.compress(bytes(128 * 129)))
    yield from (good[:33], struct.pack(">I", GIGA) + b"tEXt", GIGA, b"\0\0\0\0", good[33:])


def tiff(fields: list[tuple[int, int, int, int]], loop: bool = False) -> bytes:
    """Return a little-endian TIFF with a directory of (tag, type, count, value).

    With `loop`, the directory refers to itself as the next one.
    """
    directory = b"".join(struct.pack("<HHII", *field) for field in fields)
    next_directory = struct.pack("<I", 8 if loop else 0)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(fields)) + directory + next_directory + bytes(1000)


def tiff_fields(side: int, bits: int, size: int, samples: int = 1) -> list[tuple[int, int, int, int]]:
    """Return the directory of an uncompressed square image of `side` pixels, whose only strip has `size` bytes."""
    return [
        (256, 4, 1, side),  # ImageWidth
        (257, 4, 1, side),  # ImageLength
        (258, 3, 1, bits),  # BitsPerSample
        (259, 3, 1, 1),  # Compression: none
        (262, 3, 1, 1),  # PhotometricInterpretation: black is zero
        (273, 4, 1, 200),  # StripOffsets
        (277, 3, 1, samples),  # SamplesPerPixel
        (278, 4, 1, side),  # RowsPerStrip
        (279, 4, 1, size),  # StripByteCounts
    ]


def blank_tiff() -> Parts:
    """TIFF: 100,000,000 pixels of 16 bits without data."""
    yield tiff(tiff_fields(BLANK, bits=16, size=100))


def many_samples_tiff() -> Parts:
    """TIFF: 60,000 samples a pixel."""
    yield tiff(tiff_fields(5000, bits=16, size=100, samples=60000))


def circular_tiff() -> Parts:
    """TIFF: a directory that follows itself."""
    yield tiff(tiff_fields(20, bits=8, size=400), loop=True)


BOMBS: tuple[Callable[[], Parts], ...] = (
    *(private_tag, endless_private_tag, endless_unknown_tag, character_set, many_values, deep_sequences, many_items),
    *(too_many_pixels, long_pixel_data, long_fragment, many_fragments, deflated_private_tag),
    *(blank_jpeg_2000, blank_jpeg_2000_without_levels, jpeg_2000_precincts, jpeg_2000_blocks, jpeg_2000_layers),
    *(blank_htj2k, blank_jpeg_ls, blank_jpeg_lossless, blank_jpeg, rle_bomb, rle_bomb_of_the_largest_size),
    *(progressive_jpeg, progressive_jpeg_in_dicom, huge_png, blank_png, blank_colour_png, text_png, long_png),
    *(blank_tiff, many_samples_tiff, circular_tiff),
)


def cases(count: int) -> Iterator[tuple[str, int]]:
    """Yield the names and numbers of mutants, with every seed file in turn."""
    small = [*small_seeds(), *source_seeds()]
    real = list(real_seeds())
    rng = random.Random(0)
    for number in range(count):
        names = real if real and rng.random() < REAL else small
        yield names[number % len(names)], number


def lost(case: tuple[str, Any], message: str) -> Outcome:
    """Return the outcome of a file whose process died or hung."""
    name = case[0] if isinstance(case[1], Path) else f"{case[0]} #{case[1]}"
    verdict = "died" if "died" in message else "hung"
    return Outcome(name, verdict, message, float("nan"), float("nan"))


def attempt(function: Callable[[Any], Outcome], items: Iterable[Any], jobs: int) -> Iterator[Outcome]:
    """Yield the outcomes of `items` in order."""
    with process_per_thread(function, lost, TIME_LIMIT) as call, ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(call, items)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=5000, help="number of mutants")
    parser.add_argument("--jobs", type=int, default=2, help="number of worker processes")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--again", nargs=3, metavar=("NAME", "NUMBER", "FILE"), help="only write this mutant to FILE")
    arguments = parser.parse_args()
    if arguments.again:
        Path(arguments.again[2]).write_bytes(mutant(arguments.again[0], int(arguments.again[1])))
        return 0
    print(f"{'bomb':66} {'s':>6} {'MB':>6}  verdict")
    bombs = []
    with tempfile.TemporaryDirectory() as folder:
        for outcome in attempt(try_bomb, write_bombs(Path(folder)), 1):
            bombs.append(outcome)
            print(f"{outcome.name:66} {outcome.seconds:6.2f} {outcome.megabytes:6.0f}  {outcome.verdict}", flush=True)
    tried = attempt(try_mutant, cases(arguments.mutants), arguments.jobs)
    mutants = list(progress(tried, "mutants", total=arguments.mutants, unit="file"))
    verdicts = Counter(outcome.verdict for outcome in mutants)
    print(f"\n{len(mutants)} mutants: " + ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common()))
    slowest = sorted(mutants, key=lambda outcome: -outcome.seconds)[:5]
    largest = sorted(mutants, key=lambda outcome: -outcome.megabytes)[:5]
    for title, worst in (("slowest", slowest), ("largest", largest)):
        for outcome in worst:
            print(f"{title}: {outcome.seconds:6.2f} s {outcome.megabytes:6.0f} MB  {outcome.verdict:14} {outcome.name}")
    bad = [outcome for outcome in bombs + mutants if outcome.verdict in ("died", "hung", "failed")]
    for outcome in bad:
        print(f"{outcome.verdict}: {outcome.name}: {outcome.remark}")
    if arguments.json:
        numbers: dict[str, Any] = {"mutants": len(mutants), "verdicts": verdicts}
        for key, outcomes in {"bombs": bombs, "slowest": slowest, "largest": largest, "bad": bad}.items():
            numbers[key] = [outcome._asdict() for outcome in outcomes]
        write_atomic(arguments.json, to_json(numbers))
    return int(any(outcome.verdict != "failed" for outcome in bad))


if __name__ == "__main__":
    sys.exit(main())
