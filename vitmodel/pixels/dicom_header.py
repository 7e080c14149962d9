"""What a DICOM header says of its image: judged, then read with every doubt remarked upon. Knows no pixels."""

from __future__ import annotations

import re

from pydicom import Dataset, uid

from vitmodel.errors import ImageRefusedError
from vitmodel.pixels import decoding
from vitmodel.pixels.decoding import PixelFormat
from vitmodel.pixels.header import ImageHeader
from vitmodel.pixels.tags import TagReader
from vitmodel.pixels.verdict import REFUSAL_REASONS, ImageWarning
from vitmodel.pixels.voi import ForProcessing

MAMMOGRAPHY_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.1.2": "Digital Mammography X-Ray Image Storage - For Presentation",
    "1.2.840.10008.5.1.4.1.1.1.2.1": "Digital Mammography X-Ray Image Storage - For Processing",
}
TOMOSYNTHESIS_CLASS = "1.2.840.10008.5.1.4.1.1.13.1.3"
FOR_PROCESSING_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.1.2.1",
    "1.2.840.10008.5.1.4.1.1.1.1.1",
    "1.2.840.10008.5.1.4.1.1.1.3.1",
}
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


def read_syntax_and_class(dataset: Dataset, tags: TagReader) -> tuple[str, str]:
    """Transfer syntax and SOP class. Raises ImageRefusedError for a syntax that nothing here decodes."""
    meta = TagReader(getattr(dataset, "file_meta", Dataset()), tags.warnings)
    sop_class = tags.text("SOPClassUID") or meta.text("MediaStorageSOPClassUID")
    syntax = meta.text("TransferSyntaxUID")
    if not syntax:
        implicit, little = dataset.original_encoding
        syntax = (
            uid.ImplicitVRLittleEndian
            if implicit
            else uid.ExplicitVRLittleEndian
            if little
            else uid.ExplicitVRBigEndian
        )
        tags.add_warning(f"TransferSyntaxUID is missing; {uid.UID(syntax).name} is assumed")
    if syntax not in decoding.DECODERS:
        raise ImageRefusedError("undecodable", f"transfer syntax {uid.UID(syntax).name} is not one of a mammogram's")
    return str(syntax), sop_class


def check_image_object(tags: TagReader, sop_class: str, for_processing: ForProcessing) -> bool:
    """Refuse what is no single grey mammogram for a person to look at; return whether it is raw detector data to be shown all the same."""
    if not tags.values("Rows") and not tags.values("Columns"):
        raise ImageRefusedError(
            "no_pixels",
            f"the object ({tags.code('Modality') or 'no Modality'}) has no Rows and Columns: it is no image",
        )
    check_modality(tags, sop_class)
    frames = tags.integer("NumberOfFrames") or 1
    if frames > 1:
        raise ImageRefusedError(
            "multi_frame", f"NumberOfFrames is {frames}: tomosynthesis or a series, of which no frame is the mammogram"
        )
    kind = tags.codes("ImageType")
    if sop_class == TOMOSYNTHESIS_CLASS or (
        any(word.startswith("TOMO") for word in kind) and "GENERATED_2D" not in kind
    ):
        raise ImageRefusedError("multi_frame", "the image is one slice or projection of a tomosynthesis")
    photometric = tags.code("PhotometricInterpretation")
    samples = tags.integer("SamplesPerPixel") or 1
    if samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2", ""):
        raise ImageRefusedError("colour", f"PhotometricInterpretation is {photometric}, SamplesPerPixel {samples}")
    raw = tags.code("PresentationIntentType") == "FOR PROCESSING" or sop_class in FOR_PROCESSING_CLASSES
    if raw and for_processing == "refuse":
        raise ImageRefusedError("for_processing", REFUSAL_REASONS["for_processing"])
    return raw


def check_modality(tags: TagReader, sop_class: str) -> None:
    """Refuse another modality; accept with a remark what film digitisers and de-identified releases leave in doubt."""
    modality = tags.code("Modality")
    if modality == "MG" or sop_class in MAMMOGRAPHY_CLASSES or sop_class == TOMOSYNTHESIS_CLASS:
        return
    where = f"Modality is {modality or 'missing'}, the SOP class {uid.UID(sop_class).name or 'missing'}"
    if modality not in {"", *PROJECTION_MODALITIES}:
        raise ImageRefusedError("not_mammography", where)
    if shows_breast(tags):
        tags.add_warning(f"{where}, yet the body part or view is the breast's", "unknown_modality")
    elif modality:
        raise ImageRefusedError("not_mammography", f"{where}, and neither body part nor view is the breast's")
    elif tags.code("ImageLaterality") not in (
        "L",
        "R",
    ):  # a release that hides everything but the side was still made of breasts
        tags.add_warning(where, "unknown_modality")


