"""Phantoms are consistent across sizes and views, lesions lie in their boxes, and vendor styles preserve the label."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import cv2
import numpy as np
import pytest

from vitmodel.config import Size
from vitmodel.phantoms.anatomy import BreastPhantom, PhantomView, pixel_spacing, power_law_noise, render
from vitmodel.phantoms.lesions import BENIGN_KINDS, CANCER_KINDS, Lesion, ViewName, sample_lesion
from vitmodel.phantoms.specks import sample_specks
from vitmodel.phantoms.style import VendorStyle, apply_style

SIZE = Size(384, 312)
VIEWS: tuple[ViewName, ...] = ("CC", "MLO")
KINDS = CANCER_KINDS + BENIGN_KINDS
MASS = Lesion("round_mass", (0.55, 0.4, 0.1), 9, 1.0, seed=1)


@pytest.mark.parametrize("view", VIEWS)
def test_the_same_arguments_give_the_same_pixels_and_another_seed_different_ones(view: ViewName) -> None:
    breast = BreastPhantom(seed=3)
    first = render(breast, view, SIZE).image
    assert first.dtype == np.float32
    assert first.shape == SIZE
    assert 0 <= first.min() < first.max() <= 1
    np.testing.assert_array_equal(first, render(breast, view, SIZE).image)
    assert not np.array_equal(first, render(replace(breast, seed=4), view, SIZE).image)


def test_a_breast_is_the_same_at_every_size() -> None:
    breast = BreastPhantom(seed=5, density="C", lesions=(MASS,))
    large = render(breast, "MLO", Size(768, 624))
    small = render(breast, "MLO", SIZE)
    shrunk = cv2.resize(large.image, (SIZE.width, SIZE.height), interpolation=cv2.INTER_AREA)
    assert np.corrcoef(shrunk[small.mask], small.image[small.mask])[0, 1] > 0.95
    np.testing.assert_allclose(np.array(large.boxes) / 2, small.boxes, atol=3)


@pytest.mark.parametrize("view", VIEWS)
def test_the_chest_wall_of_a_left_breast_is_at_the_left_and_of_a_right_breast_at_the_right(view: ViewName) -> None:
    left, right = (render(BreastPhantom(seed=6, laterality=side, lesions=(MASS,)), view, SIZE) for side in "LR")
    assert left.mask[:, 0].mean() > 0.5
    assert not left.mask[:, -1].any()
    np.testing.assert_array_equal(left.mask, right.mask[:, ::-1])
    (x0, _, x1, _), (mirrored_x0, _, mirrored_x1, _) = left.boxes[0], right.boxes[0]
    assert (mirrored_x0, mirrored_x1) == (SIZE.width - x1, SIZE.width - x0)


def test_the_image_is_black_outside_the_breast_only() -> None:
    view = render(BreastPhantom(seed=7), "CC", SIZE)
    assert (view.image[~view.mask] == 0).all()
    assert (view.image[view.mask] > 0).mean() > 0.97


def test_the_pectoral_muscle_is_visible_in_the_oblique_view_only() -> None:
    corner = np.s_[10:60, :15]
    cc, mlo = (render(BreastPhantom(seed=8, density="A"), view, SIZE) for view in VIEWS)
    fat = np.median(mlo.image[mlo.mask])
    assert np.median(mlo.image[corner]) > fat + 0.15
    assert np.median(cc.image[cc.mask][: 15 * 50]) < fat + 0.15


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("view", VIEWS)
def test_a_lesion_brightens_its_box_and_nothing_else(kind: str, view: ViewName) -> None:
    lesion = replace(sample_lesion(kind, 0.2, seed=2), position=(0.55, 0.1, 0.1))
    bare = BreastPhantom(seed=9, density="A", depth_mm=100)
    with_lesion = render(replace(bare, lesions=(lesion,)), view, SIZE)
    added = with_lesion.image - render(bare, view, SIZE).image
    x0, y0, x1, y1 = with_lesion.boxes[0]
    assert 0 <= x0 < x1 <= SIZE.width
    assert 0 <= y0 < y1 <= SIZE.height
    assert added[y0:y1, x0:x1].sum() > 0.8 * np.abs(added).sum() > 0
    assert added.max() > 0.1


def test_both_views_show_a_lesion_at_the_same_distance_from_the_nipple() -> None:
    """Radiologists use this rule: depth is equal in both views; height depends on the lateral and up coordinates."""
    for position in ((0.5, 0.5, 0.2), (0.7, -0.3, -0.4)):
        breast = BreastPhantom(seed=10, depth_mm=100, lesions=(replace(MASS, position=position),))
        views = {name: render(breast, name, SIZE) for name in VIEWS}
        centre = {name: np.array(view.boxes[0]).reshape(2, 2).mean(0) for name, view in views.items()}  # (x, y)
        nipple = {name: nipple_row(view) for name, view in views.items()}
        assert centre["CC"][0] == pytest.approx(centre["MLO"][0], abs=2)
        assert centre["CC"][0] * pixel_spacing(SIZE) == pytest.approx(position[0] * 100, abs=3)
        assert (centre["CC"][1] < nipple["CC"]) == (position[1] > 0)
        assert (centre["MLO"][1] < nipple["MLO"]) == (position[1] + position[2] > 0)


def nipple_row(view: PhantomView) -> float:
    """Return the row of the nipple, the middle of the widest rows."""
    widths = view.mask.sum(1)
    return float(np.flatnonzero(widths == widths.max()).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_difficulty_reduces_the_signal(kind: str) -> None:
    bare = render(BreastPhantom(seed=11, density="A"), "CC", SIZE).image

    def signal(difficulty: float) -> float:
        breast = BreastPhantom(seed=11, density="A", lesions=(sample_lesion(kind, difficulty, seed=12),))
        return float((render(breast, "CC", SIZE).image - bare).sum())

    assert signal(0) > 1.5 * signal(0.5) > 2 * signal(1) > 0


def test_brightness_increases_with_the_density_class() -> None:
    def brightness(density: str) -> float:
        views = [render(BreastPhantom(seed=seed, density=density), "CC", Size(192, 156)) for seed in range(4)]
        return float(np.mean([view.image[view.mask].mean() for view in views]))

    levels = [brightness(density) for density in "ABCD"]
    assert np.diff(levels).min() > 0.015


def test_a_repeated_exposure_has_different_noise_and_the_same_anatomy() -> None:
    breast = BreastPhantom(seed=13, lesions=(MASS,))
    first = render(breast, "CC", SIZE)
    second = render(breast, "CC", SIZE, repeat=1)
    assert not np.array_equal(first.image, second.image)
    assert abs(int(first.mask.sum()) - int(second.mask.sum())) < 0.02 * first.mask.sum()


@pytest.mark.parametrize("beta", [2.0, 3.0])
def test_power_law_noise_has_the_requested_exponent(beta: float) -> None:
    noise = power_law_noise(np.random.default_rng(0), (512, 512), beta, (1e-3, 1e6), spacing=1.0)
    power = np.abs(np.fft.fft2(noise)) ** 2
    frequency = np.hypot(np.fft.fftfreq(512)[:, None], np.fft.fftfreq(512)[None, :])
    middle = (frequency > 0.02) & (frequency < 0.4)
    slope = np.polyfit(np.log(frequency[middle]), np.log(power[middle]), 1)[0]
    assert -slope == pytest.approx(beta, abs=0.05)


@pytest.mark.parametrize("chest_wall", ["L", "R"])
@pytest.mark.parametrize("marker", ["text", "lead"])
def test_a_style_draws_its_marker_over_air_away_from_the_chest_wall(
    marker: Literal["text", "lead"], chest_wall: str
) -> None:
    view = render(BreastPhantom(seed=14, laterality=chest_wall, depth_mm=70), "CC", SIZE)
    plain, marked = (
        apply_style(view, VendorStyle(black_level=0.02, marker=name), f"{chest_wall} CC", 0, chest_wall)
        for name in ("none", marker)
    )
    np.testing.assert_array_equal(plain[view.mask], marked[view.mask])
    columns = np.flatnonzero((plain != marked).any(0))
    assert len(columns) > 10
    assert (columns > SIZE.width / 2).all() if chest_wall == "L" else (columns < SIZE.width / 2).all()
    assert plain[~view.mask] == pytest.approx(0.02)


def test_a_style_preserves_the_order_of_grey_values() -> None:
    view = render(BreastPhantom(seed=15), "CC", SIZE)
    styled = apply_style(view, VendorStyle(midpoint=0.4, slope=1.6, marker="none"), "", 0, "L")
    order = np.argsort(view.image[view.mask])
    assert np.diff(styled[view.mask][order]).min() >= -1e-6
    assert abs(float(styled[view.mask].mean() - view.image[view.mask].mean())) > 0.005


def test_neither_brightness_nor_a_coarse_view_reveals_which_spots_are_sharp() -> None:
    """With and without a cancer, a seed gives spots of equal mass and the same crop in pixels coarser than the blur."""
    for seed in range(3):
        cancer, benign = (sample_specks(seed, label, 1024) for label in (True, False))
        assert cancer.box == benign.box
        difference = cancer.image - benign.image
        x0, y0, x1, y1 = (round(edge) for edge in cancer.box)
        cluster = difference[y0 - 12 : y1 + 12, x0 - 12 : x1 + 12]
        assert cluster.max() > 0.3
        assert abs(cluster.sum()) < 0.05 * np.abs(cluster).sum()
        size = difference.shape[1] // 16, difference.shape[0] // 16
        assert np.abs(cv2.resize(difference, size, interpolation=cv2.INTER_AREA)).max() < 0.02
