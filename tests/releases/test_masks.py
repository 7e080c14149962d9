"""The boxes of masks are in pixels of the film, and a crop is not taken for a mask."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from vitmodel.data.lesions import boxes_from_text
from vitmodel.releases.masks import FilmMask, find_boxes, read_boxes

BOXES = [(4, 6, 10, 20), (14, 30, 19, 38)]


def picture(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Return a picture with all grey values."""
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def mask_of(boxes: list[tuple[int, int, int, int]], shape: tuple[int, int] = (48, 40)) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = 255
    return mask


def save(path: Path, pixels: np.ndarray) -> str:
    assert cv2.imwrite(str(path), pixels)
    return str(path)


@pytest.fixture
def film(tmp_path: Path) -> str:
    return save(tmp_path / "film.png", picture((48, 40)))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_each_part_of_a_mask_has_a_box(tmp_path: Path, film: str, suffix: str) -> None:
    mask = save(tmp_path / f"film_mask.{suffix}", mask_of(BOXES))
    assert find_boxes(FilmMask(film, (mask,), True)) == BOXES


def test_boxes_of_a_smaller_mask_are_in_pixels_of_the_film(tmp_path: Path, film: str) -> None:
    mask = save(tmp_path / "mask.png", mask_of([(2, 3, 5, 10)], (24, 20)))
    assert find_boxes(FilmMask(film, (mask,), True)) == [BOXES[0]]


def test_the_mask_is_told_from_the_crop_in_any_order(tmp_path: Path, film: str) -> None:
    mask = save(tmp_path / "1.png", mask_of(BOXES[:1]))
    same_shape = save(tmp_path / "2.png", picture((24, 20), seed=1))
    larger = save(tmp_path / "3.png", picture((96, 80), seed=2))
    for candidates in ((mask, same_shape), (same_shape, mask), (larger, mask)):
        assert find_boxes(FilmMask(film, candidates, True)) == BOXES[:1]
    assert find_boxes(FilmMask(film, (same_shape,), True)) is None, "a crop alone gives no box"


def test_an_empty_mask_has_no_box(tmp_path: Path, film: str) -> None:
    assert find_boxes(FilmMask(film, (save(tmp_path / "m.png", mask_of([])),), True)) == []


def test_masks_that_cannot_be_used_are_counted_in_a_warning(
    tmp_path: Path, film: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = save(tmp_path / "good.png", mask_of(BOXES[:1]))
    wrong_shape = save(tmp_path / "wrong_shape.png", mask_of(BOXES[:1], (48, 48)))
    inverted = save(tmp_path / "inverted.png", 255 - mask_of(BOXES[:1]))
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG")
    masks = [FilmMask(film, (path,), True) for path in (wrong_shape, inverted, str(broken), str(tmp_path / "absent"))]
    lesions, finding_boxes = read_boxes([*masks, FilmMask(film, (good,), True)], "a release")
    assert boxes_from_text(lesions[film]).tolist() == [list(BOXES[0])]
    assert finding_boxes == {}
    assert "4 of 5 masks" in caplog.text


def test_boxes_that_are_not_proven_cancers_are_kept_apart(tmp_path: Path, film: str) -> None:
    first = save(tmp_path / "1.png", mask_of(BOXES[:1]))
    second = save(tmp_path / "2.png", mask_of(BOXES[1:]))
    lesions, finding_boxes = read_boxes([FilmMask(film, (first,), True), FilmMask(film, (second,), False)], "a release")
    assert boxes_from_text(lesions[film]).tolist() == [list(BOXES[0])]
    assert boxes_from_text(finding_boxes[film]).tolist() == [list(BOXES[1])]
