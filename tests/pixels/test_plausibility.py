"""Tests of the judgement whether an image shows a breast, and of what the header says about the picture."""

from __future__ import annotations

import functools
import runpy
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest

from vitmodel.config import Preprocessing, Size
from vitmodel.errors import ImageRefusedError
from vitmodel.phantoms.anatomy import BreastPhantom, ViewName, render
from vitmodel.pixels.crop import find_breast
from vitmodel.pixels.header_meaning import HEADER_RULES, SECONDARY_CAPTURE_CLASS, TOMOSYNTHESIS_CLASS, check_meaning
from vitmodel.pixels.plausibility import RANGES, judge_region, measure_region
from vitmodel.pixels.preprocessing import preprocess
from vitmodel.pixels.tags import TagReader
from vitmodel.pixels.verdict import REFUSAL_REASONS, WARNING_REASONS

ROOT = Path(__file__).resolve().parents[2]
SMALL = Preprocessing(size=Size(64, 32))
SIZE = Size(384, 312)


@functools.cache
def breast(side: str = "L", view: ViewName = "CC", seed: int = 0, size: Size = SIZE) -> np.ndarray:
    return render(BreastPhantom(seed, side, "ABCD"[seed % 4]), view, size).image


def excess(image: np.ndarray) -> float:
    """Return how implausible an image is; a refusal by `find_breast` is not caught."""
    grey = np.ascontiguousarray(image, np.float32)
    return judge_region(grey, find_breast(grey)).excess


def save(folder: Path, image: np.ndarray) -> Path:
    cv2.imwrite(str(folder / "image.png"), np.rint(np.clip(image, 0, 1) * 65535).astype(np.uint16))
    return folder / "image.png"


def refusal(path: Path, config: Preprocessing = SMALL) -> ImageRefusedError:
    with pytest.raises(ImageRefusedError) as caught:
        preprocess(path, config)
    return caught.value


@pytest.mark.parametrize("size", [Size(64, 52), Size(128, 104), Size(384, 312)])
@pytest.mark.parametrize("view", ["CC", "MLO"])
def test_a_synthetic_breast_is_plausible_at_every_size(view: ViewName, size: Size) -> None:
    assert max(excess(breast("LR"[seed % 2], view, seed, size)) for seed in range(4)) < 1


def soften(picture: np.ndarray) -> np.ndarray:
    """Return the picture with soft edges: with two grey levels it would be refused as a mask."""
    return cv2.GaussianBlur(picture, (0, 0), 1)


def disc() -> np.ndarray:
    return soften(cv2.circle(np.zeros((300, 300), np.float32), (150, 150), 90, 0.7, -1))


def rectangle() -> np.ndarray:
    return soften(cv2.rectangle(np.zeros((300, 300), np.float32), (0, 60), (150, 240), 0.7, -1))


def noise() -> np.ndarray:
    return np.random.default_rng(0).random((300, 240), np.float32)


def gradient() -> np.ndarray:
    return np.tile(np.linspace(0, 1, 240, dtype=np.float32), (300, 1))


def slice_of_a_trunk() -> np.ndarray:
    body = cv2.ellipse(np.zeros((300, 400), np.float32), (200, 150), (180, 120), 0, 0, 360, 0.5, -1)
    for x in (120, 280):
        cv2.ellipse(body, (x, 140), (60, 80), 0, 0, 360, 0.02, -1)
    return cv2.circle(body, (200, 220), 20, 1.0, -1)


def specimen() -> np.ndarray:
    """Breast tissue cut out as a blob that touches no edge."""
    return np.where(disc() > 0, breast(size=Size(300, 300))[:, :300] + 0.2, 0)


def two_breasts() -> np.ndarray:
    return np.hstack([breast("L"), breast("R", seed=1)])


def back_to_back() -> np.ndarray:
    return np.hstack([breast("R"), breast("L", seed=1)])


def four_views() -> np.ndarray:
    return np.vstack([back_to_back(), np.hstack([breast("R", "MLO"), breast("L", "MLO", 1)])])


