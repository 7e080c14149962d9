"""Typicality: how like the training images an image looks to the network.

The features of an image are the mean of its patch tokens after a middle block and after the last one: which depth shows
that an image is unusual depends on what is unusual in it (Anthony and Kamnitsas 2023, arXiv 2309.01488). At each depth,
the Mahalanobis distance to the training images (Lee et al. 2018, arXiv 1807.03888) uses a covariance with the shrinkage
of Ledoit and Wolf, so that it exists for fewer images than features. The surprise of an image is the larger of its two
distances, on a common scale. Its typicality is the share of validation images that surprise more.

The smallest share that N images can show is about 1 / N. Beyond the most surprising tenth, k images, the excess over
their lower end is taken to be exponential, and the share is that of a future image given these k:
(k + 1) / (N + 1) * (1 + excess / (k * mean excess)) ** -k. This is exact for every k if the excess is exponential (the
ratio has an F distribution), and with few images it demands more before it calls an image atypical.

Symbols in shapes: `N` images, `F` depths, `D` features of an image at a depth.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitmodel.model.vit import ViT

MIN_IMAGES = 10
"""Least number of training images, and of validation images, from which typicality can be fitted."""
TAIL_SHARE = 0.1
"""Share of the validation images that the tail is fitted to."""
MIN_TAIL_IMAGES = 5
"""The same as a number of images, for few validation images."""
KNOTS = 101
"""Number of quantiles that are kept of the surprise of validation images below the tail."""


@dataclass
class DepthFeatures:
    """The features of the images, or of the parts of images, that a ViT has encoded."""

    recorded: list[list[Tensor]] = field(default_factory=lambda: [[], []])
    """At each depth the features of one image after the other, `(D,)` each."""

    def of_first(self, count: int) -> Tensor:
        """Return the features of the first `count` images or parts, `(count, F, D)`."""
        return torch.stack([torch.stack(depth[:count]) for depth in self.recorded], dim=1)


def depth_features_shape(vit: ViT) -> tuple[int, int]:
    """Return the shape `(F, D)` of the features of an image."""
    return 2, vit.config.dim


@contextlib.contextmanager
def record_depth_features(vit: ViT) -> Iterator[DepthFeatures]:
    """Record the features of all images that the ViT encodes as packs within the block.

    A ViT whose `encode` was replaced, such as by another runtime, records nothing.
    """
    features = DepthFeatures()
    depths = ((len(vit.blocks) - 1) // 2, len(vit.blocks) - 1)
    prefix = vit.config.num_prefix_tokens
    handles = []
    for depth, records in zip(depths, features.recorded, strict=True):

        def record(_: nn.Module, inputs: tuple[Any, ...], output: Tensor, records: list[Tensor] = records) -> None:
            for image in output[0].detach().float().split(inputs[1].lengths):
                records.append(image[prefix:].mean(dim=0))

        handles.append(vit.blocks[depth].register_forward_hook(record))
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, eq=False)
class Typicality:
    """Fitted typicality of one model."""

    mean: np.ndarray
    """Mean of the training images' features, `(F, D)`."""
    whitening: np.ndarray
    """Matrices `(F, D, D)` whose product with a deviation from the mean has the Mahalanobis distance as its length."""
    centre: np.ndarray
    """Mean of the logarithm of the validation images' distances at each depth, `(F,)`."""
    spread: np.ndarray
    """Its standard deviation, `(F,)`."""
    knots: np.ndarray
    """Quantiles of the surprise of validation images up to the lower end of the tail, ascending."""
    shares: np.ndarray
    """Share of the validation images that surprise more than each knot."""
    tail: np.ndarray
    """Number of validation images in the tail and the mean of their excess over the last knot, `(2,)`."""

    @classmethod
    def fit(cls, train: np.ndarray, val: np.ndarray) -> Typicality | None:
        """Return the typicality fitted to features; None if fewer than `MIN_IMAGES` images have features.

        Args:
            train: Features of the training images `(N, F, D)`; NaN for unreadable images, which are left out.
            val: Features of images that the model was not trained on.
        """
        train, val = (features[np.isfinite(features).all((1, 2))].astype(float) for features in (train, val))
        if min(len(train), len(val)) < MIN_IMAGES:
            return None
        mean = train.mean(axis=0)
        whitening = np.stack([_whitening(depth) for depth in (train - mean).transpose(1, 0, 2)])
        distances = _log_distances(val, mean, whitening)
        centre = distances.mean(axis=0)
        spread = np.maximum(distances.std(axis=0), 1e-6)
        surprise = np.sort(((distances - centre) / spread).max(axis=1))
        return cls(mean, whitening, centre, spread, *_fit_shares(surprise))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Return the typicality of images, `(N,)` in (0, 1], from their features `(N, F, D)`."""
        distances = _log_distances(features.astype(float), self.mean, self.whitening)
        return self.share_more_surprising(((distances - self.centre) / self.spread).max(axis=1))

    def share_more_surprising(self, surprise: np.ndarray) -> np.ndarray:
        """Return the share of validation images that surprise more than the images do, `(N,)`."""
        count, mean_excess = self.tail
        within = np.interp(surprise, self.knots, self.shares, left=1.0)
        excess = np.maximum(surprise - self.knots[-1], 0)
        return within * (1 + excess / (count * mean_excess)) ** -count

    def tensors(self) -> dict[str, Tensor]:
        """Return everything as tensors by name."""
        return {name: torch.tensor(value, dtype=torch.float32) for name, value in vars(self).items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Typicality:
        """Return what `tensors` returned."""
        return cls(**{name: tensor.numpy().astype(float) for name, tensor in tensors.items()})


def _whitening(deviations: np.ndarray) -> np.ndarray:
    """Return the inverse square root `(D, D)` of the shrunk covariance of deviations from a mean, `(N, D)`.

    They are standardised first, because the shrinkage moves all variances towards their mean.
    """
    from sklearn.covariance import ledoit_wolf  # here, because importing scikit-learn takes longer than scoring

    scale = np.sqrt(np.mean(deviations**2, axis=0))
    scale = np.maximum(scale, 1e-6 * max(float(scale.max()), 1e-6))
    covariance = ledoit_wolf(deviations / scale, assume_centered=True)[0]
    variances, directions = np.linalg.eigh(covariance)
    return directions / np.sqrt(np.maximum(variances, 1e-12)) / scale[:, None]


def _log_distances(features: np.ndarray, mean: np.ndarray, whitening: np.ndarray) -> np.ndarray:
    """Return the logarithm of the Mahalanobis distances at each depth, `(N, F)`, of features `(N, F, D)`."""
    white = np.einsum("nfd,fde->nfe", features - mean, whitening)
    return np.log(np.maximum(np.linalg.norm(white, axis=2), 1e-12))


def _fit_shares(surprise: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return knots, shares and tail, as `Typicality` has them, from the sorted surprise of validation images `(N,)`."""
    images = len(surprise)
    tail = max(MIN_TAIL_IMAGES, round(TAIL_SHARE * images))
    body = surprise[: images - tail]
    share_above = (images - np.arange(len(body))) / (images + 1)  # N at the first to k + 1 at the last
    positions = np.linspace(0, len(body) - 1, min(KNOTS, len(body)))
    knots = np.interp(positions, np.arange(len(body)), body)
    shares = np.interp(positions, np.arange(len(body)), share_above)
    mean_excess = max(float(np.mean(surprise[images - tail :] - body[-1])), 1e-6)
    return knots, shares, np.array([tail, mean_excess])
