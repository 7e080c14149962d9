"""Stage: packages or score files + manifest -> how they differ on the same units, with paired intervals. Knows no network."""

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from vitmodel.config import CompareConfig, PredictorConfig, to_command
from vitmodel.data.fingerprint import describe_training_overlap, seen_in_training
from vitmodel.data.manifest import breast_ids, is_repeated_file, read_manifest, read_table
from vitmodel.data.splits import select_split
from vitmodel.errors import UsageError
from vitmodel.metrics.bootstrap import Interval
from vitmodel.metrics.compare import Comparison, compare
from vitmodel.metrics.crossfit import cross_fitted_thresholds
from vitmodel.metrics.metrics import METRICS, Metrics, compute_metrics
from vitmodel.metrics.scored_units import ScoredUnits
from vitmodel.scoring.predictor import Predictor
from vitmodel.scoring.tables import aggregate_by_group
from vitmodel.utils import NOT_A_MEDICAL_DEVICE, to_json, write_atomic

SCORE_FILE_COLUMNS = {"image_id": ("probability", "score"), "prediction_id": ("probability", "score", "cancer")}
"""By the column that names a file's units: the columns that may hold their scores, of which the first is taken. `cancer` is the score in
Kaggle's submissions, but the truth in a table of images."""
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


class UnitScores(NamedTuple):
    """What a model says of each unit that it scored, by the unit's id."""

    units: pd.Series
    seen: pd.Series | None = None
    """Whether the model has learned from each image, by the id of its unit; a score file does not say."""

    def training_overlap(self, units: pd.Index) -> pd.Series | None:
        """`seen` of the images of these units."""
        return None if self.seen is None else self.seen[self.seen.index.isin(units)]


def compare_models(config: CompareConfig) -> None:
    """Print the figures of each model and its differences from the first, on the units that all of them scored; write them to OUT."""
    check_used(config)
    table, split = select_split(read_manifest(config.manifest), config.split, str(config.manifest))
    if config.label not in table or table[config.label].isna().all():
        raise UsageError(
            f"{config.manifest}: column {config.label} is empty on the {len(table)} rows to compare on ({split})"
        )
    copies = is_repeated_file(table)
    if copies.any():
        print(f"left out, byte for byte copies of another image of their breast: {copies.sum()}")
        table = table[~copies]
    units = labelled_units(table, config)
    found = [unit_scores(model, table, config) for model in config.models]
    scores = pd.DataFrame({position: each.units for position, each in enumerate(found)})
    together = units.join(scores, how="left").dropna()
    print(f"{len(together)} of {len(units)} labelled {config.level} units are scored by all; split {split}")
    if together.empty:
        raise UsageError(
            f"models: no labelled {config.level} of {config.manifest} ({split}) has a score of each of them"
        )
    seen = [each.training_overlap(together.index) for each in found]
    for model, images in zip(config.models, seen, strict=True):
        for sentence in () if images is None else describe_training_overlap(images, str(model)):
            print(sentence)
    samples = [
        ScoredUnits(together["label"], together[position], together["patient_id"])
        for position in range(len(config.models))
    ]
    thresholds = [cross_fitted_thresholds(sample, "f1", seed=config.seed) for sample in samples]
    figures = [
        compute_metrics(sample, cut, config.replicates, config.seed)
        for sample, cut in zip(samples, thresholds, strict=True)
    ]
    against = [
        compare(samples[0], sample, (thresholds[0], cut), config.replicates, config.seed)
        for sample, cut in zip(samples[1:], thresholds[1:], strict=True)
    ]
    print_comparison(config, figures, against)
    if config.out:
        models = {
            str(model): metrics.to_dict() | {"seen_images": None if images is None else int(images.sum())}
            for model, metrics, images in zip(config.models, figures, seen, strict=True)
        }
        differences = {str(model): asdict(found) for model, found in zip(config.models[1:], against, strict=True)}
        facts = {
            "command": to_command("compare", config),
            "split": split,
            "level": config.level,
            "first": str(config.models[0]),
        }
        write_atomic(config.out / "comparison.json", to_json(facts | {"models": models, "differences": differences}))
        print(f"comparison: {config.out / 'comparison.json'}")
    print(NOT_A_MEDICAL_DEVICE)


def check_used(config: CompareConfig) -> None:
    """Raise UsageError for an option that concerns packages only, or score files only, where there are none."""
    files = [model for model in config.models if not model.is_dir()]
    default = CompareConfig(models=config.models, manifest=config.manifest)
    for name, kind, used in (
        ("aggregate", "a score file", bool(files)),
        ("device", "a model package", len(files) < len(config.models)),
        ("tokens", "a model package", len(files) < len(config.models)),
        ("jobs", "a model package", len(files) < len(config.models)),
    ):
        if not used and getattr(config, name) != getattr(default, name):
            raise UsageError(f"{name}: has no effect without {kind} among the models; leave --{name} out")


