"""Phantom crops generated on the fly, for pretraining a model before it sees a mammogram.

Label 1 means that the view shows a cancer (spiculated mass or microcalcifications). Every phantom shows two findings: a
benign one (round mass, coarse or vascular calcifications), and either a cancer or another benign one. The label
therefore follows neither from brightness nor from the number of findings, only from their shape (dev/LOG.md).
"""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from vitmodel.config import AugmentConfig, Size
from vitmodel.data.dataset import Example, to_tensor
from vitmodel.data.samplers import SampleRequest
from vitmodel.data.transforms import Augmentation
from vitmodel.phantoms.anatomy import DENSITIES, BreastPhantom, PhantomView, render
from vitmodel.phantoms.lesions import BENIGN_KINDS, CANCER_KINDS, ViewName, sample_lesion
from vitmodel.phantoms.style import VendorStyle, apply_style
from vitmodel.pixels.preprocessing import CropGeometry, quantise, resample_to_canvas
from vitmodel.utils import derive_seed

DENSITY_PROBABILITIES = (0.11, 0.43, 0.41, 0.05)  # of A to D, as in `vitmodel synth`


def sample_phantom(seed: int, cancer: bool, difficulty: float, size: Size) -> PhantomView:
    """Return a breast with or without a cancer in a random view and vendor style, chest wall at the left.

    Args:
        seed: Seed of the phantom; the same arguments give the same pixels.
        cancer: Whether one of the two findings is a cancer.
        difficulty: Upper limit of the lesions' random difficulty, from 0 (large, bright lesions) to 1.
        size: Height and width of the rendered view in pixels.
    """
    rng = np.random.default_rng(derive_seed("phantom", seed))
    kinds = [BENIGN_KINDS[rng.integers(3)]]
    kinds.append(CANCER_KINDS[rng.integers(2)] if cancer else BENIGN_KINDS[rng.integers(3)])
    body = sample_breast(rng)
    lesions = tuple(
        sample_lesion(kind, difficulty * rng.random(), derive_seed(seed, index)) for index, kind in enumerate(kinds)
    )
    views: tuple[ViewName, ...] = ("CC", "MLO")
    view = render(replace(body, seed=seed, lesions=lesions), views[rng.integers(2)], size)
    return style_view(view, sample_style(rng), seed)


def sample_breast(rng: np.random.Generator) -> BreastPhantom:
    """Return a breast of random density, depth and thickness without lesions."""
    density = DENSITIES[rng.choice(4, p=DENSITY_PROBABILITIES)]
    return BreastPhantom(0, density=density, depth_mm=rng.uniform(65, 110), thickness_mm=rng.uniform(40, 62))


def sample_style(rng: np.random.Generator) -> VendorStyle:
    """Return a random vendor style without a marker, which a crop would exclude anyway."""
    return VendorStyle(rng.uniform(0.35, 0.6), rng.uniform(0.9, 1.7), rng.uniform(0, 0.012), marker="none")


def style_view(view: PhantomView, style: VendorStyle, seed: int) -> PhantomView:
    """Return the view as presented in a vendor's style, chest wall at the left."""
    return replace(view, image=apply_style(view, style, "", seed, "L"))


def crop_phantom(view: PhantomView, size: Size) -> np.ndarray:
    """Return the crop `(H, W)` uint8 of a phantom, 0 = air.

    It is made like those of `pixels.preprocessing`, but from the true outline instead of a detected one.
    """
    rows, columns = np.nonzero(view.mask)
    box = (0, int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    geometry = CropGeometry(box, flipped=False, canvas=size)
    mask = resample_to_canvas(view.mask.astype(np.float32), geometry, level=0) > 0.5
    return quantise(resample_to_canvas(view.image, geometry, level=0), mask, bits=8)


class PhantomDataset(Dataset[Example]):
    """Endless phantoms behind `count` rows, half of them with label 1.

    The row of a `SampleRequest` selects the label and its seed the phantom, so that no two epochs share a phantom.

    Args:
        count: Number of rows, which is the number of phantoms per epoch.
        size: Height and width of the crops in pixels.
        difficulty: Upper limit of the lesions' difficulty, see `sample_phantom`.
        augment: Augmentation of the crops; None = no augmentation.
    """

    def __init__(self, count: int, size: Size, difficulty: float, augment: AugmentConfig | None) -> None:
        self.paths = [f"phantom {number}" for number in range(count)]
        self.labels = torch.arange(count) % 2.0
        self.size = size
        self.difficulty = difficulty
        self.augment = augment

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, draw: SampleRequest) -> Example:
        cv2.setNumThreads(1)
        # A view covers 240 x 160 mm, of which the breast fills about two thirds.
        view_size = Size(round(self.size.height * 1.5), self.size.height)
        view = sample_phantom(derive_seed(draw.seed, draw.row), bool(self.labels[draw.row]), self.difficulty, view_size)
        image = to_tensor(crop_phantom(view, self.size))[0].numpy()
        if self.augment is not None:
            image = Augmentation.sample(self.augment, np.random.default_rng(draw.seed)).apply(image)
        return Example(torch.from_numpy(image)[None], self.labels[draw.row], torch.empty(0), draw.row)
