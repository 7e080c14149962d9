"""The crop keeps the breast and leaves the rest, whatever lies beside it; held to hand-drawn boxes, known sides and known masks."""

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
    """Image and true mask of the breast, chest wall at the left."""
    drawn = render(BreastPhantom(seed, **shape), view, SIZE)  # type: ignore[arg-type]
    return drawn.image, drawn.breast_mask


def lost(found: BreastRegion, mask: np.ndarray) -> float:
    return float((mask & ~found.mask).sum() / mask.sum())


def shift(a: BreastRegion, b: BreastRegion) -> int:
    return max(abs(one - other) for one, other in zip(a.box, b.box, strict=True))


@pytest.mark.parametrize("view", ["CC", "MLO"])
@pytest.mark.parametrize("seed", range(10))
def test_no_tissue_is_cut_off(view: ViewName, seed: int) -> None:
    side = "LR"[seed % 2]
    drawn = render(
        BreastPhantom(seed, side, "ABCD"[seed % 4], depth_mm=60 + 5 * seed, implant=seed % 5 == 4), view, SIZE
    )
    air, marker = 0.05 * (seed % 4), "lead" if seed % 3 else "text"
    style = VendorStyle(0.5, 1.2, 0, air, marker, 0.05 + 0.09 * seed, 4 * (seed % 3))  # type: ignore[arg-type]
    noise = 0.01 * (seed % 4) * np.random.default_rng(seed).standard_normal(SIZE, np.float32)  # in the air, too
    found = find_breast(np.clip(apply_style(drawn, style, f"{side} {view}", seed, side) + noise, 0, 1))
    assert found.chest_wall == ("left" if side == "L" else "right")
    assert lost(found, drawn.breast_mask) <= 0.005
    assert (found.mask & ~drawn.mask).sum() <= 0.04 * drawn.mask.sum()  # a pixel around
    x0, y0, x1, y1 = found.box
    assert found.mask[y0:y1, x0:x1].sum() == found.mask.sum()


def test_mirrored_image_has_the_mirrored_box() -> None:
    image, _ = phantom("MLO")
    a, b = find_breast(image), find_breast(np.ascontiguousarray(image[:, ::-1]))
    assert (a.chest_wall, b.chest_wall) == ("left", "right")
    assert np.mean(a.mask != b.mask[:, ::-1]) < 1e-3


def test_polarity_brightness_and_pedestal_do_not_matter() -> None:
    image, _ = phantom()
    plain = find_breast(image)
    for changed in (0.3 * image, 0.3 + 0.5 * image, 1 - image):
        found = find_breast(changed)
        assert shift(plain, found) <= 1
        assert found.inverted == (changed[0, -1] > 0.9)
        assert ("inverted" in [warning.code for warning in found.warnings]) == found.inverted


