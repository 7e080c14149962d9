"""Tests of preprocessing: geometry, masked air, orientation from the pixels, and decoding at reduced levels."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitmodel.config import Preprocessing, Size
from vitmodel.data.lesions import boxes_from_text, boxes_on_crop, boxes_to_text
from vitmodel.phantoms.anatomy import BreastPhantom, PhantomView, render
from vitmodel.pixels.preprocessing import CropGeometry, PreprocessedImage, preprocess, resample_to_canvas


@pytest.fixture(scope="module")
def view() -> PhantomView:
    return render(BreastPhantom(seed=1, laterality="L", density="C"), "MLO", Size(512, 416))


def prepare(folder: Path, image: np.ndarray, config: Preprocessing, laterality: str = "") -> PreprocessedImage:
    """Return the crop of an image, float `(H, W)` in [0, 1], that is first saved with 16 bits."""
    path = folder / "image.png"
    cv2.imwrite(str(path), np.rint(image * 65535).astype(np.uint16))
    return preprocess(path, config, laterality)


@given(
    x0=st.integers(0, 50), y0=st.integers(0, 50), width=st.integers(30, 150), height=st.integers(30, 150),
    flipped=st.booleans(), canvas_height=st.integers(16, 200), canvas_width=st.integers(16, 200),
)  # fmt: skip
def test_a_crop_pixel_shows_the_source_pixel_that_the_geometry_names(
    x0: int, y0: int, width: int, height: int, flipped: bool, canvas_height: int, canvas_width: int
) -> None:
    geometry = CropGeometry((x0, y0, x0 + width, y0 + height), flipped, Size(canvas_height, canvas_width))
    rows, columns = np.mgrid[0:220, 0:220].astype(np.float32)
    top, content_height, content_width = geometry.content
    rim = 2 + int(geometry.scale / 2)  # where the kernel extends beyond the box
    inner = np.s_[top + rim : top + content_height - rim, rim : content_width - rim]
    shown_x = resample_to_canvas(columns, geometry, 0)[inner]
    shown_y = resample_to_canvas(rows, geometry, 0)[inner]
    canvas_y, canvas_x = np.mgrid[0:canvas_height, 0:canvas_width][(slice(None), *inner)]
    matrix = geometry.to_source()
    np.testing.assert_allclose(shown_x, matrix[0, 0] * canvas_x + matrix[0, 2], atol=0.1)
    np.testing.assert_allclose(shown_y, matrix[1, 1] * canvas_y + matrix[1, 2], atol=0.1)


@pytest.mark.parametrize("flipped", [False, True])
def test_a_lesion_box_encloses_the_pixels_of_the_lesion_on_the_crop(flipped: bool) -> None:
    source = np.zeros((200, 150), np.float32)
    source[80:104, 40:60] = 1
    geometry = CropGeometry((10, 20, 130, 180), flipped, Size(240, 200))
    rows, columns = np.nonzero(resample_to_canvas(source, geometry, 0) > 0.5)
    (box,) = boxes_on_crop(boxes_from_text(boxes_to_text([(40, 80, 60, 104)])), geometry)
    np.testing.assert_allclose(box, [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], atol=1)


def test_only_air_is_zero(view: PhantomView, tmp_path: Path) -> None:
    prepared = prepare(tmp_path, view.image, Preprocessing(size=Size(256, 128)))
    x0, y0, x1, y1 = prepared.geometry.box
    top, height, width = prepared.geometry.content
    truth = cv2.resize(view.mask[y0:y1, x0:x1].astype(np.float32), (width, height), interpolation=cv2.INTER_AREA) == 1
    shown = prepared.crop[top : top + height, :width] > 0
    assert (shown & truth).sum() >= 0.995 * truth.sum()
    assert shown.sum() <= 1.1 * truth.sum()
    assert not prepared.crop[:top].any()
    assert not prepared.crop[:, width:].any()


def test_a_mirrored_image_gives_the_same_crop(view: PhantomView, tmp_path: Path) -> None:
    config = Preprocessing(size=Size(256, 128))
    left = prepare(tmp_path, view.image, config)
    right = prepare(tmp_path, view.image[:, ::-1], config)
    assert (left.geometry.flipped, right.geometry.flipped) == (False, True)
    np.testing.assert_array_equal(left.crop, right.crop)


def test_a_marker_in_the_air_does_not_change_the_crop(view: PhantomView, tmp_path: Path) -> None:
    config = Preprocessing(size=Size(256, 128))
    marker = np.zeros(view.image.shape, np.uint8)
    cv2.putText(marker, "L MLO", (280, 60), cv2.FONT_HERSHEY_SIMPLEX, 0.8, 255, 2)
    assert not (view.mask & (marker > 0)).any()
    marked = np.maximum(view.image, marker / 255)
    np.testing.assert_array_equal(prepare(tmp_path, marked, config).crop, prepare(tmp_path, view.image, config).crop)


def test_a_contradicting_laterality_adds_a_warning_and_is_not_used(view: PhantomView, tmp_path: Path) -> None:
    config = Preprocessing(size=Size(256, 128))
    contradicting = prepare(tmp_path, view.image, config, laterality="R")
    matching = prepare(tmp_path, view.image, config, laterality="L")
    assert "laterality_mismatch" in [warning.code for warning in contradicting.warnings]
    assert contradicting.geometry.flipped is False
    assert "laterality_mismatch" not in [warning.code for warning in matching.warnings]


def test_crops_of_16_and_8_bits_agree(view: PhantomView, tmp_path: Path) -> None:
    eight = prepare(tmp_path, view.image, Preprocessing(size=Size(256, 128)))
    sixteen = prepare(tmp_path, view.image, Preprocessing(size=Size(256, 128), bits=16))
    assert sixteen.crop.dtype == np.uint16
    assert np.abs(eight.crop / 255 - sixteen.crop / 65535).max() <= 1 / 255


@pytest.mark.parametrize("bits", [8, 16])
def test_a_configuration_survives_a_round_trip_through_json(bits: int) -> None:
    config = Preprocessing(size=Size(300, 200), bits=bits, exact=True)  # type: ignore[arg-type]
    assert Preprocessing.from_json(config.to_json()) == config


def test_a_reduced_level_gives_the_crop_of_a_full_decode(shared_data: Path) -> None:
    """The tolerance is 45 dB in tissue, the difference between two resize kernels."""
    for path in sorted((shared_data / "rsna_dicom").rglob("*.dcm"))[::3]:
        reduced = preprocess(path, Preprocessing(size=Size(512, 256), bits=16))
        exact = preprocess(path, Preprocessing(size=Size(512, 256), bits=16, exact=True))
        assert reduced.decode_level > exact.decode_level == 0
        assert reduced.geometry == exact.geometry
        tissue = exact.crop > 0
        error = (reduced.crop[tissue].astype(float) - exact.crop[tissue]) / 65535
        assert -10 * np.log10(np.mean(error**2)) >= 45
