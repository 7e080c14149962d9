"""Tests of breast detection against hand-drawn boxes, known laterality and the masks of phantoms."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from vitmodel.config import Size
from vitmodel.errors import ImageRefusedError
from vitmodel.phantoms.anatomy import BreastPhantom, ViewName, render
from vitmodel.phantoms.style import VendorStyle, apply_style
from vitmodel.pixels.crop import BreastRegion, find_breast
from vitmodel.pixels.open import open_image

SIZE = Size(512, 416)


def phantom(view: ViewName = "CC", seed: int = 3, **shape: float) -> tuple[np.ndarray, np.ndarray]:
    """Return image and true mask of a breast with the chest wall at the left."""
    rendered = render(BreastPhantom(seed, **shape), view, SIZE)  # type: ignore[arg-type]
    return rendered.image, rendered.breast_mask


def lost_fraction(region: BreastRegion, mask: np.ndarray) -> float:
    """Return the fraction of the true `mask` that the region lacks."""
    return float((mask & ~region.mask).sum() / mask.sum())


def box_distance(first: BreastRegion, second: BreastRegion) -> int:
    """Return the greatest distance in pixels between corresponding sides of two boxes."""
    return int(np.abs(np.subtract(first.box, second.box)).max())


@pytest.mark.parametrize("view", ["CC", "MLO"])
@pytest.mark.parametrize("seed", range(10))
def test_no_tissue_is_cut_off(view: ViewName, seed: int) -> None:
    side = "LR"[seed % 2]
    breast = BreastPhantom(seed, side, "ABCD"[seed % 4], depth_mm=60 + 5 * seed, implant=seed % 5 == 4)
    rendered = render(breast, view, SIZE)
    air = 0.05 * (seed % 4)
    marker = "lead" if seed % 3 else "text"
    style = VendorStyle(0.5, 1.2, 0, air, marker, 0.05 + 0.09 * seed, 4 * (seed % 3))  # type: ignore[arg-type]
    noise = 0.01 * (seed % 4) * np.random.default_rng(seed).standard_normal(SIZE, np.float32)  # also in the air
    region = find_breast(np.clip(apply_style(rendered, style, f"{side} {view}", seed, side) + noise, 0, 1))
    assert region.chest_wall == ("left" if side == "L" else "right")
    assert lost_fraction(region, rendered.breast_mask) <= 0.005
    assert (region.mask & ~rendered.mask).sum() <= 0.04 * rendered.mask.sum()  # the margin of one pixel
    x0, y0, x1, y1 = region.box
    assert region.mask[y0:y1, x0:x1].sum() == region.mask.sum()


def test_a_mirrored_image_has_the_mirrored_mask() -> None:
    image, _ = phantom("MLO")
    region = find_breast(image)
    mirrored = find_breast(np.ascontiguousarray(image[:, ::-1]))
    assert (region.chest_wall, mirrored.chest_wall) == ("left", "right")
    assert np.mean(region.mask != mirrored.mask[:, ::-1]) < 1e-3


def test_polarity_brightness_and_pedestal_do_not_matter() -> None:
    image, _ = phantom()
    plain = find_breast(image)
    for changed in (0.3 * image, 0.3 + 0.5 * image, 1 - image):
        region = find_breast(changed)
        assert box_distance(plain, region) <= 1
        assert region.inverted == (changed[0, -1] > 0.9)
        assert ("inverted" in [warning.code for warning in region.warnings]) == region.inverted


def test_a_white_implant_is_not_taken_for_air() -> None:
    image, mask = phantom(depth_mm=100.0)
    cv2.ellipse(image, (0, SIZE.height // 2), (130, 170), 0, 0, 360, 1.0, -1)
    x0, y0, x1, y1 = find_breast(image).box
    assert not find_breast(image[y0:y1, x0:x1]).inverted
    assert lost_fraction(find_breast(image), mask) == 0


def test_the_white_border_of_a_film_is_not_taken_for_air() -> None:
    image, _ = phantom("MLO", depth_mm=100.0)
    x0, y0, x1, y1 = find_breast(image).box
    film = np.pad(image[y0:y1, x0:x1], ((0, 0), (0, 8)))
    film[10:, -8:] = 1
    assert not find_breast(film).inverted


def test_partly_fogged_air_is_air() -> None:
    image, mask = phantom("MLO", depth_mm=70.0)
    image = np.maximum(image[:, :300], 0.002 * np.random.default_rng(0).random((SIZE.height, 300), np.float32))
    fogged = image.copy()
    fog = 0.03 + 0.01 * np.random.default_rng(1).random(fogged[300:].shape, np.float32)
    fogged[300:] = np.maximum(fogged[300:], fog)
    assert box_distance(find_breast(image), find_breast(fogged)) <= 6  # the faintest skin is as dark as the fog
    assert lost_fraction(find_breast(fogged), mask[:, :300]) <= 0.02


@pytest.mark.parametrize("view", ["CC", "MLO"])
def test_a_dense_breast_keeps_its_rim_of_dark_fat(view: ViewName) -> None:
    rendered = render(BreastPhantom(3, depth_mm=80.0), view, SIZE)
    depth = cv2.distanceTransform(rendered.mask.astype(np.uint8), cv2.DIST_L2, 5)
    air = np.linspace(0.015, 0.022, SIZE.height)[:, None] * np.ones(SIZE)  # darker at the top
    glands = 0.5 + 0.005 * np.minimum(depth, 100)
    fat = air + rendered.mask * (0.02 + 0.001 * depth)
    film = np.where(depth > 25, glands, fat).astype(np.float32)
    noise = 0.002 * np.random.default_rng(0).standard_normal(SIZE, np.float32)
    region = find_breast(np.clip(cv2.GaussianBlur(film, None, 1) + noise, 0, 1))
    assert lost_fraction(region, rendered.breast_mask) <= 0.005
    assert (region.mask & ~rendered.mask).sum() <= 0.04 * rendered.mask.sum()


def write_text(image: np.ndarray, text: str, origin: tuple[int, int]) -> np.ndarray:
    """Return the image with white text."""
    ink = cv2.putText(np.zeros(image.shape, np.uint8), text, origin, cv2.FONT_HERSHEY_SIMPLEX, 0.8, 255, 2)
    return np.maximum(image, ink.astype(np.float32) / 255)


def test_objects_in_the_air_do_not_move_the_box() -> None:
    image, _ = phantom()
    plain = find_breast(image)
    height, width = image.shape
    label, frame, bar, scratch = (image.copy() for _ in range(4))
    cv2.rectangle(label, (330, 20), (400, 80), 1.0, -1)
    cv2.rectangle(frame, (0, 0), (width - 1, height - 1), 1.0, 4)
    bar[:, plain.box.x1 + 8 : plain.box.x1 + 14] = 0.3  # the edge of a compression paddle
    for dirty in (label, bar, write_text(image, "R-CC", (plain.box.x1 + 20, 80))):
        assert box_distance(plain, find_breast(dirty)) <= 1
    cv2.line(scratch, (60, 0), (width - 1, height - 1), 1.0, 1)
    touching = write_text(image, "R-CC", (plain.box.x1 - 4, 260))
    # Objects that touch the breast are kept up to half of `MIN_WIDTH`, as nipples are.
    for dirty in (frame, scratch, touching):
        assert box_distance(plain, find_breast(dirty)) <= 8


@pytest.mark.parametrize("grey", [0.05, 1.0])
def test_a_skin_fold_across_the_breast_does_not_cut_it(grey: float) -> None:
    """A fold appears as a bright line, and the air trapped under it as a dark line."""
    image, mask = phantom("MLO")
    plain = find_breast(image)
    inside = image.copy()
    for row in (150, 400):
        cv2.line(inside, (0, row), (plain.box.x1, row - 40), grey, 3)
    folded = np.where(mask, inside, image)
    assert box_distance(plain, find_breast(folded)) <= 3
    assert lost_fraction(find_breast(folded), mask) <= 0.005


def test_padding_film_borders_and_collimation_are_excluded() -> None:
    image, _ = phantom()
    plain = find_breast(image)
    rng = np.random.default_rng(0)
    haze = np.maximum(image, 0.03 + 0.005 * rng.standard_normal(image.shape).astype(np.float32))
    border = 40
    for value in (0.0, 1.0):
        framed = np.pad(haze, border, constant_values=value)
        region = find_breast(framed)
        assert region.chest_wall == "left"
        assert np.abs(np.subtract(region.box, border) - plain.box).max() <= 4


def test_a_tightly_cropped_image_is_kept_whole() -> None:
    image, mask = phantom()
    x0, y0, x1, y1 = find_breast(image).box
    tight = find_breast(image[y0:y1, x0:x1])
    assert tight.chest_wall == "left"
    assert lost_fraction(tight, mask[y0:y1, x0:x1]) <= 0.001


def test_arm_and_belly_are_cut_at_the_fold() -> None:
    """The fold is where two overlapping bulges meet, and only the larger one is breast."""
    image = np.zeros(SIZE, np.float32)
    cv2.ellipse(image, (0, 260), (220, 170), 0, 0, 360, 0.5, -1)
    cv2.ellipse(image, (0, 30), (170, 80), 0, 0, 360, 0.5, -1)
    fold = 70 + int(np.argmin((image[70:200] > 0).sum(1)))
    assert abs(find_breast(image).box.y0 - fold) <= 25


def test_a_blank_image_is_refused() -> None:
    image = np.full(SIZE, 0.4, np.float32)
    image[100, 200:240] = 1  # a speck
    with pytest.raises(ImageRefusedError) as refusal:
        find_breast(image)
    assert refusal.value.code == "blank"


@pytest.mark.parametrize("shape", [(1, 1), (512, 1), (7, 512)])
def test_a_narrow_strip_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ImageRefusedError, match="too narrow"):
        find_breast(np.random.default_rng(0).random(shape, np.float32))


def test_an_image_of_text_is_refused() -> None:
    image = np.zeros(SIZE, np.float32)
    for row in range(30, 500, 25):
        image = write_text(image, "display should inform user", (10, row))
    with pytest.raises(ImageRefusedError) as refusal:
        find_breast(image)
    assert refusal.value.code == "no_breast"


def read_view(path: Path) -> np.ndarray:
    """Return a picture as a view of at most 512 pixels, float32 `(H, W)` in [0, 1]."""
    stored = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    assert stored is not None
    image = stored.astype(np.float32) / 255
    factor = min(1, 512 / max(image.shape))
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)


def intersection_over_union(first: np.ndarray, second: np.ndarray) -> float:
    """Return the overlap of two boxes (x0, y0, x1, y1)."""
    sides = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
    common = np.clip(sides, 0, None).prod()
    return common / ((first[2:] - first[:2]).prod() + (second[2:] - second[:2]).prod() - common)


def test_boxes_agree_with_hand_drawn_boxes(shared_data: Path) -> None:
    boxes = pd.read_csv(shared_data / "metadata" / "rsna" / "breast_boxes_hand_labelled.csv")
    paths = pd.read_csv(shared_data / "rsna_640" / "rsna_640.csv")[["image_id", "image_path"]]
    overlaps = []
    for row in paths.merge(boxes.drop_duplicates("image_id"), on="image_id").itertuples():
        view = read_view(shared_data / "rsna_640" / str(row.image_path))
        height, width = view.shape
        corners = [row.x0_frac, row.y0_frac, row.x0_frac + row.w_frac, row.y0_frac + row.h_frac]
        hand_drawn = np.array(corners) * [width, height, width, height]
        overlaps.append(intersection_over_union(hand_drawn, np.array(find_breast(view).box)))
    assert len(overlaps) >= 16
    assert np.median(overlaps) >= 0.93
    assert min(overlaps) >= 0.80


def test_a_film_in_two_codecs_has_the_same_box(shared_data: Path) -> None:
    """A hole and a lettered border cover 1.4 % of the film; the second codec rings slightly more around them."""
    regions = []
    for codec in ("j2k_lossy", "jpegext12_undecodable"):
        film = open_image(shared_data / "dicom_edge" / "dicom" / f"mg_nema_mg1_{codec}.dcm")
        view = cv2.resize(film.read_stored(), (336, 512), interpolation=cv2.INTER_AREA)
        regions.append(find_breast(film.to_grey(view)))
    assert regions[0].chest_wall == regions[1].chest_wall == "left"
    assert box_distance(regions[0], regions[1]) <= 4


def test_films_have_the_stated_chest_wall_and_no_lesion_outside_the_box(shared_data: Path) -> None:
    films = pd.read_csv(shared_data / "mias_512" / "mias_512.csv")
    correct_sides = 0
    lesions_outside = 0
    for row in films.itertuples():
        region = find_breast(read_view(shared_data / "mias_512" / str(row.image_path)))
        correct_sides += region.chest_wall == row.chest_wall_side
        if pd.notna(row.x):
            x0, y0, x1, y1 = region.box
            lesions_outside += not (x0 <= row.x < x1 and y0 <= row.y_top_left < y1)
    assert correct_sides >= 0.99 * len(films)
    assert lesions_outside == 0