def shows_breast(tags: TagReader) -> bool:
    """Whether body part, organ, positioner or view are those of mammography."""
    parts = {tags.code("BodyPartExamined"), tags.code("OrganExposed")}
    return "BREAST" in parts or tags.code("PositionerType").startswith("MAMMO") or read_view(tags) != ""


def read_pixel_format(tags: TagReader, syntax: str) -> PixelFormat:
    """How the pixels are stored. Raises ImageRefusedError naming the tag that makes it impossible to know."""
    rows, columns, allocated = (
        require_positive_integer(tags, keyword) for keyword in ("Rows", "Columns", "BitsAllocated")
    )
    if rows * columns > decoding.MAX_PIXELS:
        raise ImageRefusedError("too_large", f"Rows x Columns are {rows} x {columns}")
    if allocated not in (8, 16):
        raise ImageRefusedError("bad_header", f"BitsAllocated is {allocated}; a mammogram has 8 or 16")
    stored = tags.integer("BitsStored")
    if stored is None or not 1 <= stored <= allocated:
        tags.add_warning(
            f"BitsStored is {'missing' if stored is None else stored}; BitsAllocated, {allocated}, is assumed"
        )
        stored = allocated
    high = tags.integer("HighBit")
    if high is not None and high != stored - 1:
        tags.add_warning(f"HighBit is {high} though BitsStored is {stored}; HighBit is ignored")
    signed = tags.integer("PixelRepresentation")
    if signed not in (0, 1):
        tags.add_warning(
            f"PixelRepresentation is {'missing' if signed is None else signed}; unsigned pixels are assumed"
        )
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
    )


def require_positive_integer(tags: TagReader, keyword: str) -> int:
    """A positive whole number without which no pixel can be read. Raises ImageRefusedError."""
    value = tags.integer(keyword)
    if value is None or value < 1:
        raise ImageRefusedError("bad_header", f"{keyword} is {'missing' if value is None else value}")
    return value


def has_overlay_bits(dataset: Dataset) -> bool:
    """Whether an overlay plane without data of its own lies in the pixels' high bits (PS3.3 C.9.2 of 2004, retired)."""
    return any((group, 0x0102) in dataset and (group, 0x3000) not in dataset for group in range(0x6000, 0x6020, 2))


def read_header(tags: TagReader, pixel_format: PixelFormat, voi: str, warnings: list[ImageWarning]) -> ImageHeader:
    """What the file says about its image; optional tags that are absent or strange stay unknown."""
    if tags.code("LossyImageCompression") == "01" or pixel_format.syntax in (
        uid.JPEGBaseline8Bit,
        uid.JPEGExtended12Bit,
    ):
        tags.add_warning(f"lossy compression, ratio {tags.text('LossyImageCompressionRatio') or 'unknown'}", "lossy")
    side = tags.code("ImageLaterality") or tags.code("Laterality")
    machine = next(filter(None, map(tags.text, ("DeviceSerialNumber", "StationName", "ManufacturerModelName"))), "")
    return ImageHeader(
        rows=pixel_format.rows,
        columns=pixel_format.columns,
        bits=pixel_format.bits_stored,
        photometric=pixel_format.photometric,
        transfer_syntax=pixel_format.syntax,
        voi=voi,
        patient_id=tags.text("PatientID"),
        image_id=tags.text("SOPInstanceUID"),
        laterality=side if side in ("L", "R") else "",
        view=read_view(tags),
        machine_id=machine,
        implant={"YES": 1, "NO": 0}.get(tags.code("BreastImplantPresent")),
        age=read_age(tags),
        spacing=read_spacing(tags),
        warnings=tuple(warnings),
    )


def read_view(tags: TagReader) -> str:
    """The view by ViewPosition or, failing that, ViewCodeSequence; its modifiers (magnification, rolled, ...) do not count."""
    view = tags.code("ViewPosition")
    if view in BREAST_VIEWS:
        return view
    return next(
        (
            VIEW_OF_CODE[code]
            for item in tags.items("ViewCodeSequence")
            if (code := item.code("CodeValue")) in VIEW_OF_CODE
        ),
        "",
    )


def read_age(tags: TagReader) -> float | None:
    """PatientAge in years."""
    match = re.fullmatch(r"(\d{1,3})([YMWD])", tags.code("PatientAge"))
    if not match or not int(match[1]):  # de-identification writes 000Y
        return None
    return int(match[1]) / {"Y": 1, "M": 12, "W": 52.18, "D": 365.25}[match[2]]


def read_spacing(tags: TagReader) -> tuple[float, float] | None:
    """The distance of pixel centres, row and column, in mm: at the detector, divided by the magnification, else as calibrated."""
    spacing = tags.numbers("ImagerPixelSpacing")
    magnification = tags.number("EstimatedRadiographicMagnificationFactor") or 1.0
    if len(spacing) != 2:
        spacing, magnification = tags.numbers("PixelSpacing"), 1.0
    if len(spacing) != 2 or min(*spacing, magnification) <= 0:
        return None
    return spacing[0] / magnification, spacing[1] / magnification
