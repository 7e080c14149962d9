"""The Python API. The command line calls the same implementation, so that both give the same results.

Options are keyword arguments with the names of the command line's flags, `-` written as `_`; `vitmodel VERB --help`
explains them. Messages go to the logger `vitmodel.api`; nothing is printed, except by a training, which reports as on
the command line.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vitmodel.artifacts import EvaluationResult, Manifest, Run
from vitmodel.config import (
    DriftConfig,
    ETLConfig,
    EvaluateConfig,
    PredictConfig,
    PredictorConfig,
    TrainConfig,
    make_config,
)
from vitmodel.errors import UsageError
from vitmodel.utils import NOT_A_MEDICAL_DEVICE, progress_bars

if TYPE_CHECKING:
    import pandas as pd

    from vitmodel.model.network import Network
    from vitmodel.model.package_check import PackageCheck
    from vitmodel.releases.in_memory import SourceImage
    from vitmodel.scoring.explanation import Explanation
    from vitmodel.scoring.prediction import Prediction

logger = logging.getLogger(__name__)

AnyPath = str | os.PathLike[str]
Method = Literal["rollout", "gradient", "occlusion", "integrated"]
NEED_OUT = ("resume", "parquet", "jsonl", "explain", "dicom", "deidentify")
"""Options of `Model.predict` that write files; they need an output folder."""


def load(*packages: AnyPath | Iterable[AnyPath], progress: bool = True, **options: Any) -> Model:
    """Load a model package or, from several, an ensemble whose probabilities are averaged.

    Args:
        *packages: Folders of model packages, such as "run/package", or names on the hub, such as "hf:org/name"; one or
            more, or a list of them. Packages of an ensemble must be trained alike.
        progress: Whether `predict` shows progress bars on standard error.
        **options: `device`, `tokens`, `segment_budget`, `workers`, `flip`, `implausible`, `atypical`, `keep_atypical`,
            `runtime` and `precision`, as for `vitmodel predict`.

    Returns:
        The model, ready to score. Loading never runs code from a package.

    Raises:
        UsageError: A package does not exist, was only pretrained or does not match the others, or an option is wrong.
        VitmodelError: A package is damaged.

    Examples:
        >>> model = vitmodel.load("run/package", device="cpu")
        >>> 0 < model.threshold < 1
        True
    """
    folders = list(_paths(packages))
    if not folders:
        raise UsageError("packages: none is given; pass a model package, such as vitmodel.load('run/package')")
    return Model(make_config(PredictorConfig, options, package=folders[0], ensemble=folders[1:]), progress)


def _paths(items: Iterable[AnyPath | Iterable[AnyPath]]) -> Iterator[Path]:
    """Yield all paths of nested lists. Raise UsageError for other items."""
    for item in items:
        if isinstance(item, str | os.PathLike):
            yield Path(item)
        elif isinstance(item, Iterable):
            yield from _paths(item)
        else:
            raise UsageError(f"packages: must be paths of model packages, not {type(item).__name__} {item!r}")


class Model:
    """One or more loaded model packages, as `vitmodel.load` returns them. Research software, not a medical device.

    Args:
        config: The packages and how they run.
        progress: Whether `predict` shows progress bars on standard error.

    Raises:
        UsageError: A package does not exist, was only pretrained or does not match the others.
        VitmodelError: A package is damaged.

    Examples:
        >>> model = vitmodel.load("run/package", progress=False)
        >>> model.label
        'cancer'
    """

    def __init__(self, config: PredictorConfig, progress: bool = True) -> None:
        from vitmodel.scoring.predictor import Predictor

        self.progress = progress
        self._predictor = Predictor(config)

    @property
    def packages(self) -> list[Path]:
        """The folders of the packages."""
        return [member.folder for member in self._predictor.ensemble.packages]

    @property
    def label(self) -> str:
        """The label rule that the model was trained to predict: a manifest column, or a rule such as birads>=4."""
        return self._predictor.ensemble.label

    @property
    def threshold(self) -> float:
        """Smallest probability of a breast for which the decision is 1."""
        return self._predictor.ensemble.threshold

    @property
    def network(self) -> Network:
        """The network of the first package, a `torch.nn.Module`."""
        return self._predictor.ensemble.model

    def predict(
        self, sources: SourceImage | Iterable[SourceImage], *, out: AnyPath | None = None, **options: Any
    ) -> Prediction:
        """Score mammograms: a probability per image, breast and patient.

        Every input has a row in the result; an input that cannot be scored is refused with a reason and has no score.
        Tables and folders come first in the result, then single files, then inputs that contain no image.

        Args:
            sources: What to score: image files (DICOM, PNG, JPEG, TIFF), folders, zips, tars, DICOMDIRs, release
                tables, manifests, `pydicom.Dataset`s and `vitmodel.Mammogram`s (arrays); one or a list of them.
            out: Folder for the files that `vitmodel predict` writes; None = write nothing.
            **options: `dataset` and, with `out`, `resume`, `parquet`, `jsonl`, `explain`, `dicom` and `deidentify`, as
                for `vitmodel predict`.

        Returns:
            Tables of scores, the same as those of the command line.

        Raises:
            UsageError: A source has a wrong type, a table is invalid, or an option is wrong.
            VitmodelError: The disk is full or `out` cannot be written.

        Examples:
            >>> model = vitmodel.load("run/package", progress=False)
            >>> result = model.predict(["exam/rcc.dcm", pydicom.dcmread("exam/rcc.dcm")])
            >>> len(result.images)
            2
        """
        from vitmodel.scoring.prediction import Prediction
        from vitmodel.scoring.sources import score_sources

        without_effect = [name for name in NEED_OUT if out is None and options.get(name)]
        if without_effect:
            raise UsageError(f"{without_effect[0]}: has no effect without out=FOLDER, the folder for its files")
        with _scratch() as scratch, progress_bars(self.progress):
            config = self._predict_config(sources, scratch, scratch / "out" if out is None else Path(out), options)
            tables = score_sources(self._predictor, config, logger.info).tables
            images = tables.images.copy()
            images["remark"] = images["remark"].str.replace(f"{scratch}/", "", regex=False)  # the folder is deleted
            # Files that share an id get their path as id, with - for /.
            id_prefix = f"{scratch}/".removeprefix("/").replace("/", "-")
            images["image_id"] = images["image_id"].str.replace(id_prefix, "", regex=False)
        return Prediction(images, tables.breasts, tables.patients, self.threshold)

    def explain(self, source: SourceImage, method: Method = "gradient") -> Explanation:
        """Return the heat map of one image: the contribution of each part to its score.

        Args:
            source: One image: a file, a `pydicom.Dataset` or a `vitmodel.Mammogram`.
            method: "gradient" (gradient-weighted attention), "rollout" (attention rollout; shows attention, not
                evidence for cancer), "occlusion" or "integrated" (integrated gradients); the last two need the extra
                `explain`.

        Returns:
            Values per patch and a picture, which can be saved.

        Raises:
            UsageError: The source is not a single image, the image is refused, or the method is unknown.

        Examples:
            >>> model = vitmodel.load("run/package", progress=False)
            >>> model.explain("exam/rcc.dcm", method="rollout").unit
            'attention, times the mean of the breast'
        """
        from vitmodel.config.labels import target_name
        from vitmodel.model.explain import method_named
        from vitmodel.releases.inputs import read_inputs
        from vitmodel.scoring.explanation import Explanation, explain_image, image_of
        from vitmodel.scoring.sources import result_writer

        predictor = self._predictor
        chosen = method_named(method)
        with _scratch() as scratch, progress_bars(self.progress):
            config = self._predict_config(source, scratch, scratch / "out", {"explain": method})
            rows, scored, heat = explain_image(read_inputs(config.source, config.dataset), predictor, method)
            image = image_of(rows.table.iloc[0], rows.rows[0], scored, predictor)
            unit = chosen.unit_for(target_name(self.label))
            picture = result_writer(predictor, config).draw(image, heat, unit, *chosen.scale)
        image_id = str(rows.table["image_id"].iloc[0])
        return Explanation(image_id, method, unit, float(image.probability), self.threshold, heat, picture)

    def _predict_config(self, sources: Any, scratch: Path, out: Path, options: dict[str, Any]) -> PredictConfig:
        """Return the configuration of `vitmodel predict`; sources in memory are first written below `scratch`."""
        from vitmodel.releases.in_memory import write_sources

        package_fields = [field.name for field in fields(PredictorConfig)]
        paths = write_sources(sources, scratch)
        settings = {name: getattr(self._predictor.config, name) for name in package_fields}
        return make_config(PredictConfig, options, source=paths, out=out, **settings)

    def __repr__(self) -> str:
        vit = self.network.config.vit
        names = ", ".join(map(str, self.packages))
        size = self._predictor.ensemble.preprocessing.size
        network = f"ViT {vit.depth} x {vit.dim}, patch {vit.patch}, crops {size}"
        return f"Model({names}: {network}, threshold {self.threshold:.4f})\n{NOT_A_MEDICAL_DEVICE}"


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """Yield a folder that is removed at the end of the block."""
    with tempfile.TemporaryDirectory(prefix="vitmodel-") as name:
        yield Path(os.path.realpath(name))


def etl(source: AnyPath, out: AnyPath, *, progress: bool = True, **options: Any) -> Manifest:
    """Crop, orient and resize every mammogram of an archive; write PNGs and a manifest with one row per image.

    A repeated call processes only images that are missing or changed.

    Args:
        source: Release folder, folder of images, zip or tar of either, one file, or a manifest.
        out: Folder for the crops, manifest.csv and etl_report.html.
        progress: Whether progress bars are shown on standard error.
        **options: `size` (height and width in pixels: `(1024, 512)` or "1024x512"), `mm_per_pixel`, `bits`, `dataset`,
            `workers`, `backend` and the others of `vitmodel etl`.

    Returns:
        The manifest, which can be used as a path; refused images have rows with the reason.

    Raises:
        UsageError: The source is not recognised, its table is invalid, or an option is wrong.
        VitmodelError: The disk is full or `out` cannot be written.

    Examples:
        >>> manifest = vitmodel.etl("release/", "new_crops/", size=(64, 32), progress=False)
        >>> manifest.table["path"].notna().any().item()
        True
    """
    from vitmodel.commands.etl import crop_release

    config = make_config(ETLConfig, options, source=source, out=out)
    with progress_bars(progress):
        crop_release(config, logger.info)
    return Manifest(config.out / "manifest.csv")


def train(manifest: AnyPath | list[AnyPath], run: AnyPath, *, progress: bool = True, **options: Any) -> Run:
    """Train a Vision Transformer on a manifest's crops and write a run folder with a model package.

    The best epoch, the calibration and the threshold are chosen on the split `val`; the split `test` is not used.
    With several devices this program is started again in further processes: in a notebook use one device, or the
    command line.

    Args:
        manifest: A manifest.csv that `vitmodel.etl` wrote, or a list of them, which are merged.
        run: Run folder to write; it must not hold another run.
        progress: Whether a progress bar is shown on standard error.
        **options: `model`, `epochs`, `weights`, `batch_size`, `lr`, `augment` (a mapping), `fusion`, `folds`, `device`,
            `wandb` and the others of `vitmodel train`.

    Returns:
        The run, whose `package` can be loaded.

    Raises:
        UsageError: The manifest or an option is wrong, or `run` holds another run.
        VitmodelError: Training failed or the disk is full.

    Examples:
        >>> run = vitmodel.train(
        ...     "crops/manifest.csv", "new_run", model="vit_micro", epochs=1, workers=0, wandb="off", progress=False
        ... )
        >>> run.package.is_dir()
        True
    """
    from vitmodel.commands.train import train as run_training

    manifests = manifest if isinstance(manifest, list | tuple) else [manifest]
    if not all(isinstance(item, str | os.PathLike) for item in manifests):
        raise UsageError(f"manifest: must be a path or a list of paths, not {manifest!r}")
    config = make_config(TrainConfig, options, manifest=manifests, run=run)
    with progress_bars(progress):
        run_training(config)
    return Run(config.run)


def evaluate(
    packages: AnyPath | Iterable[AnyPath], manifest: AnyPath, out: AnyPath, *, progress: bool = True, **options: Any
) -> EvaluationResult:
    """Evaluate a model package or an ensemble on a manifest with labels and write a report.

    Args:
        packages: A model package, or a list of packages whose probabilities are averaged.
        manifest: A manifest.csv with labels. Its split `test` is used if it has one, else all rows; the option `split`
            changes this.
        out: Folder for report.html, metrics.json and the score tables.
        progress: Whether progress bars are shown on standard error.
        **options: `split`, `replicates`, `aggregate`, `prevalence`, `audit`, `card`, `device` and the others of
            `vitmodel evaluate`.

    Returns:
        The metrics per image, breast and patient with 95 % intervals, and the path of the report.

    Raises:
        UsageError: The chosen rows have no labels, no image could be scored, or an option is wrong.
        VitmodelError: A package is damaged or `out` cannot be written.

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
        >>> print(report.path)
        report/report.html
    """
    from vitmodel.commands.evaluate import evaluate_package

    folders = list(_paths([packages]))
    if not folders:
        raise UsageError("packages: none is given; pass a model package, such as 'run/package'")
    config = make_config(EvaluateConfig, options, package=folders[0], ensemble=folders[1:], manifest=manifest, out=out)
    with progress_bars(progress):
        report = evaluate_package(config, logger.info)
    metrics = {level.name: level.metrics.intervals for level in report.levels}
    return EvaluationResult(config.out, metrics, report.headline.metrics.threshold, report)


def verify(package: AnyPath) -> PackageCheck:
    """Check that a model package is complete, unchanged and usable; no code in it is run.

    Args:
        package: Folder of a model package, such as "run/package".

    Returns:
        What was checked, and the digest that names the package.

    Raises:
        UsageError: The folder is not a model package.
        VitmodelError: A file is missing or was changed, or a value is impossible; the message names it.

    Examples:
        >>> check = vitmodel.verify("run/package")
        >>> sorted(check.files)
        ['MODEL_CARD.md', 'model.safetensors', 'typicality.safetensors']
    """
    from vitmodel.model.package import verify_package

    return verify_package(next(_paths([package])))


def drift(package: AnyPath, scores: AnyPath | Iterable[AnyPath], out: AnyPath) -> pd.DataFrame:
    """Compare the images of one or several runs with those that a model was trained on.

    Args:
        package: A model package, such as "run/package".
        scores: A scores.csv of `vitmodel predict` or `evaluate`, or several in the order of time.
        out: Folder for drift.html, drift.png and drift.csv.

    Returns:
        One row per run and column: index (population stability index), by_chance (its mean without drift),
        chance_limit (exceeded by chance once in a hundred comparisons), verdict ("small", "moderate", "large" or
        "undecided"), and the numbers of images and patients.

    Raises:
        UsageError: The package stores no distributions, or a table is no scores.csv.
        VitmodelError: `out` cannot be written.

    Examples:
        >>> model = vitmodel.load("run/package", progress=False)
        >>> folder = model.predict("exam/").save("monday")
        >>> table = vitmodel.drift("run/package", ["monday/scores.csv"], "drift")
        >>> table["column"].tolist()[0]
        'typicality'
    """
    from vitmodel.commands.drift import measure_runs

    tables = [scores] if isinstance(scores, str | os.PathLike) else list(scores)
    return measure_runs(make_config(DriftConfig, {}, package=package, scores=tables, out=out), logger.info)
