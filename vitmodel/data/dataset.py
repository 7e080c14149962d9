"""Crops and labels for the loaders: what is drawn in which epoch, and how a draw becomes a tensor. Knows no model."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from vitmodel.config import AugmentConfig, Size
from vitmodel.data.transforms import Augmentation
from vitmodel.utils import VitmodelError, seed_from


class Draw(NamedTuple):
    """One image to load, and the seed of everything random about it."""

    row: int
    seed: int


class Example(NamedTuple):
    """One image, loaded."""

    image: torch.Tensor  # 1 H W in [0, 1], 0 = air
    label: torch.Tensor  # 0, 1 or NaN = unknown
    row: int


def read_crop(path: Path | str) -> np.ndarray:
    """A crop as ETL wrote it, H W uint8 or uint16. Raises VitmodelError naming the file."""
    crop = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if crop is None or crop.ndim != 2 or crop.dtype not in (np.uint8, np.uint16):
        raise VitmodelError(f"{path} is missing or no 8- or 16-bit grey PNG; run `vitmodel etl` again, it makes what is missing")
    return crop


def crop_size(path: Path | str) -> Size:
    """Height and width of a crop, read from the first 24 bytes of the PNG alone. Raises VitmodelError naming the file."""
    try:
        with Path(path).open("rb") as file:
            width, height = struct.unpack(">16x2I", file.read(24))
    except (OSError, struct.error) as error:
        raise VitmodelError(f"{path} is missing or no PNG ({error}); run `vitmodel etl` again, it makes what is missing") from error
    return Size(height, width)


def to_tensor(crop: np.ndarray) -> torch.Tensor:
    """A crop (H W uint8 or uint16) as the model's input: 1 H W float32 in [0, 1]."""
    return torch.from_numpy(crop.astype(np.float32) / np.iinfo(crop.dtype).max)[None]


class CropDataset(Dataset[Example]):
    """Crops by `Draw`; a draw gives the same tensor in any process, order or epoch."""

    def __init__(self, paths: Sequence[str], labels: Sequence[float], augment: AugmentConfig | None = None) -> None:
        self.paths = list(paths)
        self.labels = np.asarray(labels, np.float32)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, draw: Draw) -> Example:
        image = to_tensor(read_crop(self.paths[draw.row]))
        if self.augment is not None:
            augmentation = Augmentation.sample(self.augment, np.random.default_rng(draw.seed))
            image = torch.from_numpy(augmentation.apply(image[0].numpy()))[None]
        return Example(image, torch.tensor(self.labels[draw.row]), draw.row)


class InOrder(Sampler[Draw]):
    """Every image once, in order."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Draw]:
        return (Draw(index, 0) for index in range(self.count))


class Shuffled(Sampler[Draw]):
    """As many draws an epoch as there are images: each image once, or, balanced, cancers and negatives equally often.

    The draws depend on seed and epoch alone, so a run that resumes at `epoch` sees the batches of one that was never interrupted. Each
    iteration is the next epoch, from its first draw on: a loader with workers makes two iterators and uses one. (Lightning's `set_epoch`
    comes too late for the first epoch after a resumption.)
    """

    def __init__(self, labels: Sequence[float], seed: int, balance: bool, epoch: int = 0) -> None:
        self.labels = np.asarray(labels)
        self.seed = seed
        self.balance = balance
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[Draw]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        rng = np.random.default_rng(seed_from("order", self.seed, epoch))
        order = self._balanced(rng) if self.balance else rng.permutation(len(self))
        for position, row in enumerate(order):
            yield Draw(int(row), seed_from("draw", self.seed, epoch, position))

    def _balanced(self, rng: np.random.Generator) -> np.ndarray:
        """Half the draws from each class; within a class every image comes as often as any other, give or take one."""
        draws = []
        for label in (0, 1):
            members = np.flatnonzero(self.labels == label)
            wanted = len(self) // 2 + label * (len(self) % 2)
            rounds = [rng.permutation(members) for _ in range(-(-wanted // len(members)))]
            draws.append(np.concatenate(rounds)[:wanted])
        return rng.permutation(np.concatenate(draws))
