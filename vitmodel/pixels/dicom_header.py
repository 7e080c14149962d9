"""Check the header of a DICOM mammogram and read it; each assumption adds a warning."""

from __future__ import annotations

from pydicom import Dataset, uid

from vitmodel.errors import ImageRefusedError
from vitmodel.pixels import decoding
from vitmodel.pixels.colour import COLOUR_SPACES, MONOCHROME, PALETTE
from vitmodel.pixels.header import ImageHeader
from vitmodel.pixels.header_meaning import TOMOSYNTHESIS_CLASS, check_meaning
from vitmodel.pixels.identity import identify
from vitmodel.pixels.pixel_format import MAX_PIXELS, PixelFormat
from vitmodel.pixels.side_and_view import BREAST_VIEWS, VIEW_OF_CODE
from vitmodel.pixels.tags import TagReader
from vitmodel.pixels.verdict import REFUSAL_REASONS, ImageWarning
from vitmodel.pixels.voi import ForProcessing

MAMMOGRAPHY_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.1.2": "Digital Mammography X-Ray Image Storage - For Presentation",
    "1.2.840.10008.5.1.4.1.1.1.2.1": "Digital Mammography X-Ray Image Storage - For Processing",
}
FOR_PROCESSING_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.1.2.1",
    "1.2.840.10008.5.1.4.1.1.1.1.1",
    "1.2.840.10008.5.1.4.1.1.1.3.1",
}
PROJECTION_MODALITIES = {"DX", "CR", "RG", "SC"}
"""Modalities of digitised films and older detectors."""


