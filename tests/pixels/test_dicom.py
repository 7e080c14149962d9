"""Tests of DICOM and picture files: grey values against highdicom, headers, and refusals with their reasons."""

from __future__ import annotations

import csv
import hashlib
import random
import struct
from pathlib import Path
from typing import Any

import cv2
import highdicom
import imagecodecs
import numpy as np
import pytest
from pydicom import Dataset, FileMetaDataset, dcmread, uid
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_voi_lut
from pydicom.sr.codedict import Code, codes

from vitmodel.errors import ImageRefusedError
from vitmodel.pixels.dicom import DicomFile
from vitmodel.pixels.open import open_image
from vitmodel.pixels.raster import RasterFile
from vitmodel.pixels.side_and_view import VIEW_CODES

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")  # pydicom warns about the broken files made here

MG = "1.2.840.10008.5.1.4.1.1.1.2"


def ramp(low: int = 0, high: int = 4095, dtype: str = "u2") -> np.ndarray:
    """Return ascending values from `low` to `high`, `(40, 52)`."""
    return np.linspace(low, high, 40 * 52).round().astype(dtype).reshape(40, 52)


def lut(first: int, entries: list[int], bits: int, **tags: Any) -> Dataset:
    """Return an item of a LUT sequence."""
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(entries), first, bits])
    item.add_new("LUTData", "OW", struct.pack(f"<{len(entries)}H", *entries))
    for keyword, value in tags.items():
        setattr(item, keyword, value)
    return item


def write_dicom(
    path: Path, pixels: np.ndarray | None = None, syntax: str = uid.ExplicitVRLittleEndian, **tags: Any
) -> Path:
    """Write a small mammogram with 12 of 16 bits and return its path; `tags` are set, or removed if they are None."""
    pixels = ramp() if pixels is None else pixels
    ds = Dataset()
    ds.SOPClassUID = MG
    ds.SOPInstanceUID = "1.2.3"
    ds.StudyInstanceUID = "1.2.4"
    ds.SeriesInstanceUID = "1.2.5"
    ds.PatientID = "anna"
    ds.Modality = "MG"
    ds.ImageLaterality = "L"
    ds.ViewPosition = "CC"
    ds.PresentationIntentType = "FOR PRESENTATION"
    ds.Rows, ds.Columns = pixels.shape[:2]
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.BitsAllocated = 8 * pixels.itemsize
    ds.BitsStored = min(12, ds.BitsAllocated)
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    little = syntax != uid.ExplicitVRBigEndian
    ds.PixelData = pixels.astype(pixels.dtype.newbyteorder("<" if little else ">")).tobytes()
    ds["PixelData"].VR = "OW"
    for keyword, value in tags.items():
        if value is None:
            del ds[keyword]
        elif isinstance(value, tuple):  # (value representation, value)
            ds.add_new(keyword, *value)
        else:
            setattr(ds, keyword, value)
    if "HighBit" not in tags and "BitsStored" in ds:
        ds.HighBit = ds.BitsStored - 1
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = uid.UID(syntax)
    ds.save_as(path, enforce_file_format=True)
    return path


def read_grey(path: Path, **options: Any) -> np.ndarray:
    """Return the grey values of a DICOM file."""
    file = DicomFile(path, **options)
    return file.to_grey(file.read_stored())


def read_grey_with_highdicom(dataset: Dataset) -> np.ndarray:
    """Return grey values in [0, 1] by highdicom, with the first window or LUT and the presentation."""
    # highdicom's Image folds the slope into the window, which is wrong for the "width - 1" of LINEAR.
    if float(dataset.get("RescaleSlope", 1)) != 1:
        values = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
        return highdicom.pixels.apply_voi_window(
            values, dataset.WindowCenter, dataset.WindowWidth, dataset.get("VOILUTFunction", "LINEAR")
        )
    image = highdicom.Image.from_dataset(dataset, copy=False)
    return image.get_frame(1, apply_voi_transform=True, apply_presentation_lut=True, dtype=np.float64)


