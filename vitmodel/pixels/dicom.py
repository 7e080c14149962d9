"""DICOM mammograms: the header read and judged at once, pixels when asked. Knows no crop."""

from __future__ import annotations

import dataclasses
import functools
import io
import mmap
import re
import warnings
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydicom import Dataset, dcmread, uid
from pydicom.encaps import get_frame

from vitmodel.pixels import decoding
from vitmodel.pixels.decoding import Layout
from vitmodel.pixels.image import Header
from vitmodel.pixels.tags import Tags
from vitmodel.pixels.verdict import ImageRefused, Remark
from vitmodel.pixels.voi import Display, ForProcessing, read_display

# pydicom warns of every value that breaks the standard's small print; what matters here becomes a remark instead.
warnings.filterwarnings("ignore", module=r"pydicom\.")

SKIP_LARGER = 1 << 20
"""Bytes; larger values, such as private copies of the raw data, are never read with the header."""
MAX_HEADER = 64 << 20
"""Bytes of all values that are read with the header; most files have less than one million."""
READ_COST = 256
"""Bytes of that for each read, so that values without length run out as well."""
DEFLATED, EXPLICIT = uid.DeflatedExplicitVRLittleEndian.encode(), uid.ExplicitVRLittleEndian.encode().ljust(22, b"\0")
DARK = 0.05
"""Padding up to this grey bleeds no visible rim into an average; a sigmoid's foot lies near 0.01."""

SEAL_CREATOR = uid.UID("2.25.190149356847874761884123222944553639490")
"""Whose Private Information a file's meta header holds: this program's."""

MAMMOGRAPHY_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.1.2": "Digital Mammography X-Ray Image Storage - For Presentation",
    "1.2.840.10008.5.1.4.1.1.1.2.1": "Digital Mammography X-Ray Image Storage - For Processing",
}
TOMOSYNTHESIS_CLASS = "1.2.840.10008.5.1.4.1.1.13.1.3"
FOR_PROCESSING_CLASSES = {"1.2.840.10008.5.1.4.1.1.1.2.1", "1.2.840.10008.5.1.4.1.1.1.1.1", "1.2.840.10008.5.1.4.1.1.1.3.1"}
PROJECTION_MODALITIES = {"DX", "CR", "RG", "SC"}
"""Under which digitised film and older detectors are filed."""

BREAST_VIEWS = {"CC", "MLO", "ML", "LM", "LMO", "XCC", "XCCL", "XCCM", "FB", "SIO", "ISO", "AT", "CV"}
VIEW_CODES = {  # DICOM PS3.16 CID 4014 and the two projections of CID 4015; SNOMED CT, and SRT (also SNM3, 99SDM) as older files have
    "CC": ("399162004", "R-10242"),
    "MLO": ("399368009", "R-10226"),
    "ML": ("399260004", "R-10224"),
    "LM": ("399352003", "R-10228"),
    "LMO": ("399099002", "R-10230"),
    "XCCL": ("399192008", "R-1024A"),
    "XCCM": ("399101009", "R-1024B"),
    "FB": ("399196006", "R-10244"),
    "SIO": ("399188001", "R-102D0"),
    "ISO": ("441555000", "R-40AAA"),
    "AT": ("399011000", "R-102D1"),
    "CV": ("399161006", "R-102D2"),
}
VIEW_OF_CODE = {code: view for view, codes in VIEW_CODES.items() for code in codes}


