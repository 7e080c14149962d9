"""Crops and labels for the loaders: how a draw becomes a tensor. Knows no model, and not what is drawn when."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from vitmodel.config import AugmentConfig, Size
from vitmodel.data.lesions import NO_BOXES
from vitmodel.data.samplers import SampleRequest
from vitmodel.data.transforms import Augmentation
from vitmodel.errors import VitmodelError
from vitmodel.utils import derive_seed


class Example(NamedTuple):
    """One image, loaded."""

    image: torch.Tensor  # 1 H W in [0, 1], 0 = air
    label: torch.Tensor  # 0, 1 or NaN = unknown
    targets: torch.Tensor  # A auxiliary targets as `model.losses.AuxiliaryTarget` encodes them, NaN = unknown
    row: int
    lesions: torch.Tensor = torch.empty(0, 4)
    """Boxes of known cancers in pixels, K 4: x0 y0 x1 y1."""
    mm_per_pixel: float = float("nan")
    problem: str = ""
    """Why the image could not be loaded; the loader's process hands it on, so that one file does not end an epoch."""


def read_crop(path: Path | str) -> np.ndarray:
    """A crop as ETL wrote it, H W uint8 or uint16. Raises VitmodelError naming the file."""
    crop = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if crop is None or crop.ndim != 2 or crop.dtype not in (np.uint8, np.uint16):
        raise VitmodelError(
            f"{path} is missing or no 8- or 16-bit grey PNG; run `vitmodel etl` again, it makes what is missing"
        )
    return crop


def crop_size(path: Path | str) -> Size:
    """Height and width of a crop, read from the first 24 bytes of the PNG alone. Raises VitmodelError naming the file."""
    try:
        with Path(path).open("rb") as file:
            width, height = struct.unpack(">16x2I", file.read(24))
    except (OSError, struct.error) as error:
        raise VitmodelError(
            f"{path} is missing or no PNG ({error}); run `vitmodel etl` again, it makes what is missing"
        ) from error
    return Size(height, width)


def to_tensor(crop: np.ndarray) -> torch.Tensor:
    """A crop (H W uint8 or uint16) as the model's input: 1 H W float32 in [0, 1]."""
    return torch.from_numpy(crop.astype(np.float32) / np.iinfo(crop.dtype).max)[None]


class CropDataset(Dataset[Example]):
    """Crops by `SampleRequest`; a draw gives the same tensor in any process, order or epoch."""

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[float],
        augment: AugmentConfig | None = None,
        targets: torch.Tensor | None = None,
        lesions: Sequence[np.ndarray] = (),
        mm_per_pixel: Sequence[float] = (),
    ) -> None:
        """`targets` are the images' auxiliary targets, N A; `lesions` the boxes of known cancers on each crop, K 4."""
        self.paths = list(paths)
        self.labels = torch.as_tensor(np.asarray(labels, np.float32))
        self.targets = torch.empty(len(self.paths), 0) if targets is None else targets
        self.augment = augment
        self.lesions = lesions or [NO_BOXES] * len(self.paths)
        self.mm_per_pixel = mm_per_pixel or [float("nan")] * len(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, draw: SampleRequest) -> Example:
        known = self.labels[draw.row], self.targets[draw.row], draw.row
        try:
            image = to_tensor(read_crop(self.paths[draw.row]))
        except VitmodelError as error:
            return Example(torch.empty(0), *known, problem=str(error))
        boxes = self.lesions[draw.row]
        if self.augment is not None:
            augmentation = Augmentation.sample(self.augment, np.random.default_rng(draw.seed))
            changed = augmentation.apply(image[0].numpy())
            if changed.any():  # a random part of a whole image may be air alone; then the image stays as it is
                boxes = augmentation.transform_boxes(boxes, (image.shape[1], image.shape[2]))
                image = torch.from_numpy(changed)[None]
        return Example(image, *known, torch.from_numpy(boxes), self.mm_per_pixel[draw.row])


class ExamDataset(Dataset[list[Example]]):
    """Exams by `SampleRequest`, with the images of each as `crops` gives them; some may be left out by chance."""

    def __init__(
        self, crops: CropDataset, patients: Sequence[str], breasts: Sequence[str], dropout: float = 0.0
    ) -> None:
        """`patients` and `breasts` of each crop; `dropout` is the chance that an image is left out. Of a labelled breast one stays."""
        self.crops = crops
        self.paths = crops.paths
        self.breasts = np.asarray(breasts)
        self.dropout = dropout
        exams: dict[str, list[int]] = {}
        for row, patient in enumerate(patients):
            exams.setdefault(patient, []).append(row)
        self.exams = [np.array(rows) for rows in exams.values()]
        self.labels = torch.from_numpy(
            np.array([np.fmax.reduce(crops.labels[rows].numpy()) for rows in self.exams], np.float32)
        )

    def __len__(self) -> int:
        return len(self.exams)

    def __getitem__(self, draw: SampleRequest) -> list[Example]:
        rows, rng = self.exams[draw.row], np.random.default_rng(derive_seed("exam", draw.seed))
        kept = rng.random(len(rows)) >= self.dropout
        labelled = ~self.crops.labels[rows].isnan().numpy()
        for breast in np.unique(self.breasts[rows][labelled]):
            members = np.flatnonzero((self.breasts[rows] == breast) & labelled)
            if not kept[members].any():
                kept[rng.choice(members)] = True
        return [self.crops[SampleRequest(row, derive_seed("image", draw.seed, row))] for row in rows[kept].tolist()]