WINDOW: dict[str, Any] = {"WindowCenter": 2000, "WindowWidth": 1500}
CURVE = [int(65535 * (index / 999) ** 2) for index in range(1000)]
VALUE_CASES: dict[str, dict[str, Any]] = {
    "linear": WINDOW,
    "linear, width 1": {"WindowCenter": 2000, "WindowWidth": 1},
    "linear exact": {**WINDOW, "VOILUTFunction": "LINEAR_EXACT"},
    "linear exact, narrow": {"WindowCenter": 2000, "WindowWidth": 0.5, "VOILUTFunction": "LINEAR_EXACT"},
    "sigmoid": {**WINDOW, "VOILUTFunction": "SIGMOID"},
    "several windows": {"WindowCenter": [2000, 100], "WindowWidth": [1500, 7]},
    "rescale": {**WINDOW, "RescaleSlope": 1.5, "RescaleIntercept": -300},
    "falling rescale": {**WINDOW, "RescaleSlope": -1, "RescaleIntercept": 4095},
    "signed": {"pixels": ramp(-2048, 2047, "i2"), "WindowCenter": 0, "WindowWidth": 3000},
    "MONOCHROME1": {**WINDOW, "PhotometricInterpretation": "MONOCHROME1"},
    "MONOCHROME1, INVERSE": {**WINDOW, "PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"},
    "MONOCHROME2, INVERSE": {**WINDOW, "PresentationLUTShape": "INVERSE"},
    "8 bits": {"pixels": ramp(0, 255, "u1"), "WindowCenter": 100, "WindowWidth": 90},
    "VOI LUT": {"VOILUTSequence": [lut(500, CURVE, 16)]},
    "VOI LUT, signed": {"pixels": ramp(-2048, 2047, "i2"), "VOILUTSequence": [lut(-500, CURVE, 16)]},
    "VOI LUT before windows": {"VOILUTSequence": [lut(500, CURVE, 16), lut(0, CURVE, 16)]},
    "modality LUT": {
        "ModalityLUTSequence": [lut(0, CURVE, 16, ModalityLUTType="US")],
        "WindowCenter": 30000,
        "WindowWidth": 40000,
    },
    "implicit": {**WINDOW, "syntax": uid.ImplicitVRLittleEndian},
    "deflated": {**WINDOW, "syntax": uid.DeflatedExplicitVRLittleEndian},
}


@pytest.mark.parametrize("tags", VALUE_CASES.values(), ids=VALUE_CASES)
def test_grey_values_equal_those_of_highdicom(tmp_path: Path, tags: dict[str, Any]) -> None:
    path = write_dicom(tmp_path / "a.dcm", **tags)
    grey = read_grey(path)
    assert grey.dtype == np.float32
    assert np.ptp(grey) > 0.4
    np.testing.assert_allclose(grey, read_grey_with_highdicom(dcmread(path)), atol=1e-6)


@pytest.mark.parametrize("dtype", ["u1", "u2", "i2"])
def test_big_endian_files_have_the_same_values(tmp_path: Path, dtype: str) -> None:
    pixels = ramp(0, 255 if dtype == "u1" else 2047, dtype)
    stored = pixels
    if dtype == "u1":  # bytes are stored in words of 16 bits
        stored = pixels.view("u2").byteswap().view("u1")
    file = DicomFile(write_dicom(tmp_path / "a.dcm", stored, uid.ExplicitVRBigEndian))
    np.testing.assert_array_equal(file.read_stored(), pixels)