KINDS = {
    "specimen radiograph": {"not_a_mammogram", "no_breast"},
    "ACR phantom": {"not_a_mammogram", "no_breast"},
    "CDMAM phantom": {"not_a_mammogram", "no_breast", "rotated"},
    "flat field": {"not_a_mammogram", "no_breast", "blank"},
    "ultrasound screenshot": {"not_a_mammogram", "no_breast"},
    "MR screenshot": {"not_a_mammogram", "no_breast"},
    "scanned page": {"not_a_mammogram", "no_breast", "mask"},
    "chest radiograph": {"not_a_mammogram", "no_breast", "rotated"},
    "CT slice of the trunk": {"not_a_mammogram", "no_breast"},
    "two or four views in one picture": {"not_a_mammogram"},
    "mammogram turned by 90 degrees": {"rotated"},
}
"""Kind of picture in benchmarks/non_mammograms.py -> the codes with which it may be refused."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_likeness_of_each_kind_of_unsuitable_image_is_refused(kind: str, tmp_path: Path) -> None:
    generators = runpy.run_path(str(ROOT / "benchmarks" / "non_mammograms.py"))["GENERATORS"]
    for seed in range(3):
        picture = generators[kind](np.random.default_rng(seed))
        assert refusal(save(tmp_path, picture)).code in KINDS[kind]


def test_an_upside_down_picture_without_a_header_is_not_noticed(tmp_path: Path) -> None:
    """The limit that docs/explanation/limits.md states: the shape of a breast does not show where its top is."""
    assert preprocess(save(tmp_path, breast()[::-1, ::-1]), SMALL).breast.chest_wall == "right"


@pytest.mark.parametrize(
    "draw",
    [disc, rectangle, noise, gradient, slice_of_a_trunk, specimen, two_breasts, back_to_back, four_views],
)
def test_a_picture_of_something_else_is_refused(draw: Callable[[], np.ndarray], tmp_path: Path) -> None:
    caught = refusal(save(tmp_path, draw()))
    assert caught.code == "not_a_mammogram"
    assert "--implausible warn" in caught.message


@pytest.mark.parametrize("turns", [1, 3])
def test_a_mammogram_turned_by_90_degrees_is_refused_as_such(turns: int, tmp_path: Path) -> None:
    assert refusal(save(tmp_path, np.rot90(breast(), turns))).code == "rotated"


def test_the_verdict_depends_neither_on_brightness_nor_on_the_side_nor_on_the_polarity() -> None:
    image = breast(view="MLO")
    for changed in (0.5 * image + 0.1, image[:, ::-1], 1 - image):
        assert excess(changed) == pytest.approx(excess(image), abs=0.2)


def test_the_opt_out_keeps_the_image_with_a_warning_and_changes_no_crop(tmp_path: Path) -> None:
    keep = Preprocessing(size=Size(64, 32), implausible="warn")
    kept = preprocess(save(tmp_path, rectangle()), keep)
    assert [warning.code for warning in kept.warnings if warning.code == "implausible"] == ["implausible"]
    path = save(tmp_path, breast())
    np.testing.assert_array_equal(preprocess(path, keep).crop, preprocess(path, SMALL).crop)


def test_crops_of_versions_without_the_check_stay_valid() -> None:
    assert "implausible" not in SMALL.to_json()
    assert Preprocessing.from_json(SMALL.to_json()) == SMALL
    keep = Preprocessing(implausible="warn")
    assert Preprocessing.from_json(keep.to_json()) == keep


def test_a_region_of_the_size_of_a_chest_is_less_plausible() -> None:
    image = breast()
    region = find_breast(image)
    height = region.box.y1 - region.box.y0
    assert judge_region(image, region, 450 / height).excess >= 1
    assert judge_region(image, region, 150 / height).excess == judge_region(image, region).excess


def test_every_measure_has_a_range() -> None:
    image = breast()
    assert set(measure_region(image, find_breast(image))) | {"height_mm"} == set(RANGES)


def header(**tags: object) -> pydicom.Dataset:
    dataset = pydicom.Dataset()
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    return dataset


def codes(*values: str, **more: object) -> list[pydicom.Dataset]:
    return [header(CodeValue=value, CodingSchemeDesignator="SCT", CodeMeaning="", **more) for value in values]


VERDICTS: list[tuple[dict[str, object], str]] = [
    ({}, ""),
    ({"QualityControlImage": "NO", "PartialView": "NO", "NumberOfFrames": 1}, ""),
    ({"QualityControlImage": "YES"}, "quality_control"),
    ({"ViewCodeSequence": codes("127457009")}, "specimen"),
    ({"BodyPartExamined": "SPECIMEN"}, "specimen"),
    ({"ImageType": ["DERIVED", "PRIMARY", "POST_CONTRAST", "SUBTRACTION"]}, "subtraction"),
    ({"ImageType": ["DERIVED", "PRIMARY", "", "RECOMBINED"]}, "subtraction"),
    ({"ImageType": ["DERIVED", "PRIMARY", "POST_CONTRAST", "LOW_ENERGY"]}, "special_view"),
    *[({"ImageLaterality": word}, "both_breasts") for word in ("B", "BILATERAL", "Both")],
    ({"FrameLaterality": "B"}, "both_breasts"),
    ({"Laterality": "B"}, "special_view"),
    ({"Laterality": "B", "ImageLaterality": "L"}, ""),
    ({"NumberOfFrames": 60}, "multi_frame"),
    ({"ImageType": ["DERIVED", "PRIMARY", "TOMOSYNTHESIS", "NONE"]}, "multi_frame"),
    ({"ImageType": ["ORIGINAL", "PRIMARY", "TOMO_PROJ"]}, "multi_frame"),
    ({"SOPClassUID": TOMOSYNTHESIS_CLASS, "NumberOfFrames": 1}, "multi_frame"),
    ({"SOPClassUID": TOMOSYNTHESIS_CLASS, "ImageType": ["", "", "TOMOSYNTHESIS", "GENERATED_2D"]}, "synthetic_2d"),
    ({"ImageType": ["DERIVED", "PRIMARY", "TOMO_2D", "LEFT"]}, "synthetic_2d"),
    ({"SOPClassUID": TOMOSYNTHESIS_CLASS, "SeriesDescription": "L CC C-View"}, "synthetic_2d"),
    ({"SOPClassUID": TOMOSYNTHESIS_CLASS, "SeriesDescription": "C-View", "NumberOfFrames": 60}, "multi_frame"),
    ({"SeriesDescription": "R MLO Insight 2D"}, "synthetic_2d"),
    ({"ViewCodeSequence": codes("399162004", ViewModifierCodeSequence=codes("399163009"))}, "special_view"),
    ({"ViewCodeSequence": codes("399162004", ViewModifierCodeSequence=codes("R-102D7"))}, "special_view"),
    ({"ViewModifierCodeSequence": codes("399110001")}, "special_view"),
    ({"ViewCodeSequence": codes("399162004", ViewModifierCodeSequence=codes("399209000"))}, ""),  # implant displaced
    ({"PartialView": "YES"}, "special_view"),
    ({"PatientOrientation": ["A", "FR"]}, ""),
    ({"PatientOrientation": ["P", "L"]}, ""),
    ({"PatientOrientation": ["P", "HL"]}, "rotated"),
    ({"PatientOrientation": ["F", "A"]}, "rotated"),
    ({"PatientOrientation": "A"}, ""),
    ({"EstimatedRadiographicMagnificationFactor": "1.8"}, "special_view"),
    ({"EstimatedRadiographicMagnificationFactor": "1.07"}, ""),
    ({"ImageType": ["ORIGINAL", "PRIMARY", "STEREO_PLUS"]}, "special_view"),
    ({"SOPClassUID": SECONDARY_CAPTURE_CLASS, "ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, "special_view"),
]  # fmt: skip


@pytest.mark.parametrize(("tags", "verdict"), VERDICTS)
def test_a_header_pattern_has_its_verdict(tags: dict[str, object], verdict: str) -> None:
    reader = TagReader(header(**tags), [])
    try:
        check_meaning(reader, str(tags.get("SOPClassUID", "")))
        found = [warning.code for warning in reader.warnings]
    except ImageRefusedError as refused:
        found = [refused.code]
    assert found == [verdict] * bool(verdict)


def test_every_row_of_the_table_is_reached_by_one_of_the_headers() -> None:
    for rule in HEADER_RULES:
        assert rule.code in (REFUSAL_REASONS if rule.verdict == "refused" else WARNING_REASONS)
        assert any(
            rule.matches(TagReader(header(**tags), []), str(tags.get("SOPClassUID", ""))) for tags, _ in VERDICTS
        ), rule.pattern
