"""Augmentation: air stays air, denser tissue stays brighter, 16 bits are kept, equal seeds give equal results."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import cv2
import numpy as np
import pytest

from vitmodel.config import AugmentConfig
from vitmodel.data.transforms import Augmentation

OFF = AugmentConfig(flip=0, rotate=0, scale=0, shift=0, gamma=0, contrast=0, noise=0)
ALL = AugmentConfig(elastic=0.08, window=0.1, blur=1.0, holes=3)
SINGLE = [
    {"flip": 1.0},
    {"mirror": 1.0},
    {"area": 0.3},
    {"rotate": 20.0},
    {"scale": 0.2},
    {"shift": 0.1},
    {"gamma": 0.4},
    {"contrast": 0.3},
    {"noise": 0.02},
    {"elastic": 0.08},
    {"window": 0.1},
    {"blur": 1.5},
    {"holes": 4},
]


def breast() -> np.ndarray:
    """Return half an ellipse at the left edge, brighter towards its middle, `(H, W)` float32; air is 0."""
    rows, columns = np.mgrid[:96, :64].astype(np.float32)
    inside = 1 - ((rows - 45) / 40) ** 2 - (columns / 50) ** 2
    return np.where(inside > 0, 0.2 + 0.6 * inside.clip(0), 0).astype(np.float32)


def sampled(config: AugmentConfig, seed: int) -> Augmentation:
    return Augmentation.sample(config, np.random.default_rng(seed))


def test_an_augmentation_with_all_changes_off_changes_nothing() -> None:
    np.testing.assert_array_equal(sampled(OFF, 0).apply(breast()), breast())


@pytest.mark.parametrize("change", SINGLE, ids=lambda change: next(iter(change)))
def test_each_change_has_an_effect_and_depends_on_its_seed_alone(change: dict[str, Any]) -> None:
    config = replace(OFF, **change)
    image = breast()
    results = [sampled(config, seed).apply(image) for seed in range(4)]
    assert any((result != breast()).any() for result in results)
    np.testing.assert_array_equal(image, breast())  # the input is not modified
    np.testing.assert_array_equal(results[3], sampled(config, 3).apply(image))


@pytest.mark.parametrize("seed", range(25))
def test_air_stays_0_and_tissue_stays_above_0(seed: int) -> None:
    result = sampled(ALL, seed).apply(breast())
    assert result.dtype == np.float32
    assert result.max() <= 1
    assert result.min() == 0
    tissue = result > 0
    assert result[tissue].min() >= 1 / 65536
    count, _ = cv2.connectedComponents(tissue.astype(np.uint8))
    assert count == 2, "one breast, without holes of air"
    geometry = replace(sampled(ALL, seed), noise=0, blur=0, holes=0, gamma=1, contrast=1, window=(0.0, 1.0))
    np.testing.assert_array_equal(tissue, geometry.apply(breast()) > 0)  # only geometric changes move the border


@pytest.mark.parametrize("seed", range(10))
def test_polarity_is_never_inverted(seed: int) -> None:
    """Without geometry, noise and holes, denser tissue is not darker afterwards."""
    config = AugmentConfig(flip=0, rotate=0, scale=0, shift=0, noise=0, gamma=0.5, contrast=0.5, window=0.3)
    image = breast()
    before = image[image > 0]
    after = sampled(config, seed).apply(image)[image > 0]
    order = np.argsort(before)
    assert (np.diff(after[order]) >= -1e-6).all()


def test_the_steps_of_a_16_bit_crop_are_kept() -> None:
    """Neighbouring steps of a 16-bit crop remain distinct under a change of gamma."""
    ramp = (np.arange(20_000, 20_000 + 64 * 96).reshape(96, 64) / 65535).astype(np.float32)
    result = sampled(replace(OFF, gamma=0.2), 1).apply(ramp)
    assert (np.diff(result.ravel()) > 0).all()


def test_parameters_span_their_configured_ranges() -> None:
    """Also, no parameter depends on which other changes are switched on."""
    samples = [sampled(ALL, seed) for seed in range(400)]
    assert max(abs(sample.angle) for sample in samples) == pytest.approx(ALL.rotate, rel=0.02)
    assert max(sample.elastic for sample in samples) == pytest.approx(ALL.elastic, rel=0.02)
    assert {sample.holes for sample in samples} == {0, 1, 2, 3}
    assert np.mean([sample.flip for sample in samples]) == pytest.approx(0.5, abs=0.1)
    for field in fields(Augmentation):
        if field.name not in ("elastic", "window", "blur", "holes"):
            assert getattr(sampled(ALL, 5), field.name) == getattr(sampled(AugmentConfig(), 5), field.name)


def test_a_transformed_box_encloses_its_pixels() -> None:
    """The box of a bright rectangle encloses it after the change, and tightly if there is no elastic change."""
    image = np.full((192, 128), 0.1, np.float32)
    box = np.array([[40, 60, 56, 84]], np.float32)
    image[60:84, 40:56] = 1
    for seed in range(12):
        for elastic in (0.0, 0.05):
            config = replace(OFF, flip=0.5, mirror=0.5, area=0.8, rotate=15, scale=0.2, shift=0.05, elastic=elastic)
            augmentation = sampled(config, seed)
            rows, columns = np.nonzero(augmentation.apply(image) > 0.6)
            bright_box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            (transformed,) = augmentation.transform_boxes(box, (192, 128))
            visible_box = np.clip(transformed, 0, [128, 192, 128, 192])  # a part may be moved out of the image
            assert (bright_box[:2] >= visible_box[:2] - 1.5).all()
            assert (bright_box[2:] <= visible_box[2:] + 1.5).all()
            assert np.abs(bright_box - visible_box).max() <= 3 + 2 * 128 * elastic


def test_geometry_gamma_and_blur_equal_monai() -> None:
    """Apply MONAI's transforms to the same crop with the same parameters.

    MONAI does not treat air separately, so its blurred image is divided by its blurred mask.
    """
    transforms = pytest.importorskip("monai.transforms", reason="MONAI is needed for the comparison")
    image = breast() / breast().max()
    identity = sampled(OFF, 0)
    moved = replace(identity, angle=11.0, scale=1.1, shift=(0.05, -0.03))
    matrix = cv2.getRotationMatrix2D((0, (image.shape[0] - 1) / 2), moved.angle, moved.scale)
    matrix[:, 2] += np.array(moved.shift) * image.shape[::-1]
    inverse_xy = np.vstack([cv2.invertAffineTransform(matrix), [0, 0, 1]])
    inverse = inverse_xy[np.ix_([1, 0, 2], [1, 0, 2])]  # from (x, y) to (row, column)
    center = np.eye(3)
    center[:2, 2] = (np.array(image.shape) - 1) / 2  # MONAI has its origin at the image's centre
    affine = transforms.Affine(affine=np.linalg.inv(center) @ inverse @ center, padding_mode="zeros", image_only=True)
    np.testing.assert_allclose(moved.apply(image), np.asarray(affine(image[None]))[0], atol=0.01)

    gamma = transforms.AdjustContrast(gamma=1.4)
    np.testing.assert_allclose(replace(identity, gamma=1.4).apply(image), np.asarray(gamma(image[None]))[0], atol=1e-4)

    smooth = transforms.GaussianSmooth(sigma=1.5, approx="sampled")
    tissue = (image > 0).astype(np.float32)
    blurred_image = np.asarray(smooth(image[None]))[0]
    blurred_mask = np.asarray(smooth(tissue[None]))[0]
    blurred = np.where(tissue, blurred_image / np.maximum(blurred_mask, 1e-6), 0)
    np.testing.assert_allclose(replace(identity, blur=1.5).apply(image), blurred, atol=2e-3)