def test_real_files_have_the_hashes_of_two_decoders_and_the_grey_values_of_highdicom(shared_data: Path) -> None:
    for row in read_csv(shared_data / "rsna_dicom" / "rsna_dicom.csv"):
        path = shared_data / "rsna_dicom" / row["image_path"]
        file = DicomFile(path)
        stored = file.read_stored()
        assert hashlib.sha256(stored.tobytes()).hexdigest() == row["pixel_sha256"]
        assert (file.decoder, file.levels) == ("openjpeg", 5)
        identity = file.header.identity
        assert (identity.patient_id, identity.laterality) == (row["patient_id"], row["laterality"])
        assert_same_grey(file, stored, dcmread(path))


@pytest.mark.parametrize("name", ["mg_nema_mg1_j2k_lossy", "mg_sop_not_a_mammogram", "mg_ge_voilutseq_sigmoid_jpegll"])
def test_edge_files_have_the_grey_values_of_highdicom(shared_data: Path, name: str) -> None:
    path = shared_data / "dicom_edge" / "dicom" / f"{name}.dcm"
    file = DicomFile(path)
    assert_same_grey(file, file.read_stored(), dcmread(path))


def assert_same_grey(file: DicomFile, stored: np.ndarray, dataset: Dataset) -> None:
    """Compare every 6th pixel with highdicom, except padding, which highdicom displays.

    highdicom refuses 12-bit LUTs, which PS3.3 C.11.2.1.1 allows; they are compared with pydicom.
    """
    sample = np.ascontiguousarray(stored[::6, ::6])
    tissue = ~file.display.is_padding(sample)
    if "VOILUTSequence" in dataset:
        expected = apply_voi_lut(sample, dataset) / 4095
    else:
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID
        dataset.Rows, dataset.Columns = sample.shape
        dataset.PixelData = sample.tobytes()
        dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        expected = read_grey_with_highdicom(dataset)
    np.testing.assert_allclose(file.to_grey(sample)[tissue], expected[tissue], atol=1e-6)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


EDGE_VERDICTS = {
    "mg_ge_voilutseq_sigmoid_jpegll": set[str](),
    "mg_nema_mg1_j2k_lossy": {"unknown_modality", "lossy"},
    "mg_nema_mg1_jpegext12_undecodable": {"unknown_modality", "lossy"},  # libjpeg-turbo decodes it
    "mg_sop_not_a_mammogram": {"special_view"},  # its magnification is above 1.3; cropping finds no breast
    "dbt_multiframe_header_noise_pixels": "multi_frame",
    "other_voi_lut_seq": "not_mammography",
    "other_rg2_jpegls_lossless": "not_mammography",
    "other_rg2_jpegll": "not_mammography",
    "other_rle": "not_mammography",
}


@pytest.mark.parametrize(("name", "verdict"), EDGE_VERDICTS.items(), ids=EDGE_VERDICTS)
def test_edge_files_are_read_or_refused_with_a_reason(shared_data: Path, name: str, verdict: set[str] | str) -> None:
    path = shared_data / "dicom_edge" / "dicom" / f"{name}.dcm"
    if isinstance(verdict, str):
        with pytest.raises(ImageRefusedError) as caught:
            open_image(path)
        assert caught.value.code == verdict
        return
    file = open_image(path)
    assert file.to_grey(file.read_stored()).max() > 0.9
    assert {warning.code for warning in file.header.warnings} == verdict


def test_12_bit_jpeg_has_the_pixels_of_the_same_film_in_jpeg_2000(shared_data: Path) -> None:
    folder = shared_data / "dicom_edge" / "dicom"
    jpeg2000 = DicomFile(folder / "mg_nema_mg1_j2k_lossy.dcm").read_stored()[::8, ::8].astype(float)
    jpeg = DicomFile(folder / "mg_nema_mg1_jpegext12_undecodable.dcm").read_stored()[::8, ::8].astype(float)
    assert np.abs(jpeg2000 - jpeg).mean() < 0.01 * np.ptp(jpeg2000)