class DicomFile:
    """One DICOM file as an `ImageFile`. Raises ImageRefused where its header tells that it is no readable mammogram.

    `voi`: which of several stored VOI LUTs or windows to use, from 1. `for_processing`: what to do with raw detector data: refuse it,
    or show the inverted logarithm ("log").
    """

    def __init__(self, path: Path | str, voi: int = 1, for_processing: ForProcessing = "refuse") -> None:
        self.path = Path(path)
        remarks: list[Remark] = []
        dataset = read_dataset(self.path)
        tags = Tags(dataset, remarks)
        try:
            syntax, sop_class = identify(dataset, tags)
            raw = judge(tags, sop_class, for_processing)
            self.layout = read_layout(tags, syntax)
            self.display = read_display(tags, self.layout.signed, self.layout.allocated, raw, voi)
            self.header = read_header(tags, self.layout, self.display.name, remarks)
            self._seal = read_seal(tags)
        except ImageRefused:
            raise
        except Exception as error:  # what pydicom raises on damaged bytes has no common type
            raise ImageRefused("bad_header", f"the header cannot be understood: {error}") from error
        self.decoder = ""

    @functools.cached_property
    def levels(self) -> int:
        """Resolution levels to leave out: JPEG 2000's, or 0."""
        return 0 if self._bright_padding else decoding.reducible(self.frame, self.layout)

    def stored(self, level: int = 0) -> np.ndarray:
        """The stored values, H W, int or uint of 8 or 16 bits, at `level`'s grid (see `decoding.grid_offset`). Raises ImageRefused.

        Padding that would show bright is replaced by the darkest value, so that averages over its border stay dark.
        """
        if not 0 <= level <= (self.levels if level else 0):
            raise ValueError(f"level {level} is not between 0 and {self.levels}")
        patterns, self.decoder = self._decode(level)
        values, assumed = decoding.interpret(patterns, self.layout)
        if assumed and level == 0:  # at a lower level the wavelet's low pass overshoots, which says nothing about BitsStored
            self._remark(assumed)
        if self._bright_padding:
            air = self._domain[self._chain(self._domain).argmin()]
            values = np.where(self.display.pads(values), air, values)
        return values

    def grey(self, stored: np.ndarray) -> np.ndarray:
        """Stored values, whole or averaged, H W, as float32 in [0, 1] of the VOI's output range, brighter = denser, padding 0.

        Whole values are looked up; averages are interpolated between the two nearest whole values.
        """
        table, low = self._table, int(self._domain[0])
        if stored.dtype == self.layout.dtype:
            return table[stored.astype(np.int32) - low] if low else table[stored]
        position = np.clip(stored.astype(np.float32) - low, 0, len(table) - 1)
        below = np.minimum(position.astype(np.int32), len(table) - 2)
        fraction = position - below
        return table[below] * (1 - fraction) + table[below + 1] * fraction

    @functools.cached_property
    def _domain(self) -> np.ndarray:
        """Every value that a stored pixel can have, ascending."""
        info = np.iinfo(self.layout.dtype)
        return np.arange(info.min, info.max + 1).astype(self.layout.dtype)

    @functools.cached_property
    def _chain(self) -> Display:
        """`display`; without a VOI, over the image's own range at full size, as viewers do, so that every part shows alike."""
        if self.display.voi is not None:
            return self.display
        pixels, _ = decoding.interpret(self._decode()[0], self.layout)
        pixels = pixels[~self.display.pads(pixels)]
        return self.display.over(pixels.min(), pixels.max()) if pixels.size else self.display.over(0, 1)

    @functools.cached_property
    def _table(self) -> np.ndarray:
        """The grey of every value in `_domain`, float32."""
        return np.where(self.display.pads(self._domain), 0, self._chain(self._domain)).astype(np.float32)

    @functools.cached_property
    def _bright_padding(self) -> bool:
        """Whether padding would show bright, were it not blanked."""
        padding = self.display.padding
        return padding is not None and bool(self._chain(np.array(padding)).max() > DARK)

    def _decode(self, level: int = 0) -> tuple[np.ndarray, str]:
        return decoding.decode(self.frame, self.layout, level, self._is_sealed)

    @functools.cached_property
    def _is_sealed(self) -> bool:
        """Whether the file carries our seal and its frame is unchanged since."""
        return self._seal != b"" and self._seal == seal(self.frame)

    @functools.cached_property
    def frame(self) -> bytes:
        """The frame's bytes as they lie in the file."""
        expected = self.layout.rows * self.layout.columns * self.layout.allocated // 8
        dataset = read_dataset(self.path, 2 * expected)  # a codec that does not compress still needs little more
        data = next(iter(Tags(dataset, []).values("PixelData")), None)
        if not isinstance(data, bytes) or not data:
            if announces_pixels(self.path):
                raise ImageRefused("unreadable", "the file is cut short within its pixel data")
            raise ImageRefused("no_pixels", "the file has no pixel data, or ends before it")
        if not uid.UID(self.layout.syntax).is_encapsulated:
            if len(data) < expected:
                raise ImageRefused("unreadable", f"the file is cut short: {len(data)} of {expected} bytes of pixels")
            if self.layout.syntax == uid.ExplicitVRBigEndian and self.layout.allocated == 8 and dataset["PixelData"].VR == "OW":
                data = np.frombuffer(data, np.uint16).byteswap().tobytes()  # bytes travel in words (PS3.5 D.1)
            return data[:expected]
        try:
            return get_frame(data, 0, number_of_frames=1)
        except Exception as error:  # damaged item lengths raise any of pydicom's exceptions
            raise ImageRefused("unreadable", f"the compressed pixels are cut short or damaged: {error}") from error

    def _remark(self, sentence: str) -> None:
        remark = Remark("assumed_values", sentence)
        if remark not in self.header.remarks:
            self.header = dataclasses.replace(self.header, remarks=(*self.header.remarks, remark))