def test_a_white_implant_is_not_taken_for_air() -> None:
    image, mask = phantom(depth_mm=100.0)
    cv2.ellipse(image, (0, SIZE.height // 2), (130, 170), 0, 0, 360, 1.0, -1)
    x0, y0, x1, y1 = find_breast(image).box
    assert not find_breast(image[y0:y1, x0:x1]).inverted
    assert lost(find_breast(image), mask) == 0


def test_the_white_border_of_a_film_is_not_taken_for_air() -> None:
    image, _ = phantom("MLO", depth_mm=100.0)
    x0, y0, x1, y1 = find_breast(image).box
    film = np.pad(image[y0:y1, x0:x1], ((0, 0), (0, 8)))
    film[10:, -8:] = 1
    assert not find_breast(film).inverted


def test_air_that_is_fogged_in_one_part_is_air() -> None:
    image, mask = phantom("MLO", depth_mm=70.0)
    image = np.maximum(image[:, :300], 0.002 * np.random.default_rng(0).random((SIZE.height, 300), np.float32))
    fogged = image.copy()
    fogged[300:] = np.maximum(
        fogged[300:], 0.03 + 0.01 * np.random.default_rng(1).random(fogged[300:].shape, np.float32)
    )
    assert shift(find_breast(image), find_breast(fogged)) <= 6  # the faintest skin is as dark as the fog
    assert lost(find_breast(fogged), mask[:, :300]) <= 0.02


@pytest.mark.parametrize("view", ["CC", "MLO"])
def test_a_dense_breast_keeps_its_rim_of_dark_fat(view: ViewName) -> None:
    drawn = render(BreastPhantom(3, depth_mm=80.0), view, SIZE)
    depth = cv2.distanceTransform(drawn.mask.astype(np.uint8), cv2.DIST_L2, 5)
    air = np.linspace(0.015, 0.022, SIZE.height)[:, None] * np.ones(SIZE)  # darker at the top
    film = np.where(depth > 25, 0.5 + 0.005 * np.minimum(depth, 100), air + drawn.mask * (0.02 + 0.001 * depth)).astype(
        np.float32
    )
    noise = 0.002 * np.random.default_rng(0).standard_normal(SIZE, np.float32)
    found = find_breast(np.clip(cv2.GaussianBlur(film, None, 1) + noise, 0, 1))
    assert lost(found, drawn.breast_mask) <= 0.005
    assert (found.mask & ~drawn.mask).sum() <= 0.04 * drawn.mask.sum()


def write(image: np.ndarray, text: str, place: tuple[int, int]) -> np.ndarray:
    ink = cv2.putText(np.zeros(image.shape, np.uint8), text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.8, 255, 2)
    return np.maximum(image, ink.astype(np.float32) / 255)


def test_objects_in_the_air_do_not_move_the_box() -> None:
    image, _ = phantom()
    plain = find_breast(image)
    height, width = image.shape
    label, frame, bar, scratch = (image.copy() for _ in range(4))
    cv2.rectangle(label, (330, 20), (400, 80), 1.0, -1)
    cv2.rectangle(frame, (0, 0), (width - 1, height - 1), 1.0, 4)
    bar[:, plain.box.x1 + 8 : plain.box.x1 + 14] = 0.3  # the edge of a compression paddle
    for dirty in (label, bar, write(image, "R-CC", (plain.box.x1 + 20, 80))):
        assert shift(plain, find_breast(dirty)) <= 1
    cv2.line(scratch, (60, 0), (width - 1, height - 1), 1.0, 1)
    touching = write(image, "R-CC", (plain.box.x1 - 4, 260))
    for dirty in (
        frame,
        scratch,
        touching,
    ):  # what touches the breast stays for half the least width, so that nipples do
        assert shift(plain, find_breast(dirty)) <= 8


@pytest.mark.parametrize("grey", [0.05, 1.0])
def test_a_skin_fold_across_the_breast_does_not_cut_it(grey: float) -> None:
    """A fold shows as a bright line, the air caught under it as a dark one."""
    image, mask = phantom("MLO")
    plain = find_breast(image)
    inside = image.copy()
    for row in (150, 400):
        cv2.line(inside, (0, row), (plain.box.x1, row - 40), grey, 3)
    folded = np.where(mask, inside, image)
    assert shift(plain, find_breast(folded)) <= 3
    assert lost(find_breast(folded), mask) <= 0.005


def test_borders_of_film_padding_and_collimation_are_left_out() -> None:
    image, _ = phantom()
    plain = find_breast(image)
    rng = np.random.default_rng(0)
    haze = np.maximum(image, 0.03 + 0.005 * rng.standard_normal(image.shape).astype(np.float32))
    for border, value in ((40, 0.0), (40, 1.0)):
        framed = np.pad(haze, border, constant_values=value)
        found = find_breast(framed)
        assert found.chest_wall == "left"
        assert max(abs(a - border - b) for a, b in zip(found.box, plain.box, strict=True)) <= 4


def test_a_tight_crop_stays_whole() -> None:
    image, mask = phantom()
    x0, y0, x1, y1 = find_breast(image).box
    tight = find_breast(image[y0:y1, x0:x1])
    assert tight.chest_wall == "left"
    assert lost(tight, mask[y0:y1, x0:x1]) <= 0.001


def test_arm_and_belly_are_cut_at_the_fold() -> None:
    """Two overlapping bulges: the fold is where they meet, and only the greater one is breast."""
    image = np.zeros(SIZE, np.float32)
    cv2.ellipse(image, (0, 260), (220, 170), 0, 0, 360, 0.5, -1)
    cv2.ellipse(image, (0, 30), (170, 80), 0, 0, 360, 0.5, -1)
    fold = 70 + int(np.argmin((image[70:200] > 0).sum(1)))
    assert abs(find_breast(image).box.y0 - fold) <= 25


def test_blank_is_refused() -> None:
    image = np.full(SIZE, 0.4, np.float32)
    image[100, 200:240] = 1  # a speck
    with pytest.raises(ImageRefusedError) as refusal:
        find_breast(image)
    assert refusal.value.code == "blank"


@pytest.mark.parametrize("shape", [(1, 1), (512, 1), (7, 512)])
def test_a_strip_is_no_breast(shape: tuple[int, int]) -> None:
    with pytest.raises(ImageRefusedError, match="strip"):
        find_breast(np.random.default_rng(0).random(shape, np.float32))


def test_text_is_no_breast() -> None:
    image = np.zeros(SIZE, np.float32)
    for row in range(30, 500, 25):
        image = write(image, "display should inform user", (10, row))
    with pytest.raises(ImageRefusedError) as refusal:
        find_breast(image)
    assert refusal.value.code == "no_breast"


def picture(path: Path) -> np.ndarray:
    stored = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    assert stored is not None
    image = stored.astype(np.float32) / 255
    factor = min(1, 512 / max(image.shape))
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)


def test_hand_drawn_boxes(shared_data: Path) -> None:
    boxes = pd.read_csv(shared_data / "metadata" / "rsna" / "breast_boxes_hand_labelled.csv").drop_duplicates(
        "image_id"
    )
    images = pd.read_csv(shared_data / "rsna_640" / "rsna_640.csv")[["image_id", "image_path"]].merge(
        boxes, on="image_id"
    )
    overlaps = []
    for row in images.itertuples():
        view = picture(shared_data / "rsna_640" / str(row.image_path))
        height, width = view.shape
        hand = np.array([row.x0_frac, row.y0_frac, row.x0_frac + row.w_frac, row.y0_frac + row.h_frac]) * [
            width,
            height,
            width,
            height,
        ]
        box = np.array(find_breast(view).box)
        common = np.clip(np.minimum(hand[2:], box[2:]) - np.maximum(hand[:2], box[:2]), 0, None).prod()
        overlaps.append(common / ((hand[2:] - hand[:2]).prod() + (box[2:] - box[:2]).prod() - common))
    assert len(overlaps) >= 16
    assert np.median(overlaps) >= 0.93
    assert min(overlaps) >= 0.80


def test_one_film_in_two_codecs_has_one_box(shared_data: Path) -> None:
    """A hole in the film and a lettered border cover 1.4 % of it; the second codec rings a little more around them."""
    films = [
        open_image(shared_data / "dicom_edge" / "dicom" / f"mg_nema_mg1_{kind}.dcm")
        for kind in ("j2k_lossy", "jpegext12_undecodable")
    ]
    first, second = (
        find_breast(film.to_grey(cv2.resize(film.read_stored(), (336, 512), interpolation=cv2.INTER_AREA)))
        for film in films
    )
    assert first.chest_wall == second.chest_wall == "left"
    assert shift(first, second) <= 4


def test_film_sides_and_lesions(shared_data: Path) -> None:
    films = pd.read_csv(shared_data / "mias_512" / "mias_512.csv")
    right = outside = 0
    for row in films.itertuples():
        found = find_breast(picture(shared_data / "mias_512" / str(row.image_path)))
        right += found.chest_wall == row.chest_wall_side
        if row.x == row.x:
            x0, y0, x1, y1 = found.box
            outside += not (x0 <= row.x < x1 and y0 <= row.y_top_left < y1)
    assert right >= 0.99 * len(films)
    assert outside == 0