def test_padding_is_black(tmp_path: Path) -> None:
    pixels = ramp(100, 4000)
    pixels[:5] = 3000
    pixels[5:8] = 3004
    path = write_dicom(tmp_path / "a.dcm", pixels, PixelPaddingValue=3000, PixelPaddingRangeLimit=3004, **WINDOW)
    file = DicomFile(path)
    assert not file.to_grey(file.read_stored())[:8].any()
    averages = cv2.resize(file.read_stored(), (13, 10), interpolation=cv2.INTER_AREA)
    assert file.to_grey(averages)[:2].max() < 0.01  # bright padding does not bleed into the averages


def test_bright_padding_is_black_without_a_voi(tmp_path: Path) -> None:
    pixels = ramp(100, 4000)
    pixels[:5] = 0
    file = DicomFile(
        write_dicom(tmp_path / "a.dcm", pixels, PixelPaddingValue=0, PhotometricInterpretation="MONOCHROME1")
    )
    assert file.to_grey(file.read_stored())[:5].max() == 0
    assert file.to_grey(cv2.resize(file.read_stored(), (13, 10), interpolation=cv2.INTER_AREA))[:1].max() < 0.01


def test_padding_of_a_signed_image_may_be_written_as_unsigned(tmp_path: Path) -> None:
    pixels = ramp(-1000, 1000, "i2")
    pixels[:3] = -2000
    path = write_dicom(tmp_path / "a.dcm", pixels, PixelPaddingValue=("US", 65536 - 2000))
    grey = read_grey(path)
    assert not grey[:3].any()
    assert (grey.min(), grey.max()) == (0, 1)


def test_tissue_spans_the_whole_range_without_a_voi(tmp_path: Path) -> None:
    pixels = ramp(700, 1900)
    pixels[:2] = 0
    file = DicomFile(write_dicom(tmp_path / "a.dcm", pixels, PixelPaddingValue=0))
    expected = (pixels[2:] - pixels[2:].min()) / np.ptp(pixels[2:])
    np.testing.assert_allclose(file.to_grey(file.read_stored())[2:], expected, atol=1e-6)
    assert file.header.voi == "range"
    part = np.s_[20:25, 7:9]
    np.testing.assert_allclose(file.to_grey(pixels[part]), file.to_grey(pixels)[part])  # any part has the same grey


def test_averages_are_interpolated_between_whole_values(tmp_path: Path) -> None:
    file = DicomFile(write_dicom(tmp_path / "a.dcm", **WINDOW, VOILUTFunction="SIGMOID"))
    whole = np.array([[1999, 2000]], np.uint16)
    np.testing.assert_array_equal(file.to_grey(whole.astype(np.float32)), file.to_grey(whole))
    np.testing.assert_allclose(file.to_grey(np.array([[1999.25]])), file.to_grey(whole) @ [[0.75], [0.25]], rtol=1e-6)
    assert file.to_grey(np.array([[-7.0, 1e9]])).tolist() == file.to_grey(np.array([[0, 65535]], np.uint16)).tolist()


def test_raw_detector_data_is_refused_or_shown_as_inverted_logarithm(tmp_path: Path) -> None:
    pixels = ramp(10, 4000)
    path = write_dicom(
        tmp_path / "a.dcm", pixels, PresentationIntentType="FOR PROCESSING", PixelIntensityRelationship="LIN"
    )
    assert refusal(path).code == "for_processing"
    np.testing.assert_allclose(read_grey(path, for_processing="log"), 1 - np.log(pixels / 10) / np.log(400), atol=1e-6)


