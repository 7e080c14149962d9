"""The command `compare`: measure several models on the same units, with paired intervals of their differences.

A model is a package, which is run, or a file of scores, which is read.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from vitmodel.config import CompareConfig, PredictorConfig, to_command
from vitmodel.config.labels import CANCER
from vitmodel.data.fingerprint import describe_training_overlap, seen_in_training
from vitmodel.data.labels import add_label, explain_missing
from vitmodel.data.manifest import add_exam, breast_ids, is_repeated_file, read_manifest
from vitmodel.data.splits import select_split
from vitmodel.data.tables import read_table
from vitmodel.errors import UsageError
from vitmodel.hub.names import is_package_name
from vitmodel.metrics.compare import Comparison, compare
from vitmodel.metrics.crossfit import cross_fitted_thresholds
from vitmodel.metrics.metrics import METRICS, Metrics, compute_metrics
from vitmodel.metrics.scored_units import ScoredUnits
from vitmodel.model.package import read_config
from vitmodel.model.shared_package import find_package
from vitmodel.scoring.loaded_package import trained_label
from vitmodel.scoring.predictor import Predictor
from vitmodel.scoring.tables import aggregate_by_group
from vitmodel.utils import NOT_A_MEDICAL_DEVICE, to_json, write_atomic

SCORE_FILE_COLUMNS = {"image_id": ("probability", "score"), "prediction_id": ("probability", "score", "cancer")}
"""Column with the ids of a score file -> columns that may hold its scores; the first one present is used.

`cancer` is the score in Kaggle's submissions, but the label in a table of images.
"""
SHOWN_METRICS = (
    "auroc",
    "partial_auroc",
    "auprc",
    "pf1",
    "f1",
    "sensitivity",
    "specificity",
    "brier",
    "ece",
    "calibration_slope",
)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class UnitScores:
    """A model's scores of the units that it scored."""

    scores: pd.Series
    """Score by unit id."""
    seen: pd.Series | None = None
    """Whether the model was trained on each image, by the id of the image's unit; None = unknown (a score file)."""

    def training_overlap(self, units: pd.Index) -> pd.Series | None:
        """Return `seen` for the images of `units`."""
        if self.seen is None:
            return None
        return self.seen[self.seen.index.isin(units)]


@dataclass(frozen=True, kw_only=True)
class MeasuredModel:
    """A model's metrics on the common units."""

    name: str
    """Path of the package or score file."""
    metrics: Metrics
    seen: pd.Series | None
    """See `UnitScores.seen`."""
    difference: Comparison | None
    """Difference from the first model; None for the first model."""


def compare_models(config: CompareConfig) -> None:
    """Print each model's metrics and its differences from the first model, on the units that all of them scored.

    Writes OUT/comparison.json if an output folder is given.

    Raises:
        UsageError: An option has no effect, the rows have no labels, a score file is invalid, or no unit has a score of
            every model.
    """
    config = replace(config, models=tuple(pinned(model) for model in config.models))
    check_used(config)
    label = chosen_label(config)
    table, split = read_labelled_rows(config, label)
    units = labelled_units(table, label, config)
    models = [unit_scores(model, table, config) for model in config.models]
    scores = pd.DataFrame({position: model.scores for position, model in enumerate(models)})
    common = units.join(scores, how="left").dropna()
    print(
        f"{len(common)} of {len(units)} labelled {config.level} units are scored by all; split {split}, label {label}"
    )
    if common.empty:
        raise UsageError(
            f"models: no labelled {config.level} of {config.manifest} ({split}) has a score of every model; "
            "check that the ids of the score files match the manifest"
        )
    seen = [model.training_overlap(common.index) for model in models]
    for model, images in zip(config.models, seen, strict=True):
        messages = describe_training_overlap(images, str(model)) if images is not None else []
        for message in messages:
            print(message)
    measured = measure_models(common, seen, config)
    print_comparison(measured)
    if config.out:
        write_comparison(measured, split, label, config)
    print(NOT_A_MEDICAL_DEVICE)


def pinned(model: Path) -> Path:
    """Return a model, with the commit of one on the hub, so that each step reads the same."""
    _, name = find_package(model)
    return model if name is None else Path(str(name))


def is_package(model: Path) -> bool:
    """Return whether a model is a package, and no score file."""
    return model.is_dir() or is_package_name(model)