def seal(frame: bytes) -> bytes:
    """What our copies hold as Private Information (PS3.10 table 7.1-1): the checksum of their frame, which tells later damage."""
    return zlib.crc32(frame).to_bytes(4)


def read_seal(tags: Tags) -> bytes:
    """The seal of a copy of ours, b"" of any other file."""
    meta = getattr(tags.dataset, "file_meta", Dataset())
    return meta.get("PrivateInformation", b"") if meta.get("PrivateInformationCreatorUID") == SEAL_CREATOR else b""


def read_dataset(path: Path, pixels: int = 0) -> Dataset:
    """The file's header without its pixels or, of at most `pixels` bytes, its pixels without its header. Raises ImageRefused."""
    options: dict[str, Any] = {"specific_tags": ["PixelData"]} if pixels else {"stop_before_pixels": True, "defer_size": SKIP_LARGER}
    try:
        with path.open("rb", buffering=0) as file:
            start = file.read(132)
            if start[128:] != b"DICM" and start[:2] not in (b"\x02\0", b"\x08\0"):  # files of old begin with their first group
                raise ImageRefused("not_an_image")
            file.seek(0)
            limited = LimitedFile(file, MAX_HEADER + pixels)
            try:
                return dcmread(limited, force=True, **options)
            except Deflated:
                dataset = dcmread(LimitedFile(inflated(limited), MAX_HEADER + pixels), force=True, **options)
                dataset.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
                return dataset
    except ImageRefused:
        raise
    except FileNotFoundError:
        raise ImageRefused("missing_file", f"{path} does not exist") from None
    except Exception as error:  # what pydicom raises on damaged bytes has no common type
        raise ImageRefused("unreadable", f"the file cannot be parsed as DICOM: {error}") from error


class Deflated(Exception):  # noqa: N818 (a turn on the way, not an error)
    """The file's data set is deflated from here on."""


class LimitedFile(io.BufferedReader):
    """A file of which only so many bytes can be read, whatever lengths it states: what would be more is refused, not stored.

    Every read also costs `READ_COST` bytes, so that no number of small values keeps a reader busy. To read what is left without
    saying how much is what pydicom does before it inflates the whole of it; that raises Deflated instead.
    """

    def __init__(self, file: BinaryIO, limit: int) -> None:
        super().__init__(file)  # type: ignore[arg-type] # any file in binary mode will do
        self.left = limit

    @property
    def name(self) -> str:
        """None that anybody needs; bytes in memory have none either, and pydicom asks."""
        return ""

    def read(self, size: int | None = -1) -> bytes:
        """The next `size` bytes. Raises ImageRefused and Deflated."""
        if size is None or size < 0:
            raise Deflated
        data = super().read(min(size, max(self.left, 0) + 1))
        self.left -= len(data) + READ_COST
        if self.left < 0:
            raise ImageRefused("too_large", "the file holds larger or more values than any mammogram")
        return data


def inflated(file: LimitedFile) -> BinaryIO:
    """The file with what follows from its position on inflated, and its transfer syntax renamed. Raises ImageRefused and zlib.error."""
    at, limit = file.tell(), MAX_HEADER + 2 * decoding.MAX_PIXELS
    file.raw.seek(0, io.SEEK_SET)
    head = file.raw.read(at).replace(DEFLATED, EXPLICIT)
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    body = stream.decompress(file.raw.read(limit), limit)
    if stream.unconsumed_tail:
        raise ImageRefused("too_large", "the file inflates to more than any mammogram")
    return io.BytesIO(head + body)