def test_one_of_several_vois_is_chosen_and_recorded(tmp_path: Path) -> None:
    windows = write_dicom(tmp_path / "a.dcm", WindowCenter=[2000, 100], WindowWidth=[1500, 7])
    second = DicomFile(windows, voi=2)
    assert DicomFile(windows).header.voi == "linear 2000/1500 1/2"
    assert second.header.voi == "linear 100/7 2/2"
    expected = read_grey(write_dicom(tmp_path / "b.dcm", WindowCenter=100, WindowWidth=7))
    np.testing.assert_array_equal(second.to_grey(second.read_stored()), expected)
    luts = [lut(0, CURVE, 16, LUTExplanation="NORMAL"), lut(0, CURVE[::-1], 16, LUTExplanation="HARDER")]
    assert DicomFile(write_dicom(tmp_path / "c.dcm", VOILUTSequence=luts), voi=2).header.voi == "lut 2/2 HARDER"
    absent = DicomFile(windows, voi=3)
    assert absent.header.voi == "linear 2000/1500 1/2"
    assert [warning.code for warning in absent.header.warnings] == ["assumed_values"]


def test_overlays_do_not_change_the_pixels(tmp_path: Path) -> None:
    """A separate overlay plane is ignored; a plane in the unused high bits (retired in 2004) is masked out."""
    pixels = ramp()
    separate = DicomFile(add_overlay(write_dicom(tmp_path / "a.dcm", pixels), in_pixels=False))
    np.testing.assert_array_equal(separate.read_stored(), pixels)
    drawn = pixels.copy()
    drawn[3:9, 4:30] |= 0x8000
    in_pixels = DicomFile(add_overlay(write_dicom(tmp_path / "b.dcm", drawn), in_pixels=True))
    np.testing.assert_array_equal(in_pixels.read_stored(), pixels)
    assert in_pixels.header.warnings == ()


def add_overlay(path: Path, in_pixels: bool) -> Path:
    """Add an overlay plane in the unused high bits of the pixels, or with a data element of its own."""
    ds = dcmread(path)
    ds.add_new(0x60000010, "US", 40)  # Overlay Rows
    ds.add_new(0x60000011, "US", 52)  # Overlay Columns
    ds.add_new(0x60000040, "CS", "G")  # Overlay Type
    ds.add_new(0x60000050, "SS", [1, 1])  # Overlay Origin
    ds.add_new(0x60000100, "US", 16 if in_pixels else 1)  # Overlay Bits Allocated
    ds.add_new(0x60000102, "US", 15 if in_pixels else 0)  # Overlay Bit Position
    if not in_pixels:
        ds.add_new(0x60003000, "OW", b"\xff" * 260)  # Overlay Data
    ds.save_as(path)
    return path


def test_a_presentation_lut_and_an_8_bit_lut_in_words_are_applied(tmp_path: Path) -> None:
    square = lut(0, [round(65535 * (index / 255) ** 2) for index in range(256)], 16)
    path = write_dicom(
        tmp_path / "a.dcm", ramp(0, 255, "u1"), WindowCenter=128, WindowWidth=256, PresentationLUTSequence=[square]
    )
    np.testing.assert_allclose(read_grey(path), (ramp(0, 255) / 255) ** 2, atol=1e-4)
    packed = lut(0, [0], 8)
    packed.LUTDescriptor = [256, 0, 8]
    packed.LUTData = bytes(range(255, -1, -1))
    path = write_dicom(tmp_path / "b.dcm", ramp(0, 255, "u1"), VOILUTSequence=[packed])
    np.testing.assert_allclose(read_grey(path), 1 - ramp(0, 255) / 255, atol=1e-6)


def refusal(path: Path) -> ImageRefusedError:
    """Return the error with which an image is refused."""
    with pytest.raises(ImageRefusedError) as caught:
        open_image(path).read_stored()
    return caught.value


