"""Options of the verbs that train several models to compare them: versions and leave-out."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from vitmodel.config.base import Config, Size, require
from vitmodel.config.labels import CANCER, LabelRule


@dataclass(frozen=True, kw_only=True)
class VersionsConfig(Config):
    """Train the three versions of the original recipe and ours on one split by patient.

    Write a table of their metrics and a figure of their curves.
    """

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "input and output": ("source", "out", "recipes", "ours", "size", "our_size"),
        "model": ("weights", "our_weights"),
        "hardware": ("workers",),
    }

    source: Path
    """Input: a release folder, a folder of images, or a manifest with labels."""
    out: Path
    """Output folder for crops, whole images, one run per version, versions.md and versions.png."""
    recipes: Path | None = None
    """Folder with backbone.yaml, v2.yaml and v3.yaml, recipes of `vitmodel train`. none = the packaged ones."""
    ours: Path = Path("rsna")
    """Our recipe, trained on the crops: a YAML file or the name of a packaged recipe."""
    weights: Path | None = None
    """Initial weights of the original's backbone: a file or a name; in21k = those of the original
    (jx_vit_base_patch16_224_in21k). none = random weights."""
    our_weights: Path | None = None
    """Initial weights of our recipe: a file or a name, such as dinov2-small. none = random weights."""
    size: Size = Size(224, 224)
    """Height and width in pixels of the original's images, whole or cropped."""
    our_size: Size = Size(336, 168)
    """Height and width of our crops in pixels."""
    workers: int = 0
    """Number of parallel workers that read images. 0 = one per core."""

    def _check(self) -> None:
        super()._check()
        require(self.workers >= 0, "workers", "must not be negative")


@dataclass(frozen=True, kw_only=True)
class LeaveOutConfig(Config):
    """Train without each site (machine, data set) in turn and evaluate on it.

    Write OUT/<by>-<value>/ for each value and OUT/summary.json.
    """

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "input and output": ("manifest", "out", "by", "label", "train", "evaluate")
    }

    manifest: tuple[Path, ...]
    """manifest.csv as written by `vitmodel etl`. Several are merged. Their splits are not used."""
    out: Path
    """Output folder: per value a manifest, a run and a report."""
    by: Literal["site_id", "machine_id", "dataset"] = "machine_id"
    """Column whose values are left out in turn. All images of a patient with that value are left out."""
    train: str = ""
    """Flags of `vitmodel train`, such as '--model vit_tiny --epochs 5'."""
    evaluate: str = ""
    """Flags of `vitmodel evaluate`."""
    label: str = CANCER
    """What is positive, as in `vitmodel train --label`."""

    def _resolve(self) -> None:
        super()._resolve()
        object.__setattr__(self, "label", LabelRule.parse(self.label).text)

    def _check(self) -> None:
        super()._check()
        for name in ("train", "evaluate"):
            words = [word.partition("=")[0] for word in shlex.split(getattr(self, name))]
            require("--label" not in words, name, "must not set --label; give --label to leave-out itself")