def unit_ids(table: pd.DataFrame, level: str) -> pd.Series:
    return {"image": table["image_id"], "breast": breast_ids(table), "patient": table["patient_id"]}[level]


def labelled_units(table: pd.DataFrame, config: CompareConfig) -> pd.DataFrame:
    """The label and the patient of each unit with a known label, by its id."""
    groups = table.assign(label=table[config.label]).groupby(unit_ids(table, config.level).rename("unit"))
    return groups.agg(label=("label", "max"), patient_id=("patient_id", "first")).dropna()


def unit_scores(model: Path, table: pd.DataFrame, config: CompareConfig) -> UnitScores:
    """The model's score of each unit that it scored, by the unit's id. Raises UsageError naming the file."""
    if model.is_dir():
        return package_scores(model, table, config)
    scored, key = read_scores(model)
    if key == "prediction_id":
        if config.level == "image":
            raise UsageError(f"{model}: has a score per breast, so that it cannot be compared per image")
        return UnitScores(scored if config.level == "breast" else worst_breast_scores(scored.dropna(), table))
    rows = table[table["image_id"].isin(scored.dropna().index)]
    if rows.empty:
        return UnitScores(pd.Series(dtype=float))
    return UnitScores(aggregate_scores(scored.loc[rows["image_id"]].set_axis(rows.index), rows, config))


def aggregate_scores(scores: pd.Series, rows: pd.DataFrame, config: CompareConfig) -> pd.Series:
    """The images' scores as those of units, by the unit's id: aggregated per breast, and then, as packages do, a patient's largest."""
    if config.level == "image":
        return scores.set_axis(rows["image_id"])
    breasts = aggregate_by_group(scores, breast_ids(rows), config.aggregate)
    return breasts if config.level == "breast" else worst_breast_scores(breasts, rows)


def worst_breast_scores(breasts: pd.Series, rows: pd.DataFrame) -> pd.Series:
    """Each patient's largest score, by her id, of the scores of breasts by theirs; breasts that `rows` lack are left out."""
    return breasts.groupby(rows.groupby(breast_ids(rows))["patient_id"].first()).max()


def package_scores(folder: Path, table: pd.DataFrame, config: CompareConfig) -> UnitScores:
    """The package's probability of each unit, as `vitmodel predict` gives it."""
    predictor = Predictor(PredictorConfig(package=folder, device=config.device, tokens=config.tokens, jobs=config.jobs))
    tables = predictor.score(table)
    images = tables.images
    units = {"image": images, "breast": tables.breasts, "patient": tables.patients}[config.level]
    scores = units.set_index({"image": "image_id", "breast": "prediction_id", "patient": "patient_id"}[config.level])[
        "probability"
    ]
    used = images[images["probability"].notna()]
    return UnitScores(
        scores, seen_in_training(used, predictor.ensemble.package["data"]).set_axis(unit_ids(used, config.level))
    )


def read_scores(path: Path) -> tuple[pd.Series, str]:
    """The scores of a file by image_id or prediction_id, and which of the two; NaN = refused. Raises UsageError naming file and row."""
    table = read_table(path)
    key = next((name for name in SCORE_FILE_COLUMNS if name in table), "")
    column = next((name for name in SCORE_FILE_COLUMNS.get(key, ()) if name in table), None)
    if column is None:
        raise UsageError(
            f"{path}: a score file has image_id with probability or score, or prediction_id with one of these or cancer"
        )
    values = pd.to_numeric(table[column], errors="coerce")
    for bad, problem in (
        (values.isna() & table[column].notna(), "is not a number"),
        ((values < 0) | (values > 1), "lies outside [0, 1]"),
        (table[key].duplicated(), f"is a second score of the same {key}"),
    ):
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise UsageError(f"{path}: column {column}, row {row + 1}: {table[column].iloc[row]!r} {problem}")
    return pd.Series(values.to_numpy(), index=table[key].to_numpy()), key


def print_comparison(config: CompareConfig, figures: list[Metrics], against: list[Comparison]) -> None:
    """The table on standard output."""
    titles = {name: title for group in METRICS.values() for name, title in group.items()}
    first = figures[0]
    print(
        f"{first.positives} of {first.units} positive, {first.patients} patients; decisions at cross-fitted thresholds for the largest F1"
    )
    for position, (model, metrics) in enumerate(zip(config.models, figures, strict=True)):
        print(f"\n{'ABCDEFGHIJKLMNOPQRSTUVWXYZ'[position % 26]}  {model}")
        for name in SHOWN_METRICS:
            difference = f"   difference from A {against[position - 1].differences[name]}" if position else ""
            print(f"  {titles[name]:52} {metrics.intervals[name]}{difference}")
        if position:
            delong: Interval = against[position - 1].delong
            print(
                f"  {'DeLong, AUROC':52} {'':24}   difference from A {delong}, p = {against[position - 1].p_value:.3g}"
            )
    print()
