"""The files that the stages write, as Python objects: a manifest, a training run, an evaluation."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitmodel.utils import NOT_A_MEDICAL_DEVICE

if TYPE_CHECKING:
    import pandas as pd

    from vitmodel.metrics.bootstrap import Interval
    from vitmodel.reports.evaluation import EvaluationReport


@dataclass(frozen=True)
class Manifest(os.PathLike[str]):
    """A manifest.csv: one row per image with its crop, labels, status and reason. It can be used as a path.

    `vitmodel.etl` returns it.

    Args:
        path: The manifest.csv.

    Examples:
        >>> manifest = vitmodel.Manifest("crops/manifest.csv")
        >>> manifest.table["status"].isin(["ok", "warned", "refused"]).all().item()
        True
    """

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def folder(self) -> Path:
        """The folder that holds the manifest, the crops and etl_report.html."""
        return self.path.parent

    @property
    def report(self) -> Path:
        """The report of the ETL run, an HTML file."""
        return self.folder / "etl_report.html"

    @cached_property
    def table(self) -> pd.DataFrame:
        """The typed table with absolute paths; unknown values are NaN.

        Raises:
            UsageError: The file does not exist or is not a manifest.
        """
        from vitmodel.data.manifest import read_manifest

        return read_manifest(self.path)

    @property
    def refused(self) -> pd.DataFrame:
        """The images without a crop: image_id, patient_id, reason (a code) and remark (what happened)."""
        columns = ["image_id", "patient_id", "reason", "remark"]
        return self.table.loc[self.table["status"] == "refused", columns].reset_index(drop=True)

    def __repr__(self) -> str:
        return f"Manifest({str(self.path)!r})"


@dataclass(frozen=True)
class Run:
    """The folder of a training run. `vitmodel.train` returns it.

    Args:
        folder: The run folder, with train.yaml, checkpoints, curves and the model package.

    Examples:
        >>> run = vitmodel.Run("run")
        >>> run.package.name
        'package'
        >>> "val/auroc" in run.history
        True
    """

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))

    @property
    def package(self) -> Path:
        """The model package, for `vitmodel.load` and `vitmodel.evaluate`."""
        return self.folder / "package"

    @property
    def recipe(self) -> Path:
        """The YAML file that repeats this training: `vitmodel train --config RECIPE`."""
        return self.folder / "train.yaml"

    @property
    def manifest(self) -> Manifest:
        """The manifest of the training images, with their splits; `vitmodel.evaluate` uses its split "test"."""
        return Manifest(self.folder / "manifest.csv")

    @property
    def history(self) -> pd.DataFrame:
        """The metrics of each epoch: a row per epoch and a column per metric, such as "train/loss" and "val/auroc".

        In a run with folds the columns are named "val/auroc/fold_0" and so on.
        """
        import pandas as pd

        history = json.loads((self.package / "config.json").read_text(encoding="utf-8"))["history"]
        return pd.DataFrame({name: dict(points) for name, points in history.items()}).sort_index().rename_axis("epoch")

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """The measured quality of a model on labelled images. Research software, not a medical device.

    `vitmodel.evaluate` returns it.

    Attributes:
        folder: Folder with report.html, metrics.json and the score tables.
        metrics: Level ("image", "breast", "patient") -> name ("auroc", "f1", "sensitivity", ...) -> the value with its
            95 % interval over patients, `Interval(value, low, high)`; NaN = not defined on these data.
        threshold: Smallest probability that is called positive.

    Examples:
        >>> report = vitmodel.evaluate(
        ...     "run/package",
        ...     "crops/manifest.csv",
        ...     "report",
        ...     split="all",
        ...     replicates=100,
        ...     audit=False,
        ...     card=False,
        ...     progress=False,
        ... )
        >>> 0 <= report.metrics["breast"]["auroc"].value <= 1
        True
    """

    folder: Path
    metrics: dict[str, dict[str, Interval]]
    threshold: float
    details: EvaluationReport = field(repr=False)
    """All contents of report.html."""

    @property
    def path(self) -> Path:
        """The report, an HTML file."""
        return self.folder / "report.html"

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers of the report, as metrics.json holds them.

        Returns:
            Nested dictionaries and lists.

        Examples:
            >>> report = vitmodel.evaluate(
            ...     "run/package",
            ...     "crops/manifest.csv",
            ...     "report",
            ...     split="all",
            ...     replicates=100,
            ...     audit=False,
            ...     card=False,
            ...     progress=False,
            ... )
            >>> report.to_dict()["label"]
            'cancer'
        """
        return self.details.to_dict()

    def __repr__(self) -> str:
        lines = [f"  AUROC per {level}: {metrics['auroc']}" for level, metrics in self.metrics.items()]
        return "\n".join([f"EvaluationResult({str(self.path)!r})", *lines, NOT_A_MEDICAL_DEVICE])