def announces_pixels(path: Path) -> bool:
    """Whether the Pixel Data tag stands anywhere in a file in which pydicom did not find its value."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"\xe0\x7f\x10\0") >= 0


def identify(dataset: Dataset, tags: Tags) -> tuple[str, str]:
    """Transfer syntax and SOP class. Raises ImageRefused for a syntax that nothing here decodes."""
    meta = Tags(getattr(dataset, "file_meta", Dataset()), tags.remarks)
    sop_class = tags.text("SOPClassUID") or meta.text("MediaStorageSOPClassUID")
    syntax = meta.text("TransferSyntaxUID")
    if not syntax:
        implicit, little = dataset.original_encoding
        syntax = uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        tags.doubt(f"TransferSyntaxUID is missing; {uid.UID(syntax).name} is assumed")
    if syntax not in decoding.DECODERS:
        raise ImageRefused("undecodable", f"transfer syntax {uid.UID(syntax).name} is not one of a mammogram's")
    return str(syntax), sop_class


def judge(tags: Tags, sop_class: str, for_processing: ForProcessing) -> bool:
    """Refuse what is no single grey mammogram for a person to look at; return whether it is raw detector data to be shown all the same."""
    if not tags.values("Rows") and not tags.values("Columns"):
        raise ImageRefused("no_pixels", f"the object ({tags.code('Modality') or 'no Modality'}) has no Rows and Columns: it is no image")
    judge_modality(tags, sop_class)
    frames = tags.integer("NumberOfFrames") or 1
    if frames > 1:
        raise ImageRefused("multi_frame", f"NumberOfFrames is {frames}: tomosynthesis or a series, of which no frame is the mammogram")
    kind = tags.codes("ImageType")
    if sop_class == TOMOSYNTHESIS_CLASS or (any(word.startswith("TOMO") for word in kind) and "GENERATED_2D" not in kind):
        raise ImageRefused("multi_frame", "the image is one slice or projection of a tomosynthesis")
    photometric = tags.code("PhotometricInterpretation")
    samples = tags.integer("SamplesPerPixel") or 1
    if samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2", ""):
        raise ImageRefused("colour", f"PhotometricInterpretation is {photometric}, SamplesPerPixel {samples}")
    raw = tags.code("PresentationIntentType") == "FOR PROCESSING" or sop_class in FOR_PROCESSING_CLASSES
    if raw and for_processing == "refuse":
        raise ImageRefused("for_processing")
    return raw


def judge_modality(tags: Tags, sop_class: str) -> None:
    """Refuse another modality; accept with a remark what film digitisers and de-identified releases leave in doubt."""
    modality = tags.code("Modality")
    if modality == "MG" or sop_class in MAMMOGRAPHY_CLASSES or sop_class == TOMOSYNTHESIS_CLASS:
        return
    where = f"Modality is {modality or 'missing'}, the SOP class {uid.UID(sop_class).name or 'missing'}"
    if modality not in {"", *PROJECTION_MODALITIES}:
        raise ImageRefused("not_mammography", where)
    if shows_breast(tags):
        tags.doubt(f"{where}, yet the body part or view is the breast's", "unknown_modality")
    elif modality:
        raise ImageRefused("not_mammography", f"{where}, and neither body part nor view is the breast's")
    elif tags.code("ImageLaterality") not in ("L", "R"):  # a release that hides everything but the side was still made of breasts
        tags.doubt(where, "unknown_modality")


def shows_breast(tags: Tags) -> bool:
    """Whether body part, organ, positioner or view are those of mammography."""
    parts = {tags.code("BodyPartExamined"), tags.code("OrganExposed")}
    return "BREAST" in parts or tags.code("PositionerType").startswith("MAMMO") or read_view(tags) != ""


def read_layout(tags: Tags, syntax: str) -> Layout:
    """How the pixels are stored. Raises ImageRefused naming the tag that makes it impossible to know."""
    rows, columns, allocated = (required(tags, keyword) for keyword in ("Rows", "Columns", "BitsAllocated"))
    if rows * columns > decoding.MAX_PIXELS:
        raise ImageRefused("too_large", f"Rows x Columns are {rows} x {columns}")
    if allocated not in (8, 16):
        raise ImageRefused("bad_header", f"BitsAllocated is {allocated}; a mammogram has 8 or 16")
    stored = tags.integer("BitsStored")
    if stored is None or not 1 <= stored <= allocated:
        tags.doubt(f"BitsStored is {'missing' if stored is None else stored}; BitsAllocated, {allocated}, is assumed")
        stored = allocated
    high = tags.integer("HighBit")
    if high is not None and high != stored - 1:
        tags.doubt(f"HighBit is {high} though BitsStored is {stored}; HighBit is ignored")
    signed = tags.integer("PixelRepresentation")
    if signed not in (0, 1):
        tags.doubt(f"PixelRepresentation is {'missing' if signed is None else signed}; unsigned pixels are assumed")
    photometric = tags.code("PhotometricInterpretation")
    if not photometric:
        tags.doubt("PhotometricInterpretation is missing; MONOCHROME2 is assumed")
    return Layout(syntax, rows, columns, allocated, stored, signed == 1, photometric or "MONOCHROME2", has_overlay_bits(tags.dataset))


def required(tags: Tags, keyword: str) -> int:
    """A positive whole number without which no pixel can be read. Raises ImageRefused."""
    value = tags.integer(keyword)
    if value is None or value < 1:
        raise ImageRefused("bad_header", f"{keyword} is {'missing' if value is None else value}")
    return value


def has_overlay_bits(dataset: Dataset) -> bool:
    """Whether an overlay plane without data of its own lies in the pixels' high bits (PS3.3 C.9.2 of 2004, retired)."""
    return any((group, 0x0102) in dataset and (group, 0x3000) not in dataset for group in range(0x6000, 0x6020, 2))