def check_used(config: CompareConfig) -> None:
    """Raise UsageError for an option that has no effect, because it concerns only packages or only score files."""
    has_score_file = any(not is_package(model) for model in config.models)
    has_package = any(is_package(model) for model in config.models)
    default = CompareConfig(models=config.models, manifest=config.manifest)
    for name, kind, used in (
        ("aggregate", "a score file", has_score_file),
        ("device", "a model package", has_package),
        ("tokens", "a model package", has_package),
        ("workers", "a model package", has_package),
    ):
        if not used and getattr(config, name) != getattr(default, name):
            raise UsageError(f"{name}: has no effect without {kind} among the models; leave --{name} out")


def chosen_label(config: CompareConfig) -> str:
    """Return the rule of the true labels: the chosen one, that of the first package, or cancer.

    A message names the packages that were trained on another one.
    """
    trained = {
        model: trained_label(read_config(find_package(model)[0])[2]) for model in config.models if is_package(model)
    }
    label = config.label or next(iter(trained.values()), CANCER)
    for model, other in trained.items():
        if other != label:
            print(f"{model} was trained on {other}, but is measured by {label}")
    return label


def read_labelled_rows(config: CompareConfig, label: str) -> tuple[pd.DataFrame, str]:
    """Return the manifest's rows to compare on, without copies of images, and the name of their split.

    Raises:
        UsageError: The label is empty on all rows.
    """
    whole = add_label(read_manifest(config.manifest), label, str(config.manifest))
    table, split = select_split(whole, config.split, str(config.manifest))
    if table[label].isna().all():
        raise UsageError(
            f"{config.manifest}: no row of the {len(table)} in the split {split} has a known label: "
            f"{explain_missing(table, label)}, or choose another split with --split"
        )
    copies = is_repeated_file(table)
    if copies.any():
        print(f"left out as copies of another image of their breast: {copies.sum()}")
        table = table[~copies]
    return table, split


def unit_ids(table: pd.DataFrame, level: str) -> pd.Series:
    """Return the id of each row's image, breast or patient."""
    ids = {"image": table["image_id"], "breast": breast_ids(table), "patient": table["patient_id"]}
    return ids[level]


def labelled_units(table: pd.DataFrame, label: str, config: CompareConfig) -> pd.DataFrame:
    """Return label and patient of each unit with a known label, indexed by unit id."""
    groups = table.assign(label=table[label]).groupby(unit_ids(table, config.level).rename("unit"))
    return groups.agg(label=("label", "max"), patient_id=("patient_id", "first")).dropna()


def unit_scores(model: Path, table: pd.DataFrame, config: CompareConfig) -> UnitScores:
    """Return the scores of a package or score file. Raises UsageError naming the file if it cannot be used."""
    if is_package(model):
        return package_scores(model, table, config)
    file_scores, key = read_scores(model)
    if key == "prediction_id":
        if config.level == "image":
            raise UsageError(f"{model}: has a score per breast; compare it with --level breast or patient")
        if config.level == "breast":
            return UnitScores(file_scores)
        return UnitScores(worst_breast_scores(file_scores.dropna(), table))
    rows = table[table["image_id"].isin(file_scores.dropna().index)]
    if rows.empty:
        return UnitScores(pd.Series(dtype=float))
    return UnitScores(aggregate_scores(file_scores.loc[rows["image_id"]].set_axis(rows.index), rows, config))


def aggregate_scores(scores: pd.Series, rows: pd.DataFrame, config: CompareConfig) -> pd.Series:
    """Aggregate the scores of images to the units of the comparison.

    Args:
        scores: Score per row of `rows`.
        rows: Manifest rows of the scored images.
        config: Level of the units and how the images of a breast are aggregated.

    Returns:
        Score by unit id. A patient's score is the largest of her breasts' scores, as in packages.
    """
    if config.level == "image":
        return scores.set_axis(rows["image_id"])
    breasts = aggregate_by_group(scores, breast_ids(rows), config.aggregate)
    if config.level == "breast":
        return breasts
    return worst_breast_scores(breasts, rows)


def worst_breast_scores(breasts: pd.Series, rows: pd.DataFrame) -> pd.Series:
    """Return each patient's largest breast score by patient id; breasts without a row in `rows` are left out."""
    patients = rows.groupby(breast_ids(rows))["patient_id"].first()
    return breasts.groupby(patients).max()


def package_scores(folder: Path, table: pd.DataFrame, config: CompareConfig) -> UnitScores:
    """Return the package's probabilities, equal to those of `vitmodel predict`."""
    predictor = Predictor(
        PredictorConfig(package=folder, device=config.device, tokens=config.tokens, workers=config.workers)
    )
    tables = predictor.score(table)
    images = tables.images
    units = {"image": images, "breast": tables.breasts, "patient": tables.patients}[config.level]
    ids = breast_ids(units) if config.level == "breast" else units[f"{config.level}_id"]
    scores = units["probability"].set_axis(ids)
    scored = images[images["probability"].notna()]
    seen = seen_in_training(scored, predictor.ensemble.package["data"])
    return UnitScores(scores, seen.set_axis(unit_ids(scored, config.level)))