@pytest.mark.parametrize(
    ("tags", "code", "named"),
    [
        ({"NumberOfFrames": 2}, "multi_frame", "2"),
        ({"ImageType": ["DERIVED", "PRIMARY", "TOMOSYNTHESIS", "NONE"]}, "multi_frame", "slice"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "colour", "PALETTE"),
        ({"PhotometricInterpretation": "HSV", "SamplesPerPixel": 3}, "colour", "HSV"),
        ({"Rows": None}, "bad_header", "Rows"),
        ({"BitsAllocated": None}, "bad_header", "BitsAllocated"),
        ({"BitsAllocated": 32}, "bad_header", "32"),
        ({"Rows": 65535, "Columns": 65535}, "too_large", "65535"),
        ({"Rows": 41}, "unreadable", "bytes"),
        ({"PixelData": None}, "no_pixels", "pixel"),
        ({"Modality": "CT", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"}, "not_mammography", "CT"),
        (
            {"Modality": "DX", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.1", "ViewPosition": "AP"},
            "not_mammography",
            "DX",
        ),
        ({"Modality": "PR", "Rows": None, "Columns": None}, "no_pixels", "PR"),
        ({"syntax": "1.2.840.10008.1.2.4.100", "PixelData": encapsulate([b"\0\0"])}, "undecodable", "MPEG2"),
    ],
)
def test_a_refusal_names_the_cause(tmp_path: Path, tags: dict[str, Any], code: str, named: str) -> None:
    error = refusal(write_dicom(tmp_path / "a.dcm", **tags))
    assert error.code == code
    assert named in error.message


def test_a_synthetic_2d_image_of_a_tomosynthesis_is_a_mammogram(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", ImageType=["DERIVED", "PRIMARY", "TOMOSYNTHESIS", "GENERATED_2D"])
    assert DicomFile(path).header.identity.view == "CC"


@pytest.mark.parametrize(
    ("tags", "named"),
    [
        ({"BitsStored": None}, "BitsStored"),
        ({"BitsStored": 10}, "BitsStored"),
        ({"HighBit": 15}, "HighBit"),
        ({"PixelRepresentation": None}, "PixelRepresentation"),
        ({"PhotometricInterpretation": None}, "PhotometricInterpretation"),
        ({"RescaleSlope": 0}, "RescaleSlope"),
        ({"WindowCenter": [2048, 2], "WindowWidth": 4096}, "WindowCenter"),
        ({"WindowCenter": 1, "WindowWidth": 0}, "WindowWidth"),
        ({**WINDOW, "VOILUTFunction": "CURVED"}, "VOILUTFunction"),
        ({**WINDOW, "PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "IDENTITY"}, "IDENTITY"),
    ],
)
def test_invalid_tags_add_a_warning_that_names_them(tmp_path: Path, tags: dict[str, Any], named: str) -> None:
    file = DicomFile(write_dicom(tmp_path / "a.dcm", **tags))
    grey = file.to_grey(file.read_stored())
    assert np.ptp(grey) > 0.9
    [warning] = file.header.warnings
    assert warning.code == "assumed_values"
    assert named in warning.message


def test_a_valid_file_has_no_warnings(tmp_path: Path) -> None:
    file = DicomFile(write_dicom(tmp_path / "a.dcm", **WINDOW))
    file.read_stored()
    assert file.header.warnings == ()


def test_the_header_is_read(tmp_path: Path) -> None:
    code = Dataset()
    code.CodeValue = "R-10226"
    code.CodingSchemeDesignator = "SRT"
    code.CodeMeaning = "medio-lateral oblique"
    tags: dict[str, Any] = {
        "PatientAge": "061Y",
        "BreastImplantPresent": "YES",
        "StationName": "ROOM1",
        "ImageLaterality": None,
        "Laterality": "R",
    }
    tags |= {"ImagerPixelSpacing": [0.1, 0.12], "EstimatedRadiographicMagnificationFactor": 2, "PixelSpacing": [9, 9]}
    header = DicomFile(write_dicom(tmp_path / "a.dcm", ViewPosition=None, ViewCodeSequence=[code], **tags)).header
    assert (header.identity.laterality, header.identity.view) == ("R", "MLO")
    assert (header.identity.machine_id, header.identity.implant, header.identity.age) == ("ROOM1", 1, 61)
    assert header.spacing == (0.05, 0.06)
    assert (header.rows, header.columns, header.bits) == (40, 52, 12)
    assert (header.identity.patient_id, header.identity.image_id) == ("anna", "1.2.3")


def test_missing_tags_are_unknown(tmp_path: Path) -> None:
    missing: dict[str, Any] = dict.fromkeys(("ImageLaterality", "ViewPosition", "PatientID"))
    header = DicomFile(write_dicom(tmp_path / "a.dcm", PatientAge="000Y", **missing)).header
    assert (header.identity.laterality, header.identity.view, header.identity.patient_id) == ("", "", "")
    assert (header.identity.age, header.identity.implant, header.spacing) == (None, None, None)


def test_view_codes_are_those_of_the_standard() -> None:
    for snomed, srt in VIEW_CODES.values():
        assert Code(srt, "SRT", "") == Code(snomed, "SCT", "")
    names = {
        "CC": "CranioCaudal",
        "LM": "LateroMedial",
        "LMO": "LateroMedialOblique",
        "XCCL": "CranioCaudalExaggeratedLaterally",
    }
    for view, name in names.items():
        assert getattr(codes.SCT, name).value == VIEW_CODES[view][0]


def test_a_reduced_level_shows_the_same_image(tmp_path: Path) -> None:
    pixels = ramp().repeat(4, 0).repeat(4, 1)
    frame = imagecodecs.jpeg2k_encode(pixels, codecformat="j2k", bitspersample=12, reversible=True)
    path = write_dicom(
        tmp_path / "a.dcm", pixels, uid.JPEG2000Lossless, PixelData=encapsulate([bytes(frame)]), **WINDOW
    )
    file = DicomFile(path)
    assert file.levels == 4
    assert file.read_stored(2).shape == (40, 52)
    assert np.abs(file.to_grey(file.read_stored(2)) - file.to_grey(file.read_stored())[::4, ::4]).mean() < 0.02
    with pytest.raises(ValueError, match="level"):
        file.read_stored(5)


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.JPEG2000Lossless])
def test_a_truncated_file_is_refused(tmp_path: Path, syntax: str) -> None:
    frame = imagecodecs.jpeg2k_encode(ramp(), codecformat="j2k", bitspersample=12, reversible=True)
    tags: dict[str, Any] = {"PixelData": encapsulate([bytes(frame)])} if syntax == uid.JPEG2000Lossless else {}
    path = write_dicom(tmp_path / "a.dcm", None, syntax, **tags)
    whole = path.read_bytes()
    start = whole.index(b"\xe0\x7f\x10\0")
    for fraction in (0.05, 0.5, 0.9):
        path.write_bytes(whole[: start + int(fraction * (len(whole) - start))])
        assert refusal(path).code in ("unreadable", "undecodable")


def test_randomly_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    """A damaged file gives pixels of the stated size or is refused; it never raises another exception."""
    frame = imagecodecs.jpeg2k_encode(ramp(), codecformat="j2k", bitspersample=12, reversible=True)
    tags: dict[str, Any] = {**WINDOW, "VOILUTSequence": [lut(500, CURVE[::50], 16)], "PixelPaddingValue": 0}
    native = write_dicom(tmp_path / "a.dcm", **tags)
    compressed = write_dicom(
        tmp_path / "b.dcm", syntax=uid.JPEG2000Lossless, PixelData=encapsulate([bytes(frame)]), **tags
    )
    originals = [native.read_bytes(), compressed.read_bytes()]
    generator = random.Random(0)
    verdicts = set()
    for _ in range(600):
        mutant = bytearray(generator.choice(originals))
        for _ in range(generator.choice((1, 4, 30))):
            mutant[generator.randrange(len(mutant))] = generator.randrange(256)
        path = tmp_path / "mutant.dcm"
        path.write_bytes(mutant[: generator.choice((len(mutant), generator.randrange(len(mutant))))])
        try:
            file = open_image(path)
            grey = file.to_grey(file.read_stored())
        except ImageRefusedError as error:
            verdicts.add(error.code)
        else:
            assert grey.shape == (file.header.rows, file.header.columns)
            assert np.isfinite(grey).all()
    assert {"unreadable", "no_pixels", "bad_header", "undecodable"} <= verdicts


def test_a_huge_private_value_is_not_read(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", **WINDOW)
    data = path.read_bytes()
    position = data.index(b"\x28\x00\x02\x00US")
    private = b"\x09\x00\x10\x10OB\0\0" + (2_000_000_000).to_bytes(4, "little")
    path.write_bytes(data[:position] + private)
    assert refusal(path).code in ("no_pixels", "unreadable")


def test_deeply_nested_sequences_are_refused(tmp_path: Path) -> None:
    data = write_dicom(tmp_path / "a.dcm", **WINDOW).read_bytes()
    position = data.index(b"\x28\x00\x02\x00US")
    item = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    (tmp_path / "a.dcm").write_bytes(data[:position] + item * 20_000 + data[position:])
    assert refusal(tmp_path / "a.dcm").code in ("no_pixels", "unreadable")


@pytest.mark.parametrize(
    ("name", "bits"),
    [(f"a.{suffix}", bits) for suffix in ("png", "tif", "jp2") for bits in (8, 16)] + [("a.jpg", 8), ("a.bmp", 8)],
)
def test_grey_pictures_are_read_and_others_refused(tmp_path: Path, name: str, bits: int) -> None:
    pixels = ramp(0, 2**bits - 1, f"u{bits // 8}")
    path = tmp_path / name
    cv2.imwrite(str(path), pixels)
    file = open_image(path)
    assert isinstance(file, RasterFile)
    assert (file.header.rows, file.header.columns, file.header.bits) == (40, 52, bits)
    grey = file.to_grey(file.read_stored())
    np.testing.assert_allclose(grey, pixels / (2**bits - 1), atol=0.03 if name in ("a.jpg", "a.jp2") else 1e-6)
    cv2.imwrite(str(path), cv2.merge([pixels] * 3))
    assert np.abs(open_image(path).read_stored().astype(float) - file.read_stored()).max() <= 2
    cv2.imwrite(str(path), cv2.merge([pixels, pixels // 2, pixels]))
    assert refusal(path).code == "colour"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert refusal(path).code in ("unreadable", "undecodable")


@pytest.mark.parametrize(("kind", "maximum"), [("P2", 255), ("P5", 255), ("P2", 100), ("P2", 4095), ("P5", 65535)])
def test_a_pgm_is_read_up_to_the_maximum_of_its_header(tmp_path: Path, kind: str, maximum: int) -> None:
    pixels = ramp(0, maximum, "u2")
    path = tmp_path / "a.pgm"
    header = f"{kind}\n# a comment\n{pixels.shape[1]} {pixels.shape[0]}\n{maximum}\n".encode()
    body = pixels.astype("u1" if maximum < 256 else ">u2").tobytes()
    path.write_bytes(header + (" ".join(map(str, pixels.ravel())).encode() if kind == "P2" else body))
    file = open_image(path)
    assert (file.header.rows, file.header.columns) == pixels.shape
    np.testing.assert_array_equal(file.read_stored(), pixels)
    np.testing.assert_allclose(file.to_grey(file.read_stored()), pixels / maximum, atol=1e-6)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "cut short" in refusal(path).message


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), ramp())
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 100_000, 100_000)
    path.write_bytes(data)
    assert refusal(path).code == "too_large"


def test_files_that_are_not_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(random.Random(1).randbytes(5000))
    assert refusal(tmp_path / "a").code == "not_an_image"
    (tmp_path / "b").write_bytes(b"")
    assert refusal(tmp_path / "b").code == "not_an_image"
    assert refusal(tmp_path / "c").code == "missing_file"