KNOWN_CODES = frozenset(
    (
        *(
            "MG",
            "CR",
            "DX",
            "RG",
            "XA",
            "RF",
            "CT",
            "MR",
            "US",
            "NM",
            "PT",
            "OT",
            "SC",
            "ES",
            "GM",
            "OP",
            "IO",
            "PX",
            "BI",
        ),
        *("SR", "PR", "KO", "SEG", "DOC", "ECG", "REG", "RTIMAGE", "RTDOSE", "RTPLAN", "RTSTRUCT", "XC", "SM", "HC"),
        *("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "HSV", "ARGB", "CMYK", "YBR_FULL", "YBR_FULL_422"),
        *("YBR_PARTIAL_422", "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT", "XYB"),
    )
)
"""Defined terms of Modality (PS3.3 C.7.3.1.1.1) and PhotometricInterpretation (C.7.6.3.1.2) that messages may name."""


def shown_code(code: str) -> str:
    """Return a code for a message; a value that is no defined term may be a misplaced name and is not repeated."""
    return (code if code in KNOWN_CODES else "an unknown value") if code else "missing"


def name_of_uid(value: str) -> str:
    """Return the name of a UID for a message; a value that the standard does not define is not repeated."""
    return (uid.UID_dictionary[value][0] if value in uid.UID_dictionary else "unknown") if value else "missing"


def read_syntax_and_class(dataset: Dataset, tags: TagReader) -> tuple[str, str]:
    """Return the transfer syntax and the SOP class.

    Raises:
        ImageRefusedError: There is no decoder for the transfer syntax.
    """
    meta = TagReader(getattr(dataset, "file_meta", Dataset()), tags.warnings)
    sop_class = tags.text("SOPClassUID") or meta.text("MediaStorageSOPClassUID")
    syntax = meta.text("TransferSyntaxUID")
    if not syntax:
        syntax = _native_syntax(dataset)
        tags.add_warning(f"TransferSyntaxUID is missing; {uid.UID(syntax).name} is assumed")
    if syntax not in decoding.DECODERS:
        raise ImageRefusedError(
            "undecodable",
            f"the transfer syntax ({name_of_uid(syntax)}) is not supported; "
            "export the image uncompressed or as JPEG 2000",
        )
    return str(syntax), sop_class


def _native_syntax(dataset: Dataset) -> str:
    """Return the uncompressed transfer syntax with the encoding in which pydicom read the data set."""
    implicit, little_endian = dataset.original_encoding
    if implicit:
        return uid.ImplicitVRLittleEndian
    return uid.ExplicitVRLittleEndian if little_endian else uid.ExplicitVRBigEndian


def check_image_object(tags: TagReader, sop_class: str, for_processing: ForProcessing) -> bool:
    """Return whether the object is raw detector data, after checking that it is a single greyscale mammogram.

    Args:
        tags: The header.
        sop_class: UID of the SOP class.
        for_processing: Whether raw detector data is refused or accepted ("log").

    Raises:
        ImageRefusedError: The object is not a mammogram, has several frames or colours, or is raw data to be refused.
    """
    if not tags.values("Rows") and not tags.values("Columns"):
        raise ImageRefusedError(
            "no_pixels",
            f"the DICOM object (Modality {shown_code(tags.code('Modality'))}) is not an image: "
            "it has no Rows and Columns",
        )
    check_modality(tags, sop_class)
    check_meaning(tags, sop_class)
    photometric = tags.code("PhotometricInterpretation")
    samples = tags.integer("SamplesPerPixel") or 1
    if (samples, photometric) not in {
        *((1, name) for name in (*MONOCHROME, PALETTE)),
        *((3, name) for name in COLOUR_SPACES),
    }:
        raise ImageRefusedError(
            "colour",
            f"the image is not greyscale: PhotometricInterpretation is {shown_code(photometric)}, "
            f"SamplesPerPixel is {samples}; "
            "use the original mammogram",
        )
    raw = tags.code("PresentationIntentType") == "FOR PROCESSING" or sop_class in FOR_PROCESSING_CLASSES
    if raw and for_processing == "refuse":
        raise ImageRefusedError("for_processing", REFUSAL_REASONS["for_processing"])
    return raw


def check_modality(tags: TagReader, sop_class: str) -> None:
    """Check that the object is a mammogram; add a warning if film digitisers or de-identification left it uncertain.

    Args:
        tags: The header.
        sop_class: UID of the SOP class.

    Raises:
        ImageRefusedError: The object has another modality, or does not show a breast.
    """
    modality = tags.code("Modality")
    if modality == "MG" or sop_class in MAMMOGRAPHY_CLASSES or sop_class == TOMOSYNTHESIS_CLASS:
        return
    stated = f"Modality is {shown_code(modality)} and the SOP class is {name_of_uid(sop_class)}"
    remedy = "correct the header if the image is a mammogram"
    if modality not in {"", *PROJECTION_MODALITIES}:
        raise ImageRefusedError("not_mammography", f"{stated}, which is not mammography; {remedy}")
    if shows_breast(tags):
        tags.add_warning(f"{stated}, but body part or view is that of a breast", "unknown_modality")
    elif modality:
        raise ImageRefusedError(
            "not_mammography", f"{stated}, and neither body part nor view is that of a breast; {remedy}"
        )
    # Releases that remove everything but the laterality still consist of mammograms.
    elif tags.code("ImageLaterality") not in ("L", "R"):
        tags.add_warning(f"{stated}; the image is taken to be a mammogram", "unknown_modality")


def shows_breast(tags: TagReader) -> bool:
    """Return whether body part, organ, positioner or view are those of mammography."""
    parts = {tags.code("BodyPartExamined"), tags.code("OrganExposed")}
    return "BREAST" in parts or tags.code("PositionerType").startswith("MAMMO") or _has_standard_view(tags)


def _has_standard_view(tags: TagReader) -> bool:
    """Return whether the view is one of mammography in the standard's words or codes."""
    codes = {item.code("CodeValue") for item in tags.items("ViewCodeSequence")}
    return tags.code("ViewPosition") in BREAST_VIEWS or not codes.isdisjoint(VIEW_OF_CODE)


def read_pixel_format(tags: TagReader, syntax: str) -> PixelFormat:
    """Return the storage format of the pixels.

    Args:
        tags: The header.
        syntax: UID of the transfer syntax.

    Raises:
        ImageRefusedError: A required tag is missing or impossible; the message names it.
    """
    rows, columns, allocated = (
        require_positive_integer(tags, keyword) for keyword in ("Rows", "Columns", "BitsAllocated")
    )
    samples = tags.integer("SamplesPerPixel") or 1
    if rows * columns * samples > MAX_PIXELS:
        raise ImageRefusedError(
            "too_large",
            f"Rows x Columns is {rows} x {columns}, which is more than {MAX_PIXELS} pixels; "
            "export the image at a lower resolution",
        )
    if allocated not in (8, 16):
        raise ImageRefusedError("bad_header", f"BitsAllocated is {allocated}, not 8 or 16; export the image again")
    stored = tags.integer("BitsStored")
    if stored is None or not 1 <= stored <= allocated:
        tags.add_warning(f"BitsStored is {_or_missing(stored)}; the value of BitsAllocated, {allocated}, is assumed")
        stored = allocated
    high = tags.integer("HighBit")
    shift = 0 if high is None else high - stored + 1
    if high is not None and 0 < high < allocated and shift > 0:
        tags.add_warning(
            f"HighBit is {high} with BitsStored {stored}: values that exceed {stored} bits are shifted by {shift} bits"
        )
    elif shift:
        tags.add_warning(f"HighBit {high} contradicts BitsStored {stored}; HighBit is ignored")
        shift = 0
    signed = tags.integer("PixelRepresentation")
    if signed not in (0, 1):
        tags.add_warning(f"PixelRepresentation is {_or_missing(signed)}; unsigned pixels are assumed")
    photometric = tags.code("PhotometricInterpretation")
    if not photometric:
        tags.add_warning("PhotometricInterpretation is missing; MONOCHROME2 is assumed")
    return PixelFormat(
        syntax,
        rows,
        columns,
        allocated,
        stored,
        signed == 1,
        photometric or "MONOCHROME2",
        has_overlay_bits(tags.dataset),
        shift,
        samples,
        tags.integer("PlanarConfiguration") == 1,
    )


def require_positive_integer(tags: TagReader, keyword: str) -> int:
    """Return the value of a tag that decoding needs.

    Args:
        tags: The header.
        keyword: Keyword of the tag.

    Raises:
        ImageRefusedError: The value is missing or not positive.
    """
    value = tags.integer(keyword)
    if value is None or value < 1:
        raise ImageRefusedError(
            "bad_header", f"{keyword} is {_or_missing(value)} but decoding needs it; export the image again"
        )
    return value


def _or_missing(value: int | None) -> str:
    """Return the value as text, 'missing' for None."""
    return "missing" if value is None else str(value)


def has_overlay_bits(dataset: Dataset) -> bool:
    """Return whether the high bits of the pixels contain an overlay plane (PS3.3 C.9.2 of 2004, retired).

    Such a plane has no data element of its own.
    """
    return any((group, 0x0102) in dataset and (group, 0x3000) not in dataset for group in range(0x6000, 0x6020, 2))


def read_header(tags: TagReader, pixel_format: PixelFormat, voi: str, warnings: list[ImageWarning]) -> ImageHeader:
    """Return the header; optional tags that are absent or invalid stay unknown.

    Args:
        tags: The DICOM header.
        pixel_format: The storage format of the pixels.
        voi: Name of the VOI that was chosen.
        warnings: The warnings collected so far, shared with `tags`.
    """
    is_lossy_jpeg = pixel_format.syntax in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit)
    if tags.code("LossyImageCompression") == "01" or is_lossy_jpeg:
        stated = tags.number("LossyImageCompressionRatio")
        ratio = "unknown" if stated is None else f"{stated:g}"
        tags.add_warning(f"the pixels were compressed with loss (ratio {ratio})", "lossy")
    return ImageHeader(
        rows=pixel_format.rows,
        columns=pixel_format.columns,
        bits=pixel_format.bits_stored,
        photometric=pixel_format.photometric,
        transfer_syntax=pixel_format.syntax,
        voi=voi,
        identity=identify(tags),
        spacing=read_spacing(tags),
        warnings=tuple(warnings),
    )


def read_spacing(tags: TagReader) -> tuple[float, float] | None:
    """Return the distance of pixel centres between rows and between columns in mm; None if it is unknown.

    The distance is ImagerPixelSpacing (at the detector) divided by the magnification, or else PixelSpacing
    (calibrated).
    """
    spacing = tags.numbers("ImagerPixelSpacing")
    magnification = tags.number("EstimatedRadiographicMagnificationFactor") or 1.0
    if len(spacing) != 2:
        spacing, magnification = tags.numbers("PixelSpacing"), 1.0
    if len(spacing) != 2 or min(*spacing, magnification) <= 0:
        return None
    return spacing[0] / magnification, spacing[1] / magnification
