"""Phantoms, preprocessing and ETL: from an archive to crops. Knows no model."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from vitmodel.config.base import Size, require, require_apart


@dataclass(frozen=True, kw_only=True)
class SynthConfig:
    """Write a synthetic, RSNA-shaped mammography release: seeded phantoms as DICOM with labels and lesion boxes."""

    out: Path
    """Folder to write the release to."""
    patients: int = 40
    """Number of patients; four images each."""
    seed: int = 0
    """Every pixel follows from the seed."""
    size: Size = Size(2048, 1664)
    """Image height x width in pixels."""
    difficulty: float = 0.5
    """0 = large, bright lesions; 1 = small, faint ones."""
    positives: float = 0.3
    """Fraction of patients with a cancer (in one breast, seldom in both)."""
    faults: bool = False
    """Also write a few files that are broken on purpose."""
    jobs: int = 0
    """Worker processes; 0 = one per core."""

    def __post_init__(self) -> None:
        require(self.patients > 0, "patients", "must be at least 1")
        require(min(self.size) >= 128, "size", "must be at least 128x128 pixels")
        require(0 <= self.difficulty <= 1, "difficulty", "must lie between 0 and 1")
        require(0 <= self.positives <= 1, "positives", "must lie between 0 and 1")
        require(self.jobs >= 0, "jobs", "must not be negative")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """From a file's pixels to a model's input; travels in the model package so that prediction repeats training."""

    size: Size = Size(1024, 512)
    """Height x width of the crop in pixels; the breast keeps its aspect and is padded with air."""
    mm_per_pixel: float | None = None
    """Crop at this scale instead, as large as each breast is; images of unknown pixel spacing are refused. SIZE is then what the
    model's positions are learned for."""
    bits: Literal[8, 16] = 8
    """Bits per pixel of the crop."""
    voi: int = 1
    """Which of several stored VOI LUTs or windows to use, counted from 1; the manifest names the one that was used."""
    for_processing: Literal["refuse", "log"] = "refuse"
    """Raw detector data (FOR PROCESSING): refuse it, or show the inverted logarithm."""
    exact: bool = False
    """Decode at full resolution even where a lower JPEG 2000 level covers the size."""

    def __post_init__(self) -> None:
        require(min(self.size) >= 16, "size", "must be at least 16x16 pixels")
        scale_is_sane = self.mm_per_pixel is None or 0.02 <= self.mm_per_pixel <= 2
        require(scale_is_sane, "mm_per_pixel", "must lie between 0.02 and 2 (a mammogram has 0.05 to 0.1)")
        require(self.voi >= 1, "voi", "is counted from 1")

    def to_json(self) -> str:
        """One line that names every field; stands in the manifest beside each crop and in the package."""
        values = {field.name: getattr(self, field.name) for field in fields(Preprocessing)}
        return json.dumps(values | {"size": str(self.size)})

    @classmethod
    def from_json(cls, text: str) -> Preprocessing:
        """The inverse of `to_json`. Raises UsageError where a field is unknown to this version."""
        values = json.loads(text)
        unknown = sorted(set(values) - {field.name for field in fields(Preprocessing)})
        require(not unknown, "preprocessing", f"fields unknown to this version of vitmodel: {', '.join(unknown)}")
        return Preprocessing(**values | {"size": Size.parse(values["size"])})


@dataclass(frozen=True, kw_only=True)
class ETLConfig(Preprocessing):
    """Crop, orient and resize every mammogram of an archive; write PNGs and manifest.csv, one row per image, refused ones too.

    Running it again does only what is missing or changed.
    """

    source: Path
    """Release folder, folder of images, one file, or a manifest."""
    out: Path
    """Folder for the crops and manifest.csv."""
    dataset: str = "auto"
    """Which release SOURCE is (rsna, vindr, class_folders, dicom_folder, ...); auto = decided from its files."""
    jobs: int = 0
    """Parallel workers; 0 = one per core."""
    backend: Literal["auto", "threads", "processes", "dask"] = "auto"
    """What a worker is. A file that kills or hangs its decoder costs a process no more than that file; auto = threads, which start at
    once, but processes from 500 images on, or from 30 where they are RLE, whose decoder serves one thread at a time."""
    transcode: Literal["none", "htj2k"] = "none"
    """Also keep a lossless HTJ2K copy of each DICOM below OUT/htj2k; its manifest.csv is a source that later runs read much faster."""
    scheduler: str = ""
    """Address of the dask scheduler, such as tcp://host:8786; empty = a local cluster. Only with backend dask."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_apart(self.out, [self.source])
        require(self.jobs >= 0, "jobs", "must not be negative")
        require(not self.scheduler or self.backend == "dask", "scheduler", "needs --backend dask")

    @property
    def preprocessing(self) -> Preprocessing:
        """The part that travels with a trained model."""
        return Preprocessing(**{field.name: getattr(self, field.name) for field in fields(Preprocessing)})
