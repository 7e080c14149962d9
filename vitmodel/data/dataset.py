"""Datasets of crops and labels: turn a `SampleRequest` into tensors."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from vitmodel.archives import open_source
from vitmodel.config import AugmentConfig, Size
from vitmodel.data.lesions import NO_BOXES
from vitmodel.data.samplers import SampleRequest
from vitmodel.data.transforms import Augmentation
from vitmodel.errors import ImageRefusedError, VitmodelError
from vitmodel.utils import derive_seed


class Example(NamedTuple):
    """One loaded image with its label."""

    image: torch.Tensor
    """`(1, H, W)` in [0, 1], 0 = air."""
    label: torch.Tensor
    """0, 1 or NaN = unknown."""
    targets: torch.Tensor
    """`(A,)` auxiliary targets as `training.losses.AuxiliaryTarget` encodes them, NaN = unknown."""
    row: int
    """Row of the table."""
    lesions: torch.Tensor = torch.empty(0, 4)
    """`(K, 4)` boxes of known cancers in pixels: x0 y0 x1 y1."""
    mm_per_pixel: float = float("nan")
    """Side of a pixel in mm, NaN = unknown."""
    problem: str = ""
    """Why the image could not be loaded. The loader's process passes it on, so that one file does not end an epoch."""


def read_crop(path: Path | str) -> np.ndarray:
    """Return a crop that ETL wrote, `(H, W)` uint8 or uint16.

    Raises:
        VitmodelError: The file is missing, or not an 8- or 16-bit grey image.
    """
    try:
        with open_source(path) as file:
            crop = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
    except (OSError, ImageRefusedError, cv2.error):  # OpenCV raises for an empty file
        crop = None
    if crop is None or crop.ndim != 2 or crop.dtype not in (np.uint8, np.uint16):
        raise VitmodelError(
            f"{path} is missing or not an 8- or 16-bit grey PNG; run `vitmodel etl` again to make missing crops"
        )
    return crop


def crop_size(path: Path | str) -> Size:
    """Return height and width of a crop, from the first 24 bytes of its PNG file.

    Raises:
        VitmodelError: The file is missing or too short.
    """
    try:
        with open_source(path) as file:
            width, height = struct.unpack(">16x2I", file.read(24))
    except (OSError, ImageRefusedError, struct.error) as error:
        raise VitmodelError(
            f"{path} is missing or not a PNG ({error}); run `vitmodel etl` again to make missing crops"
        ) from error
    return Size(height, width)


def to_tensor(crop: np.ndarray) -> torch.Tensor:
    """Return a crop, `(H, W)` uint8 or uint16, as the model's input: `(1, H, W)` float32 in [0, 1]."""
    return torch.from_numpy(crop.astype(np.float32) / np.iinfo(crop.dtype).max)[None]


class CropDataset(Dataset[Example]):
    """Crops by `SampleRequest`. A request gives the same tensor in any process, order or epoch.

    Args:
        paths: Files of the N crops.
        labels: 0, 1 or NaN = unknown for each crop.
        augment: Random changes of the crops; None = no changes.
        targets: Auxiliary targets of the crops, `(N, A)`.
        lesions: Boxes of known cancers on each crop, `(K, 4)`.
        mm_per_pixel: Side of each crop's pixels in mm, NaN = unknown.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[float],
        augment: AugmentConfig | None = None,
        targets: torch.Tensor | None = None,
        lesions: Sequence[np.ndarray] = (),
        mm_per_pixel: Sequence[float] = (),
    ) -> None:
        self.paths = list(paths)
        self.labels = torch.as_tensor(np.asarray(labels, np.float32))
        self.targets = torch.empty(len(self.paths), 0) if targets is None else targets
        self.augment = augment
        self.lesions = lesions or [NO_BOXES] * len(self.paths)
        self.mm_per_pixel = mm_per_pixel or [float("nan")] * len(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, request: SampleRequest) -> Example:
        row = request.row
        label = self.labels[row]
        targets = self.targets[row]
        try:
            image = to_tensor(read_crop(self.paths[row]))
        except VitmodelError as error:
            return Example(torch.empty(0), label, targets, row, problem=str(error))
        boxes = self.lesions[row]
        if self.augment is not None:
            augmentation = Augmentation.sample(self.augment, np.random.default_rng(request.seed))
            augmented = augmentation.apply(image[0].numpy())
            if augmented.any():  # a random part of a whole image may be all air; then the image is not changed
                boxes = augmentation.transform_boxes(boxes, (image.shape[1], image.shape[2]))
                image = torch.from_numpy(augmented)[None]
        return Example(image, label, targets, row, torch.from_numpy(boxes), self.mm_per_pixel[row])


class ExamDataset(Dataset[list[Example]]):
    """Exams by `SampleRequest`, each a list of its images, some of which may be dropped at random.

    Args:
        crops: The images.
        exam_of_crop: Exam of each crop, as `manifest.exam_ids` names it.
        breasts: Breast of each crop, as `manifest.breast_ids` names it.
        dropout: Probability that an image is dropped. At least one labelled image of a labelled breast is kept.
    """

    def __init__(
        self, crops: CropDataset, exam_of_crop: Sequence[str], breasts: Sequence[str], dropout: float = 0.0
    ) -> None:
        self.crops = crops
        self.paths = crops.paths
        self.breasts = np.asarray(breasts)
        self.dropout = dropout
        exams: dict[str, list[int]] = {}
        for row, exam in enumerate(exam_of_crop):
            exams.setdefault(exam, []).append(row)
        self.exams = [np.array(rows) for rows in exams.values()]
        exam_labels = [np.fmax.reduce(crops.labels[rows].numpy()) for rows in self.exams]
        self.labels = torch.from_numpy(np.array(exam_labels, np.float32))

    def __len__(self) -> int:
        return len(self.exams)

    def __getitem__(self, request: SampleRequest) -> list[Example]:
        rows = self.exams[request.row]
        rng = np.random.default_rng(derive_seed("exam", request.seed))
        kept = rng.random(len(rows)) >= self.dropout
        labelled = ~self.crops.labels[rows].isnan().numpy()
        for breast in np.unique(self.breasts[rows][labelled]):
            breast_images = np.flatnonzero((self.breasts[rows] == breast) & labelled)
            if not kept[breast_images].any():
                kept[rng.choice(breast_images)] = True
        requests = [SampleRequest(row, derive_seed("image", request.seed, row)) for row in rows[kept].tolist()]
        return [self.crops[image_request] for image_request in requests]
