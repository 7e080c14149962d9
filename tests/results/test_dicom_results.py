"""Heat maps on the pixels of their source, overlays, and DICOM results that an independent validator accepts."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pydicom import Dataset, dcmread
from pydicom.tag import Tag

from vitmodel.config import Preprocessing, Size
from vitmodel.config.labels import target_name
from vitmodel.pixels.preprocessing import CropGeometry, preprocess
from vitmodel.results.evidence import Software, read_source_header
from vitmodel.results.heatmap import HeatMap, breast_outline
from vitmodel.results.image_results import ImageResult, ResultWriter, to_region
from vitmodel.results.overlay import Caption, DisplayImage, draw_overlay
from vitmodel.utils import sha256_file

CODE_MEANING = Tag("CodeMeaning")
OUTLINES, TEXT, CAD = "Comprehensive 3D SR", "Enhanced SR", "Mammography CAD SR"
STATE, SC, SEG, PM = (
    "Grayscale Softcopy Presentation State", "Secondary Capture Image", "Segmentation", "Parametric Map"
)  # fmt: skip
KINDS = ("sr", "sc", "gsps", "seg", "pm", "cad")
SOFTWARE = Software(version="1.2.3", model="ViT 3 x 24", serial="0123456789abcdef", parameters=("threshold 0.3",))


def ramp(flipped: bool) -> tuple[HeatMap, np.ndarray]:
    """Return a map whose values are a linear function of source coordinates, and that function on the source pixels."""
    geometry = CropGeometry((30, 40, 330, 560), flipped, Size(128, 64))
    rows, columns = np.mgrid[3.5:128:8, 3.5:64:8]
    x, y = np.einsum("ij,jkl->ikl", geometry.to_source(), np.stack([columns, rows, np.ones_like(rows)]))
    top, height, width = geometry.content
    tissue = np.zeros((128, 64), bool)
    tissue[top : top + height, :width] = True
    source_rows, source_columns = np.mgrid[:600, :400]
    heat = HeatMap(values=x + 2 * y, tissue=tissue, geometry=geometry, patch=8, source_shape=(600, 400))
    return heat, source_columns + 2.0 * source_rows


@pytest.mark.parametrize("flipped", [False, True])
def test_a_map_is_projected_to_the_source_pixels_of_its_patches(flipped: bool) -> None:
    heat, expected = ramp(flipped)
    values = heat.to_source_image()
    inner = (slice(80, 520), slice(60, 300))  # between the centres of the outer patches
    np.testing.assert_allclose(values[inner], expected[inner], atol=1)
    half = heat.to_source_image(0.5)
    centres = expected.reshape(300, 2, 200, 2).mean((1, 3))  # a pixel at half size represents the mean of four
    np.testing.assert_allclose(half[40:260, 30:150], centres[40:260, 30:150], atol=1)
    outside = np.ones_like(values, bool)
    outside[38:562, 28:332] = False
    assert np.isnan(values[outside]).all()


@pytest.mark.parametrize("flipped", [False, True])
def test_the_peak_lies_within_its_outline(flipped: bool) -> None:
    heat, _ = ramp(flipped)
    values = np.zeros((16, 8))
    values[10, 3] = 5
    spot = replace(heat, values=values)
    expected = heat.geometry.to_source() @ [3 * 8 + 3.5, 10 * 8 + 3.5, 1]
    np.testing.assert_allclose(spot.peak_position(), expected)
    outline = spot.peak_outline()
    assert (outline.min(0) < expected).all()
    assert (expected < outline.max(0)).all()
    assert np.ptp(outline, axis=0).max() < 2.5 * 8 / heat.geometry.scale


def test_an_overlay_of_zeros_leaves_the_picture_unchanged_and_can_blacken_all_but_the_breast() -> None:
    heat, _ = ramp(False)
    zeros = replace(heat, values=np.zeros((16, 8)))
    picture = DisplayImage(np.full((600, 400), 100, np.uint8), 1.0)
    caption = Caption(title="L CC", score="10 %", unit="log-odds", low=0, high=1)
    page = draw_overlay(picture, zeros, caption)
    height, width = 560 + 24 - 16, 330 + 24 - 6
    assert (page[:height, :width] == 100).all()
    assert (page[:height, width + 8 : 2 * width + 8] == 100).all()
    assert (draw_overlay(picture, zeros, caption, breast_only=True)[:10, :width] == 0).all()
    assert page[height:].max() > 200, "the caption is missing"


@pytest.fixture(scope="module")
def original(release: Path) -> Path:
    """Return the first MLO of the release."""
    paths = sorted((release / "train_images").rglob("*.dcm"))
    return next(path for path in paths if b"MLO" in path.read_bytes()[:4000])


def write_all(
    original: Path, out: Path, secret: str = "", software: Software = SOFTWARE
) -> tuple[HeatMap, dict[str, Dataset]]:
    """Write all results of one image; return its heat map and the DICOM results by kind."""
    preprocessing = Preprocessing(size=Size(128, 64))
    prepared = preprocess(original, preprocessing)
    rng = np.random.default_rng(0)
    heat = HeatMap(
        values=rng.normal(size=(8, 4)),
        tissue=prepared.crop > 0,
        geometry=prepared.geometry,
        patch=16,
        source_shape=(prepared.header.rows, prepared.header.columns),
    )
    side = prepared.header.identity.laterality
    writer = ResultWriter(out, software, preprocessing, 0.3, dicom=KINDS, secret=secret)
    image = ImageResult(name="one", path=original, side=side, view="MLO", probability=0.6, inverted=False)
    outline = breast_outline(heat.tissue, heat.geometry)
    assert outline is not None
    region, _ = writer.write_explanation(image, heat, "log-odds", 0, 1)
    rows = pd.DataFrame(
        [{"path": str(original), "breast_id": "p", "laterality": side, "probability": 0.6, "region": region}]
    ).assign(view="MLO", outline=[to_region(outline)])
    breasts = rows[["breast_id", "laterality"]].assign(probability=0.45, decision=1.0)
    assert writer.report(rows, breasts) == (1, 0)
    results = [dcmread(path) for path in sorted((out / "dicom").iterdir())]
    return heat, {str(result.SOPClassUID.name).removesuffix(" Storage"): result for result in results}


@pytest.fixture(scope="module")
def results(original: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HeatMap, dict[str, Dataset]]:
    out = tmp_path_factory.mktemp("results")
    before = sha256_file(original)
    heat, dicom_results = write_all(original, out)
    assert sha256_file(original) == before
    return out, heat, dicom_results


Results = tuple[Path, HeatMap, dict[str, Dataset]]


def test_results_belong_to_the_study_of_the_source_and_have_new_uids(original: Path, results: Results) -> None:
    source = dcmread(original)
    assert set(results[2]) == {OUTLINES, TEXT, CAD, STATE, SC, SEG, PM}
    for result in results[2].values():
        for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyInstanceUID"):
            assert result[keyword].value == source[keyword].value, keyword
        assert result.SeriesInstanceUID != source.SeriesInstanceUID
        assert result.SOPInstanceUID != source.SOPInstanceUID
    assert len({result.SeriesInstanceUID for result in results[2].values()}) == len(results[2])


def test_the_structured_report_contains_score_site_region_and_software(original: Path, results: Results) -> None:
    report = results[2][OUTLINES]
    text = str(report)
    source = dcmread(original)
    evidence = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert [item.ReferencedSOPInstanceUID for item in evidence] == [source.SOPInstanceUID]
    assert report.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    side = {"L": "Left", "R": "Right"}[source.ImageLaterality]
    software = ("1.2.3", "ViT 3 x 24", "0123456789abcdef", "threshold 0.3")
    for expected in ("Probability of cancer", "45.0", "Breast", side, "POLYLINE", *software):
        assert expected in text, expected


@pytest.mark.parametrize("label", ["birads>=4", "invasive", f"birads>=4:<=2,{'long_' * 12}name"])
def test_a_report_uses_the_code_of_cancer_for_that_label_only(label: str, original: Path, tmp_path: Path) -> None:
    _, results = write_all(original, tmp_path, software=replace(SOFTWARE, label=label))
    values = [element.value for element in results[OUTLINES].iterall() if element.tag == CODE_MEANING]
    stated = {value for value in values if value.startswith("Probability of ")}
    assert not {value for value in stated if value.startswith("Probability of cancer")}
    (meaning,) = (value for value in stated if not value.endswith(", this view alone"))
    assert len(meaning) <= 64
    assert meaning.removesuffix("...").removeprefix("Probability of ") in f"{label} {target_name(label)}"
    assert len(results[OUTLINES].SeriesDescription) <= 64
    assert "Cancer" not in results[OUTLINES].SeriesDescription
    assert "probability of cancer" not in str(results[TEXT])


def test_the_parametric_map_contains_the_values_of_the_heat_map(results: Results) -> None:
    _, heat, dicom_results = results
    stored = dicom_results[PM]
    expected = heat.to_source_image()
    padding = np.float32(stored.FloatPixelPaddingValue)
    values = np.where(stored.pixel_array == padding, np.nan, stored.pixel_array)
    np.testing.assert_array_equal(values, expected)
    assert padding < np.nanmin(expected)


def test_every_measurement_for_viewers_is_an_outline_on_the_image_and_text_is_in_a_report_of_its_own(
    original: Path, results: Results
) -> None:
    report = results[2][OUTLINES]
    assert report.ConceptNameCodeSequence[0].CodeValue == "126000"
    measurements = next(
        item for item in report.ContentSequence if item.ConceptNameCodeSequence[0].CodeValue == "126010"
    )
    size = dcmread(original, stop_before_pixels=True)
    assert len(measurements.ContentSequence) == 2
    for group in measurements.ContentSequence:
        (shape,) = (item for item in group.ContentSequence if item.ValueType == "SCOORD")
        assert shape.GraphicType == "POLYLINE"
        corners = np.array(shape.GraphicData).reshape(-1, 2)
        assert (corners >= 0).all()
        assert (corners <= [size.Columns, size.Rows]).all()
        assert (corners[0] == corners[-1]).all()
        image = shape.ContentSequence[0].ReferencedSOPSequence[0]
        assert image.ReferencedSOPInstanceUID == size.SOPInstanceUID
    text = results[2][TEXT]
    assert text.ConceptNameCodeSequence[0].CodeValue != "126000"
    lines = " ".join(str(element.value) for element in text.iterall() if element.keyword == "TextValue")
    for expected in (
        "breast: probability of cancer",
        "45.0 %, at or above 30.0 %",
        "MLO alone: 60.0 %",
        "not a medical",
    ):
        assert expected in lines, expected


def test_a_cad_report_refers_to_its_image_by_position_and_never_contradicts_a_score(results: Results) -> None:
    from vitmodel.results.cad_report import cad_report
    from vitmodel.results.findings import BreastFinding, ImageFinding

    report = results[2][CAD]
    (identifier,) = {
        tuple(element.value) for element in report.iterall() if element.keyword == "ReferencedContentItemIdentifier"
    }
    library = report.ContentSequence[identifier[1] - 1].ContentSequence
    assert library[identifier[2] - 1].ReferencedSOPSequence[0].ReferencedSOPInstanceUID == (
        report.CurrentRequestedProcedureEvidenceSequence[0]
        .ReferencedSeriesSequence[0]
        .ReferencedSOPSequence[0]
        .ReferencedSOPInstanceUID
    )
    bare = ImageFinding(source=Dataset(), probability=0.6)
    assert cad_report([BreastFinding(side="L", probability=0.6, suspicious=True, images=[bare])], SOFTWARE) is None


def test_the_outline_of_a_breast_is_the_edge_of_its_mask() -> None:
    geometry = CropGeometry((30, 40, 330, 560), True, Size(128, 64))
    top, height, width = geometry.content
    tissue = np.zeros((128, 64), bool)
    tissue[top : top + height, :width] = True
    outline = breast_outline(tissue, geometry)
    assert outline is not None
    np.testing.assert_allclose(outline.min(0), [30, 40], atol=1 / geometry.scale)
    np.testing.assert_allclose(outline.max(0), [329, 559], atol=1 / geometry.scale)
    assert breast_outline(np.zeros_like(tissue), geometry) is None


def test_two_images_of_one_view_have_results_of_their_own(original: Path, tmp_path: Path) -> None:
    second = dcmread(original)
    second.SOPInstanceUID += ".1"
    second.save_as(tmp_path / "second.dcm")
    (tmp_path / "first.dcm").write_bytes(original.read_bytes())
    rows = pd.DataFrame({"path": [str(tmp_path / "first.dcm"), str(tmp_path / "second.dcm")], "region": None})
    outline = [[0, 0], [9, 0], [9, 9]]
    rows = rows.assign(breast_id="p", laterality="L", view="MLO", probability=0.6, outline=[outline, outline])
    breasts = rows[:1][["breast_id", "laterality", "probability"]].assign(decision=0.0)
    writer = ResultWriter(tmp_path, SOFTWARE, Preprocessing(size=Size(128, 64)), 0.3, dicom=("gsps",), secret="")
    assert writer.report(rows, breasts) == (1, 0)
    assert len(list((tmp_path / "dicom").iterdir())) == 2


def test_the_same_result_has_the_same_uid_and_another_version_has_another(
    original: Path, results: Results, tmp_path: Path
) -> None:
    write_all(original, tmp_path)
    first, second = ({path.name for path in (out / "dicom").iterdir()} for out in (results[0], tmp_path))
    assert first == second
    assert replace(SOFTWARE, version="1.2.4").uid("map", "1.2") != SOFTWARE.uid("map", "1.2")


def test_a_study_of_two_patients_gets_no_report(
    original: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = dcmread(original)
    other.PatientID += "x"
    other.save_as(tmp_path / "other.dcm")
    rows = pd.DataFrame({"path": [str(original), str(tmp_path / "other.dcm")], "breast_id": ["p", "q"], "region": None})
    rows = rows.assign(laterality="L", view="CC", probability=0.6, outline=None)
    breasts = rows[["breast_id", "laterality", "probability"]].assign(decision=1.0)
    writer = ResultWriter(tmp_path, SOFTWARE, Preprocessing(size=Size(128, 64)), 0.3, dicom=KINDS, secret="")
    assert writer.report(rows, breasts) == (0, 2)
    assert "states 2 patients" in caplog.text
    assert writer.report(rows[:1], breasts[:1]) == (1, 0)


def test_deidentified_results_contain_no_identity_and_match_sources_deidentified_with_the_same_seed(
    original: Path, tmp_path: Path
) -> None:
    from dicognito.anonymizer import Anonymizer

    _, results = write_all(original, tmp_path, secret="secret")
    source, anonymous = dcmread(original), dcmread(original)
    Anonymizer(seed="secret").anonymize(anonymous)
    for path in (tmp_path / "dicom").iterdir():
        content = path.read_bytes()
        for keyword in ("PatientName", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "InstanceNumber"):
            assert str(source[keyword].value).encode() not in content, keyword
    for result in results.values():
        assert result.PatientID == anonymous.PatientID != source.PatientID
        assert result.StudyInstanceUID == anonymous.StudyInstanceUID


@pytest.mark.parametrize(("secret", "label"), [("", "cancer"), ("secret", "birads>=4:<=2")])
def test_dciodvfy_finds_no_error(original: Path, secret: str, label: str, tmp_path: Path) -> None:
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy (Debian package dicom3tools) is not installed")
    write_all(original, tmp_path, secret, replace(SOFTWARE, label=label))
    for path in (tmp_path / "dicom").iterdir():
        process = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True)
        assert not [line for line in process.stderr.splitlines() if line.startswith("Error")], path.name
        assert process.returncode == 0


def test_missing_source_tags_are_left_empty_or_derived(original: Path, tmp_path: Path) -> None:
    source = dcmread(original)
    for keyword in ("PatientName", "StudyInstanceUID", "SeriesInstanceUID", "Modality", "StudyDate"):
        del source[keyword]
    source.add_new("PatientBirthDate", "LO", "00000000")
    source["PatientBirthDate"].VR = "DA"
    source.save_as(tmp_path / "bare.dcm")
    header = read_source_header(tmp_path / "bare.dcm")
    assert (header.PatientName, header.PatientBirthDate, header.StudyDate) == ("", "", "")
    assert header.StudyInstanceUID == read_source_header(tmp_path / "bare.dcm").StudyInstanceUID
    _, results = write_all(tmp_path / "bare.dcm", tmp_path / "out")
    assert len(results) == 7


@pytest.mark.parametrize(
    ("character_set", "name"),
    [
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎"),
        ("GB18030", "Zhang^Xiaodong=张^小东"),
        ("ISO_IR 100", "Müller^Jürgen"),
        (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞"),
        ("ISO_IR 6", "Doe^Jane"),
        ("ISO_IR 192", "Müller^Jörg"),
    ],
)
def test_names_in_any_character_set_and_odd_sexes_keep_their_report(
    original: Path, tmp_path: Path, character_set: str | list[str], name: str
) -> None:
    source = dcmread(original)
    source.SpecificCharacterSet = character_set
    source.PatientName = name
    source.PatientSex = "FEMALE"
    source.save_as(tmp_path / "source.dcm")
    _, results = write_all(tmp_path / "source.dcm", tmp_path / "out")
    assert str(results[OUTLINES].PatientName) == name
    assert results[OUTLINES].PatientSex == "F"
