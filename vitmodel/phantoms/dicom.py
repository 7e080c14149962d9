"""Encoding of a synthetic mammogram as DICOM: Digital Mammography X-Ray Image Storage, for presentation.

The object follows DICOM PS3.3 A.27 (module table) and C.8.11 (DX and mammography modules).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import imagecodecs
import numpy as np
from pydicom import Dataset, FileDataset, Sequence, dcmread, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    MPEG2MPML,
    UID,
    DigitalMammographyXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    RLELossless,
)
from rle.utils import encode_pixel_data

from vitmodel.phantoms.style import VendorStyle
from vitmodel.utils import derive_seed

SIGMOID_WINDOW = (1802.0, 1092.0)  # centre and width of site 2's first SIGMOID window
MANUFACTURER = "vitmodel synthetic"
VIEW_CODES = {"CC": ("399162004", "cranio-caudal"), "MLO": ("399368009", "medio-lateral oblique")}


@dataclass(frozen=True)
class Machine:
    """A mammography unit: its site, its file format and its vendor style."""

    machine_id: int
    site: int
    """1 writes MONOCHROME2 with 12 bits and a linear window, 2 MONOCHROME1 with 16 bits and SIGMOID windows."""
    transfer_syntax: UID
    style: VendorStyle
    writes_mirrored: bool = False
    """Whether some patients' images are written mirrored."""


MACHINES = (
    Machine(49, 1, JPEGLosslessSV1, VendorStyle(0.45, 1.1, 0.004, 0.0, "text", 0.1), writes_mirrored=True),
    Machine(29, 2, JPEG2000Lossless, VendorStyle(0.5, 1.3, 0.006, 0.0, "none", collimation_mm=3)),
    Machine(216, 1, RLELossless, VendorStyle(0.38, 0.9, 0.012, 0.03, "lead", 0.05)),
    Machine(49, 1, JPEGLosslessSV1, VendorStyle(0.45, 1.1, 0.004, 0.0, "text", 0.1), writes_mirrored=True),
    Machine(48, 2, JPEG2000Lossless, VendorStyle(0.42, 1.6, 0.009, 0.015, "lead", 0.04)),
    Machine(170, 1, JPEGLosslessSV1, VendorStyle(0.55, 1.5, 0.008, 0.02, "text", 0.85, collimation_mm=2)),
    Machine(21, 2, JPEG2000Lossless, VendorStyle(0.55, 1.0, 0.005, 0.0, "text", 0.06)),
)
"""Patients are assigned to these in turn; machine 49 is listed twice and images twice as many as any other."""


@dataclass(frozen=True)
class AcquisitionInfo:
    """Header values of one image."""

    patient_id: int
    image_id: int
    laterality: str
    view: str
    age: int | None
    implant: bool
    thickness_mm: float
    spacing: float
    """Millimetres per pixel."""
    chest_wall: str
    """Side of the image, L or R, at which the chest wall lies; equal to `laterality` unless the image is mirrored."""


def encode_dicom(picture: np.ndarray, exposure: AcquisitionInfo, machine: Machine) -> bytes:
    """Return an image encoded as a DICOM file. The same arguments give the same bytes.

    Args:
        picture: `(H, W)` float in [0, 1], brighter = denser.
        exposure: Header values of the image.
        machine: The unit whose file format is used.
    """
    file = _header(exposure, machine)
    _set_grey_attributes(file, machine)
    stored = _to_stored_values(picture, machine)
    file.Rows, file.Columns = stored.shape
    file.SamplesPerPixel = 1
    file.PixelRepresentation = 0
    file.BitsAllocated = 16
    file.BitsStored = 12 if machine.site == 1 else 16
    file.HighBit = file.BitsStored - 1
    file.PixelData = encapsulate([_compress(stored, machine.transfer_syntax, file.BitsStored)])
    file["PixelData"].VR = "OB"
    return _to_bytes(file)


def _compress(stored: np.ndarray, transfer_syntax: UID, bits: int) -> bytes:
    if transfer_syntax == JPEG2000Lossless:
        return bytes(
            imagecodecs.jpeg2k_encode(stored, level=0, reversible=True, codecformat="j2k", resolutions=6, numthreads=1)
        )
    if transfer_syntax == JPEGLosslessSV1:
        return bytes(imagecodecs.jpeg8_encode(stored, lossless=True, predictor=1, bitspersample=bits))
    rows, columns = stored.shape
    layout = {"rows": rows, "columns": columns, "samples_per_pixel": 1, "bits_allocated": 16, "number_of_frames": 1}
    return bytes(encode_pixel_data(stored.astype("<u2").tobytes(), **layout, byteorder="<"))


def _to_bytes(file: Dataset) -> bytes:
    buffer = io.BytesIO()
    dcmwrite(buffer, file, enforce_file_format=True)
    return buffer.getvalue()


def _set_grey_attributes(file: Dataset, machine: Machine) -> None:
    """Set the attributes by which a viewer converts the stored values to grey values."""
    file.RescaleIntercept = "0"
    file.RescaleSlope = "1"
    file.RescaleType = "US"
    file.PixelIntensityRelationship = "LOG"
    file.PixelPaddingValue = int(_to_stored_values(np.zeros((1, 1)), machine)[0, 0])
    if machine.site == 1:
        file.PhotometricInterpretation = "MONOCHROME2"
        file.PresentationLUTShape = "IDENTITY"
        file.PixelIntensityRelationshipSign = -1
        file.WindowCenter = "2048"
        file.WindowWidth = "4096"
        return
    centre, width = SIGMOID_WINDOW
    file.PhotometricInterpretation = "MONOCHROME1"
    file.PresentationLUTShape = "INVERSE"
    file.PixelIntensityRelationshipSign = 1
    file.VOILUTFunction = "SIGMOID"
    file.WindowCenter = [str(centre), str(centre + 0.2 * width), str(centre - 0.2 * width)]
    file.WindowWidth = [str(width)] * 3
    file.WindowCenterWidthExplanation = ["NORMAL", "BRIGHTER", "DARKER"]


