"""Phantom crops made on the fly, for a model to learn from before it sees a mammogram. Knows no file and no table.

Label 1 = the view shows a cancer (spiculated mass or microcalcifications). Every phantom shows two findings: a benign one (round mass,
coarse or vascular calcifications), and a cancer or another benign one. So neither brightness nor the number of findings tells the label,
but their shape (dev/LOG.md).
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
    """A breast with or without a cancer, in one view, chest wall at the left, as one of many machines would show it."""
    rng = np.random.default_rng(derive_seed("phantom", seed))
    kinds = [BENIGN_KINDS[rng.integers(3)]]
    kinds.append(CANCER_KINDS[rng.integers(2)] if cancer else BENIGN_KINDS[rng.integers(3)])
    body = sample_breast(rng)
    lesions = tuple(
        sample_lesion(kind, difficulty * rng.random(), derive_seed(seed, place)) for place, kind in enumerate(kinds)
    )
    names: tuple[ViewName, ...] = ("CC", "MLO")
    view = render(replace(body, seed=seed, lesions=lesions), names[rng.integers(2)], size)
    return style_view(view, sample_style(rng), seed)


def sample_breast(rng: np.random.Generator) -> BreastPhantom:
    """A breast of a random density, depth and thickness, without a lesion."""
    density = DENSITIES[rng.choice(4, p=DENSITY_PROBABILITIES)]
    return BreastPhantom(0, density=density, depth_mm=rng.uniform(65, 110), thickness_mm=rng.uniform(40, 62))


def sample_style(rng: np.random.Generator) -> VendorStyle:
    """How one of many machines shows a breast; without a marker, which a crop leaves out."""
    return VendorStyle(rng.uniform(0.35, 0.6), rng.uniform(0.9, 1.7), rng.uniform(0, 0.012), marker="none")


def style_view(view: PhantomView, style: VendorStyle, seed: int) -> PhantomView:
    """The view as a machine of that look shows it."""
    return replace(view, image=apply_style(view, style, "", seed, "L"))


def crop_phantom(view: PhantomView, size: Size) -> np.ndarray:
    """The phantom's crop by its true outline, made as `pixels.preprocessing` makes one: H W uint8, 0 = air."""
    rows, columns = np.nonzero(view.mask)
    box = (0, int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    geometry = CropGeometry(box, flipped=False, canvas=size)
    mask = resample_to_canvas(view.mask.astype(np.float32), geometry, level=0) > 0.5
    return quantise(resample_to_canvas(view.image, geometry, level=0), mask, bits=8)


class PhantomDataset(Dataset[Example]):
    """`count` phantoms by `SampleRequest`: the row says which label, half of them 1; the seed says which phantom: no two epochs share one."""

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
        drawn_at = Size(
            round(self.size.height * 1.5), self.size.height
        )  # 240 x 160 mm, of which the breast fills some two thirds
        view = sample_phantom(derive_seed(draw.seed, draw.row), bool(self.labels[draw.row]), self.difficulty, drawn_at)
        image = to_tensor(crop_phantom(view, self.size))[0].numpy()
        if self.augment is not None:
            image = Augmentation.sample(self.augment, np.random.default_rng(draw.seed)).apply(image)
        return Example(torch.from_numpy(image)[None], self.labels[draw.row], torch.empty(0), draw.row)