def read_scores(path: Path) -> tuple[pd.Series, str]:
    """Read a score file.

    Returns:
        The scores by id (NaN = refused), and the name of the id column: `image_id` or `prediction_id`. With a column
        exam_id, a score belongs to the breast in that exam.

    Raises:
        UsageError: A column is missing or a value is invalid; names the file and the row.
    """
    table = read_table(path)
    key = next((name for name in SCORE_FILE_COLUMNS if name in table), "")
    column = next((name for name in SCORE_FILE_COLUMNS.get(key, ()) if name in table), None)
    if column is None:
        raise UsageError(
            f"{path}: no columns of scores; a score file has image_id with probability or score, "
            "or prediction_id with probability, score or cancer"
        )
    values = pd.to_numeric(table[column], errors="coerce")
    ids = add_exam(table[key], table) if key == "prediction_id" else table[key]
    for invalid, problem in (
        (values.isna() & table[column].notna(), "is not a number; write a probability, or leave the cell empty"),
        ((values < 0) | (values > 1), "lies outside [0, 1]; write a probability"),
        (ids.duplicated(), f"is a second score of the same {key}; keep one row of each"),
    ):
        if invalid.any():
            row = int(np.flatnonzero(invalid)[0])
            raise UsageError(f"{path}: column {column}, row {row + 1}: {table[column].iloc[row]!r} {problem}")
    return pd.Series(values.to_numpy(), index=ids.to_numpy()), key


def measure_models(common: pd.DataFrame, seen: list[pd.Series | None], config: CompareConfig) -> list[MeasuredModel]:
    """Compute each model's metrics, and its differences from the first model.

    Args:
        common: Units that all models scored: label, patient_id, and the scores of each model in a column named by its
            position.
        seen: `UnitScores.seen` per model, for the common units.
        config: The models, and seed and number of the bootstrap replicates.
    """
    positions = range(len(config.models))
    samples = [ScoredUnits(common["label"], common[position], common["patient_id"]) for position in positions]
    thresholds = [cross_fitted_thresholds(sample, "f1", seed=config.seed) for sample in samples]
    measured = []
    for position in positions:
        difference = None
        if position:
            pair = (thresholds[0], thresholds[position])
            difference = compare(samples[0], samples[position], pair, config.replicates, config.seed)
        metrics = compute_metrics(samples[position], thresholds[position], config.replicates, config.seed)
        name = str(config.models[position])
        measured.append(MeasuredModel(name=name, metrics=metrics, seen=seen[position], difference=difference))
    return measured


def write_comparison(measured: list[MeasuredModel], split: str, label: str, config: CompareConfig) -> None:
    """Write OUT/comparison.json: the metrics of each model, and the differences from the first."""
    models = {}
    differences = {}
    for model in measured:
        seen_images = None if model.seen is None else int(model.seen.sum())
        models[model.name] = model.metrics.to_dict() | {"seen_images": seen_images}
        if model.difference is not None:
            differences[model.name] = asdict(model.difference)
    facts = {
        "command": to_command("compare", config),
        "split": split,
        "label": label,
        "level": config.level,
        "first": measured[0].name,
        "models": models,
        "differences": differences,
    }
    assert config.out is not None
    write_atomic(config.out / "comparison.json", to_json(facts))
    print(f"comparison: {config.out / 'comparison.json'}")


def print_comparison(measured: list[MeasuredModel]) -> None:
    """Print a table of the metrics of each model and its differences from the first."""
    titles: dict[str, str] = {}
    for group in METRICS.values():
        titles |= group
    first = measured[0].metrics
    print(
        f"{first.positives} of {first.units} positive, {first.patients} patients; "
        "decisions at cross-fitted thresholds for the largest F1"
    )
    for position, model in enumerate(measured):
        print(f"\n{LETTERS[position % len(LETTERS)]}  {model.name}")
        for name in SHOWN_METRICS:
            difference = ""
            if model.difference is not None:
                difference = f"   difference from A {model.difference.differences[name]}"
            print(f"  {titles[name]:52} {model.metrics.intervals[name]}{difference}")
        if model.difference is not None:
            p_value = f"p = {model.difference.p_value:.3g}"
            print(f"  {'DeLong, AUROC':52} {'':24}   difference from A {model.difference.delong}, {p_value}")
    print()