def _to_stored_values(picture: np.ndarray, machine: Machine) -> np.ndarray:
    """Return the stored values `(H, W)` uint16 that the machine's window displays as `picture`."""
    if machine.site == 1:
        return np.round(picture * 4095).astype(np.uint16)
    centre, width = SIGMOID_WINDOW
    displayed = np.clip(1 - picture, 0.004, 0.996)  # MONOCHROME1: high = dark; the inverse of PS3.3 C.11.2.1.3.1
    return np.round(centre - width / 4 * np.log(1 / displayed - 1)).astype(np.uint16)


def _uid(*parts: object) -> UID:
    return UID(f"2.25.{derive_seed(MANUFACTURER, *parts)}")


def _code(value: str, meaning: str, scheme: str = "SCT") -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, meaning
    return code


def _header(exposure: AcquisitionInfo, machine: Machine) -> FileDataset:
    """Return a data set with all attributes except those of the pixels."""
    patient = exposure.patient_id
    side = exposure.laterality
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalMammographyXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = _uid("image", patient, exposure.image_id)
    meta.TransferSyntaxUID = machine.transfer_syntax
    meta.ImplementationClassUID = _uid("implementation")
    file = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    # patient, study, series, equipment
    file.PatientName, file.PatientID = f"Synthetic^{patient}", str(patient)
    file.PatientBirthDate, file.PatientSex = "", "F"
    if exposure.age is not None:
        file.PatientAge = f"{exposure.age:03d}Y"
    file.StudyInstanceUID, file.SeriesInstanceUID = _uid("study", patient), _uid("series", patient)
    file.FrameOfReferenceUID, file.PositionReferenceIndicator = _uid("frame", patient), ""
    file.StudyDate = file.StudyTime = file.AccessionNumber = file.ReferringPhysicianName = ""
    file.StudyID, file.SeriesNumber, file.InstanceNumber = "1", "1", str(exposure.image_id)
    file.Modality, file.PresentationIntentType = "MG", "FOR PRESENTATION"
    file.Manufacturer, file.ManufacturerModelName = MANUFACTURER, f"phantom unit {machine.machine_id}"
    file.DeviceSerialNumber, file.SoftwareVersions = str(machine.machine_id), "1"
    # image
    file.ImageType = ["DERIVED", "PRIMARY"]
    file.ContentDate = file.ContentTime = ""
    file.PatientOrientation = _orientation(exposure)
    file.BurnedInAnnotation = "NO"  # the marker contains nothing that identifies a person
    file.LossyImageCompression = "00"
    file.AcquisitionContextSequence = Sequence()
    # anatomy, detector, position
    file.ImageLaterality, file.OrganExposed, file.BodyPartExamined = side, "BREAST", "BREAST"
    file.AnatomicRegionSequence = Sequence([_code("76752008", "Breast")])
    file.DetectorType, file.DetectorConfiguration, file.DetectorID = "DIRECT", "AREA", str(machine.machine_id)
    file.DetectorTemperature = "25"
    file.ImagerPixelSpacing = file.DetectorElementSpacing = [f"{exposure.spacing:.6g}"] * 2
    file.PositionerType, file.ViewPosition = "MAMMOGRAPHIC", exposure.view
    file.PositionerPrimaryAngle = "0" if exposure.view == "CC" else "45"
    view = _code(*VIEW_CODES[exposure.view])
    view.ViewModifierCodeSequence = Sequence()
    file.ViewCodeSequence = Sequence([view])
    file.BreastImplantPresent, file.PartialView = "YES" if exposure.implant else "NO", "NO"
    file.KVP, file.BodyPartThickness, file.CompressionForce = "29", f"{exposure.thickness_mm:.0f}", "90"
    return file


def _orientation(exposure: AcquisitionInfo) -> list[str]:
    """Return the directions of the rows and columns (PS3.3 C.7.6.1.1.1).

    Rows point to the nipple or away from it, columns to the midline (CC) or to the feet and the midline (MLO).
    """
    medial = "LR"[exposure.laterality == "L"]
    return ["A" if exposure.chest_wall == "L" else "P", medial if exposure.view == "CC" else "F" + medial]


def _blank(content: bytes) -> bytes:
    """Return the file with a constant image."""
    file = dcmread(io.BytesIO(content))
    stored = np.full((file.Rows, file.Columns), 100, np.uint16)
    file.file_meta.TransferSyntaxUID, file.PixelData = ExplicitVRLittleEndian, stored.tobytes()
    file["PixelData"].VR, file["PixelData"].is_undefined_length = "OW", False
    return _to_bytes(file)


def _no_pixels(content: bytes) -> bytes:
    """Return the file without pixel data."""
    file = dcmread(io.BytesIO(content))
    del file.PixelData
    return _to_bytes(file)


def _unknown_codec(content: bytes) -> bytes:
    """Return the file with the transfer syntax of a video."""
    file = dcmread(io.BytesIO(content))
    file.file_meta.TransferSyntaxUID = MPEG2MPML
    return _to_bytes(file)


FAULTS: dict[str, Callable[[bytes], bytes | None]] = {
    "truncated": lambda content: content[: len(content) * 6 // 10],
    "text": lambda content: b"This is a text file whose name ends in .dcm\n",
    "missing": lambda content: None,
    "blank": _blank,
    "no_pixels": _no_pixels,
    "unreadable_transfer_syntax": _unknown_codec,
}
"""By name, functions that map the content of a good file to that of a broken one; None = no file is written."""
