"""Typicality: distances, shares, and features of packed, segmented and dense images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import LedoitWolf

from vitmodel.config import SegmentsConfig
from vitmodel.model.architecture import PRESETS, NetworkConfig
from vitmodel.model.network import Network
from vitmodel.model.packed_batch import concat_packs, pack_images
from vitmodel.model.typicality import Typicality, _fit_shares, _log_distances, record_depth_features
from vitmodel.model.vit import DENSE_LAYOUT

MICRO = replace(PRESETS["vit_micro"], image_size=(64, 64))


def samples(number: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Return correlated features `(N, 2, 6)` of images."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(6, 6))
    return rng.normal(size=(number, 2, 6)) @ mixing + shift


@pytest.fixture(scope="module")
def fitted() -> Typicality:
    typicality = Typicality.fit(samples(400, 0), samples(300, 1))
    assert typicality is not None
    return typicality


def test_distances_equal_those_of_scipy_with_the_shrunk_covariance_of_scikit_learn() -> None:
    train = samples(60, 0)
    fitted = Typicality.fit(train, samples(30, 1))
    assert fitted is not None
    images = samples(5, 2)
    for depth in range(2):
        deviations = train[:, depth] - train[:, depth].mean(axis=0)
        scale = np.sqrt(np.mean(deviations**2, axis=0))
        inverse = np.linalg.inv(LedoitWolf(assume_centered=True).fit(deviations / scale).covariance_)
        centre = train[:, depth].mean(axis=0) / scale
        expected = [mahalanobis(image[depth] / scale, centre, inverse) for image in images]
        found = np.exp(_log_distances(images, fitted.mean, fitted.whitening))[:, depth]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_typicality_of_images_like_those_of_the_validation_is_uniform_and_its_tail_is_careful(
    fitted: Typicality,
) -> None:
    typicality = fitted(samples(20000, 3))
    for share in (0.5, 0.25, 0.1):
        assert (typicality < share).mean() == pytest.approx(share, rel=0.2)
    assert 0.003 < (typicality < 0.01).mean() < 0.015
    assert (typicality < 0.001).mean() < 0.002  # the tail of Gaussian features is lighter than the exponential one


def test_typicality_falls_without_end_as_an_image_moves_away(fitted: Typicality) -> None:
    typicality = fitted(np.concatenate([samples(1, 4, shift) for shift in (0, 5, 10, 20, 40)]))
    assert (np.diff(typicality) < 0).all()
    assert typicality[-1] < 1e-6


def test_an_image_that_is_unusual_at_one_depth_is_atypical(fitted: Typicality) -> None:
    for depth in range(2):
        image = samples(1, 5)
        image[:, depth] += 40
        assert fitted(image)[0] < 1e-4


def test_the_tail_of_few_validation_images_is_right_on_average() -> None:
    """The share of new images below 0.01 is 0.01 on average over small validation sets, with exponential excess."""
    rng = np.random.default_rng(0)
    fitted = Typicality.fit(samples(50, 0), samples(30, 1))
    assert fitted is not None
    below = []
    for _ in range(2000):
        knots, shares, tail = _fit_shares(np.sort(rng.exponential(size=30)))
        few = Typicality(**{**vars(fitted), "knots": knots, "shares": shares, "tail": tail})
        below.append(few.share_more_surprising(rng.exponential(size=200)) < 0.01)
    assert np.mean(below) == pytest.approx(0.01, rel=0.15)


def test_no_typicality_is_fitted_to_too_few_images() -> None:
    unreadable = np.full((5, 2, 6), np.nan)
    assert Typicality.fit(samples(9, 0), samples(20, 1)) is None
    assert Typicality.fit(samples(20, 0), np.concatenate([samples(9, 1), unreadable])) is None


def test_tensors_restore_the_same_typicality(fitted: Typicality) -> None:
    images = samples(20, 6, 1.0)
    np.testing.assert_allclose(Typicality.from_tensors(fitted.tensors())(images), fitted(images), rtol=1e-3)


def test_constant_features_do_not_fail() -> None:
    train, val = samples(30, 0), samples(20, 1)
    train[..., 0] = val[..., 0] = 3.0
    fitted = Typicality.fit(train, val)
    assert fitted is not None
    assert np.isfinite(fitted(val)).all()


@pytest.mark.parametrize("segments", [None, SegmentsConfig(segments=32, segment_overlap=16, segment_context=32)])
def test_features_of_an_image_do_not_depend_on_the_pack(segments: SegmentsConfig | None) -> None:
    torch.manual_seed(0)
    network = Network(NetworkConfig(vit=MICRO, segments=segments)).eval()
    packs = [pack_images([torch.rand(1, 64, 16 * width)], 16) for width in (2, 4, 3)]
    with torch.inference_mode():
        features, depths = network.features_and_depths(concat_packs(packs))
        alone = [network.features_and_depths(pack)[1] for pack in packs]
        torch.testing.assert_close(features, network.features(concat_packs(packs)))
    assert depths is not None
    assert depths.shape == (3, 2, MICRO.dim)
    torch.testing.assert_close(depths, torch.cat([depth for depth in alone if depth is not None]), atol=1e-5, rtol=1e-4)


def test_features_are_the_means_of_the_patch_tokens_after_two_blocks() -> None:
    torch.manual_seed(0)
    network = Network(NetworkConfig(vit=MICRO)).eval()
    image = torch.rand(1, 64, 64)
    with torch.inference_mode():
        depths = network.features_and_depths(pack_images([image], 16))[1]
        tokens = network.trunk.embed(image[None])
        expected = []
        for block in network.trunk.blocks:
            tokens = block(tokens, DENSE_LAYOUT)
            expected.append(tokens[0, 1:].mean(dim=0))
    assert depths is not None
    torch.testing.assert_close(depths[0], torch.stack([expected[1], expected[3]]), atol=1e-5, rtol=1e-4)


def test_recording_ends_with_its_block() -> None:
    network = Network(NetworkConfig(vit=MICRO)).eval()
    pack = pack_images([torch.rand(1, 64, 64)], 16)
    with record_depth_features(network.trunk) as recorded:
        network.features(pack)
    network.features(pack)
    assert len(recorded.recorded[0]) == 1
    assert not any(block._forward_hooks for block in network.trunk.blocks)