def read_header(tags: Tags, layout: Layout, voi: str, remarks: list[Remark]) -> Header:
    """What the file says about its image; optional tags that are absent or strange stay unknown."""
    if tags.code("LossyImageCompression") == "01" or layout.syntax in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit):
        tags.doubt(f"lossy compression, ratio {tags.text('LossyImageCompressionRatio') or 'unknown'}", "lossy")
    side = tags.code("ImageLaterality") or tags.code("Laterality")
    machine = next(filter(None, map(tags.text, ("DeviceSerialNumber", "StationName", "ManufacturerModelName"))), "")
    return Header(
        rows=layout.rows,
        columns=layout.columns,
        bits=layout.stored,
        photometric=layout.photometric,
        transfer_syntax=layout.syntax,
        voi=voi,
        patient_id=tags.text("PatientID"),
        image_id=tags.text("SOPInstanceUID"),
        laterality=side if side in ("L", "R") else "",
        view=read_view(tags),
        machine_id=machine,
        implant={"YES": 1, "NO": 0}.get(tags.code("BreastImplantPresent")),
        age=read_age(tags),
        spacing=read_spacing(tags),
        remarks=tuple(remarks),
    )


def read_view(tags: Tags) -> str:
    """The view by ViewPosition or, failing that, ViewCodeSequence; its modifiers (magnification, rolled, ...) do not count."""
    view = tags.code("ViewPosition")
    if view in BREAST_VIEWS:
        return view
    return next((VIEW_OF_CODE[code] for item in tags.items("ViewCodeSequence") if (code := item.code("CodeValue")) in VIEW_OF_CODE), "")


def read_age(tags: Tags) -> float | None:
    """PatientAge in years."""
    match = re.fullmatch(r"(\d{1,3})([YMWD])", tags.code("PatientAge"))
    if not match or not int(match[1]):  # de-identification writes 000Y
        return None
    return int(match[1]) / {"Y": 1, "M": 12, "W": 52.18, "D": 365.25}[match[2]]


def read_spacing(tags: Tags) -> tuple[float, float] | None:
    """The distance of pixel centres, row and column, in mm: at the detector, divided by the magnification, else as calibrated."""
    spacing = tags.numbers("ImagerPixelSpacing")
    magnification = tags.number("EstimatedRadiographicMagnificationFactor") or 1.0
    if len(spacing) != 2:
        spacing, magnification = tags.numbers("PixelSpacing"), 1.0
    if len(spacing) != 2 or min(*spacing, magnification) <= 0:
        return None
    return spacing[0] / magnification, spacing[1] / magnification
