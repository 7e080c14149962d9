"""Augmentation: air stays air, denser stays brighter, 16 bits stay 16 bits, and a parameter sampled is a change determined."""

from __future__ import annotations

from dataclasses import fields, replace

import cv2
import numpy as np
import pytest

from vitmodel.config import AugmentConfig
from vitmodel.data.transforms import Augmentation

OFF = AugmentConfig(flip=0, rotate=0, scale=0, shift=0, gamma=0, contrast=0, noise=0)
ALL = AugmentConfig(elastic=0.08, window=0.1, blur=1.0, holes=3)
SINGLE = [
    *(
        {"flip": 1.0},
        {"mirror": 1.0},
        {"area": 0.3},
        {"rotate": 20.0},
        {"scale": 0.2},
        {"shift": 0.1},
        {"gamma": 0.4},
        {"contrast": 0.3},
        {"noise": 0.02},
    ),
    *({"elastic": 0.08}, {"window": 0.1}, {"blur": 1.5}, {"holes": 4}),
]


def breast() -> np.ndarray:
    """Half an ellipse at the left edge, brighter towards its middle, H W float32; air is 0."""
    rows, columns = np.mgrid[:96, :64].astype(np.float32)
    inside = 1 - ((rows - 45) / 40) ** 2 - (columns / 50) ** 2
    return np.where(inside > 0, 0.2 + 0.6 * inside.clip(0), 0).astype(np.float32)


def drawn(config: AugmentConfig, seed: int) -> Augmentation:
    return Augmentation.sample(config, np.random.default_rng(seed))


def test_switched_off_it_changes_nothing() -> None:
    np.testing.assert_array_equal(drawn(OFF, 0).apply(breast()), breast())


@pytest.mark.parametrize("change", SINGLE, ids=lambda change: next(iter(change)))
def test_each_change_changes_and_is_determined(change) -> None:
    config = replace(OFF, **change)
    image = breast()
    results = [drawn(config, seed).apply(image) for seed in range(4)]
    assert any((result != breast()).any() for result in results)
    np.testing.assert_array_equal(image, breast())  # applied purely
    np.testing.assert_array_equal(results[3], drawn(config, 3).apply(image))


@pytest.mark.parametrize("seed", range(25))
def test_air_stays_0_and_tissue_stays_above(seed: int) -> None:
    result = drawn(ALL, seed).apply(breast())
    assert result.dtype == np.float32
    assert result.max() <= 1
    assert result.min() == 0
    tissue = result > 0
    assert result[tissue].min() >= 1 / 65536
    count, _ = cv2.connectedComponents(tissue.astype(np.uint8))
    assert count == 2, "one breast, without holes of air"
    still = replace(drawn(ALL, seed), noise=0, blur=0, holes=0, gamma=1, contrast=1, window=(0.0, 1.0)).apply(breast())
    np.testing.assert_array_equal(tissue, still > 0)  # only geometry moves the border


@pytest.mark.parametrize("seed", range(10))
def test_polarity_is_never_turned(seed: int) -> None:
    """Without geometry, noise and holes, what was denser is not darker afterwards."""
    config = AugmentConfig(flip=0, rotate=0, scale=0, shift=0, noise=0, gamma=0.5, contrast=0.5, window=0.3)
    image = breast()
    before, after = image[image > 0], drawn(config, seed).apply(image)[image > 0]
    order = np.argsort(before)
    assert (np.diff(after[order]) >= -1e-6).all()


def test_16_bits_are_kept() -> None:
    """Neighbouring steps of a 16-bit crop stay apart under a change of gamma."""
    ramp = (np.arange(20_000, 20_000 + 64 * 96).reshape(96, 64) / 65535).astype(np.float32)
    result = drawn(replace(OFF, gamma=0.2), 1).apply(ramp)
    assert (np.diff(result.ravel()) > 0).all()


def test_moments_are_as_configured() -> None:
    """Each parameter spans its range, and no draw depends on what else is switched on."""
    some = [drawn(ALL, seed) for seed in range(400)]
    assert max(abs(each.angle) for each in some) == pytest.approx(ALL.rotate, rel=0.02)
    assert max(each.elastic for each in some) == pytest.approx(ALL.elastic, rel=0.02)
    assert {each.holes for each in some} == {0, 1, 2, 3}
    assert np.mean([each.flip for each in some]) == pytest.approx(0.5, abs=0.1)
    for field in fields(Augmentation):
        if field.name not in ("elastic", "window", "blur", "holes"):
            assert getattr(drawn(ALL, 5), field.name) == getattr(drawn(AugmentConfig(), 5), field.name)


def test_a_box_goes_where_its_pixels_go() -> None:
    """A bright square is drawn, changed and found again: its box encloses it, and closely where nothing is elastic."""
    image = np.full((192, 128), 0.1, np.float32)
    box = np.array([[40, 60, 56, 84]], np.float32)
    image[60:84, 40:56] = 1
    for seed in range(12):
        for elastic in (0.0, 0.05):
            change = drawn(
                replace(OFF, flip=0.5, mirror=0.5, area=0.8, rotate=15, scale=0.2, shift=0.05, elastic=elastic), seed
            )
            rows, columns = np.nonzero(change.apply(image) > 0.6)
            found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            ((x0, y0, x1, y1),) = change.transform_boxes(box, (192, 128))
            whole = np.clip([x0, y0, x1, y1], 0, [128, 192, 128, 192])  # it may be moved out of the image
            assert (found[:2] >= whole[:2] - 1.5).all()
            assert (found[2:] <= whole[2:] + 1.5).all()
            assert np.abs(found - whole).max() <= 3 + 2 * 128 * elastic


def test_geometry_gamma_and_blur_equal_monai() -> None:
    """What MONAI has of it, applied to the same crop with the same parameters. It knows no air, so its blur is divided by the mask's."""
    transforms = pytest.importorskip("monai.transforms", reason="MONAI is a peer of the tests")
    image = breast() / breast().max()
    still = drawn(OFF, 0)
    moved = replace(still, angle=11.0, scale=1.1, shift=(0.05, -0.03))
    matrix = cv2.getRotationMatrix2D((0, (image.shape[0] - 1) / 2), moved.angle, moved.scale)
    matrix[:, 2] += np.array(moved.shift) * image.shape[::-1]
    inverse = np.vstack([cv2.invertAffineTransform(matrix), [0, 0, 1]])[
        np.ix_([1, 0, 2], [1, 0, 2])
    ]  # in rows and columns
    middle = np.eye(3)
    middle[:2, 2] = (np.array(image.shape) - 1) / 2  # where MONAI has its origin
    affine = transforms.Affine(affine=np.linalg.inv(middle) @ inverse @ middle, padding_mode="zeros", image_only=True)
    np.testing.assert_allclose(moved.apply(image), np.asarray(affine(image[None]))[0], atol=0.01)

    gamma = transforms.AdjustContrast(gamma=1.4)
    np.testing.assert_allclose(replace(still, gamma=1.4).apply(image), np.asarray(gamma(image[None]))[0], atol=1e-4)

    smooth = transforms.GaussianSmooth(sigma=1.5, approx="sampled")
    tissue = (image > 0).astype(np.float32)
    blurred = np.where(
        tissue, np.asarray(smooth(image[None]))[0] / np.maximum(np.asarray(smooth(tissue[None]))[0], 1e-6), 0
    )
    np.testing.assert_allclose(replace(still, blur=1.5).apply(image), blurred, atol=2e-3)
