"""The command `evaluate`: measure a model package on a manifest and write metrics.json and report.html."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd

from vitmodel import __version__
from vitmodel.config import EvaluateConfig, to_command
from vitmodel.config.labels import target_name, target_title
from vitmodel.data.dataset import to_tensor
from vitmodel.data.drift import DISTRIBUTIONS, ColumnDrift, large_drift_messages, write_distributions
from vitmodel.data.exams import describe_unseen_sources
from vitmodel.data.fingerprint import describe_training_overlap, seen_in_training
from vitmodel.data.labels import add_label, explain_missing
from vitmodel.data.manifest import breast_ids, read_manifest
from vitmodel.data.rows import ManifestRow
from vitmodel.data.splits import select_split
from vitmodel.errors import UsageError, VitmodelError
from vitmodel.hub.names import is_package_name
from vitmodel.metrics.multiclass import Bootstrap
from vitmodel.model.explain import gradient
from vitmodel.model.package import CARD_FILE
from vitmodel.model.package_check import record_file
from vitmodel.model.packed_batch import ImageMetadata
from vitmodel.reports.contact_sheet import redact_message, refused_thumbnails, sample_by_reason
from vitmodel.reports.evaluation import ErrorCase, EvaluationReport, RefusedImage, limits_of, write_report
from vitmodel.reports.model_card import add_evaluation_section
from vitmodel.results.overlay import blend_heat_map
from vitmodel.results.score_files import write_score_files
from vitmodel.scoring.evaluation import PLOTTED_LEVEL, Evaluation, join_known
from vitmodel.scoring.predictor import Predictor
from vitmodel.scoring.report_facts import (
    describe_data,
    describe_label,
    describe_method,
    describe_package,
    describe_typicality,
    fallbacks,
    per_package,
    training_curves,
    uses_own_aggregation,
)
from vitmodel.scoring.stream import ScoringRows
from vitmodel.scoring.tables import fallback_messages, is_duplicate, recropping_messages
from vitmodel.utils import NOT_A_MEDICAL_DEVICE, progress, to_json, write_atomic

HEATMAP_METHOD = "gradient"
"""Method of the report's heat maps: attention weighted by its gradient; one forward and one backward pass per image."""
MAX_REFUSALS = 24
"""Number of refused images that the report shows."""
MAX_ERRORS = 24
"""Number of most confident errors in the report."""


@dataclass(frozen=True, kw_only=True)
class ScoredManifest:
    """The manifest, its rows that are evaluated, and their scores."""

    whole: pd.DataFrame
    """All rows of the manifest."""
    split: str
    """Name of the split that is evaluated."""
    rows: ScoringRows
    images: pd.DataFrame
    """Table of images, one row per row of `rows`."""
    logits: np.ndarray
    """Outputs `(N, L + A, M)` for N images: L levels (image, breast), A auxiliary outputs and M models."""
    used: pd.Series
    """Whether each row is measured: it has a score and is not a copy."""
    seen: pd.Series
    """Whether the model was trained on each measured row; NaN = unknown."""
    drift: list[ColumnDrift]
    """What the images look like, compared with the training set; empty if the package stores no distributions."""


def evaluate(config: EvaluateConfig) -> None:
    """Measure a package on a manifest and print the result."""
    evaluate_package(config)


def evaluate_package(config: EvaluateConfig, say: Callable[[str], object] = print) -> EvaluationReport:
    """Score the chosen rows, measure them against their labels and return the report.

    Writes metrics.json, report.html, the score tables and the model card. The command line and `vitmodel.evaluate`
    share this function.

    Args:
        config: Packages, manifest, output folder and options.
        say: Called with each message of the run.

    Raises:
        UsageError: The chosen rows have no labels, or none of their images could be scored.
    """
    predictor, scored = score_manifest(config, say)
    evaluation = evaluation_of(config, predictor, scored)
    pictures = draw_pictures(config, predictor, evaluation, scored)
    intervals: Any = progress(None, "intervals", total=evaluation.measurements, unit="table")
    with intervals as bar:
        evaluation = replace(evaluation, measured=bar.update)
        report = compose_report(config, predictor, evaluation, scored, pictures)
        bar.total = bar.n  # tables that cannot be computed are left out
    write_metrics(config, scored, report)
    write_report(config.out / "report.html", report)
    for message in describe_report(report):
        say(message)
    if config.card and config.ensemble:
        say("no model card is written: the metrics are those of several packages together")
    elif config.card and is_package_name(config.package):
        say(f"no model card is written: {config.package} is a copy in the cache; `vitmodel push` uploads a card")
    elif config.card:
        for message in update_model_card(config, report):
            say(message)
    say(f"report: {config.out / 'report.html'}\n{NOT_A_MEDICAL_DEVICE}")
    return report


def score_manifest(config: EvaluateConfig, say: Callable[[str], object]) -> tuple[Predictor, ScoredManifest]:
    """Load the packages, score the chosen rows of the manifest and write the score tables.

    Raises:
        UsageError: The rows have no labels, or all of their images were refused.
    """
    predictor = Predictor(config)
    label = label_of(config, predictor)
    whole = add_label(read_manifest(config.manifest), label, str(config.manifest))
    table, split = select_split(whole, config.split, str(config.manifest))
    for message in check_measurable(table, predictor, config, split):
        say(message)
    rows = predictor.attach(table)
    records, logits = predictor.predict_logits(rows)
    tables = predictor.tables(table, records, logits)
    images = tables.images
    used = images["probability"].notna() & ~is_duplicate(images)
    if not used.any():
        raise UsageError(
            f"{config.manifest}: all {len(images)} images were refused, so that nothing can be measured; "
            "see the column reason of the manifest"
        )
    write_score_files(*tables, config.out)
    drift = predictor.drift(images)
    write_distributions(drift, config.out / DISTRIBUTIONS)
    for message in predictor.explain_missing_looks() + fallback_messages(images) + large_drift_messages(drift):
        say(message)
    seen = seen_in_training(images[used], *(member.package["data"] for member in predictor.ensemble.packages))
    for message in describe_training_overlap(seen):
        say(message)
    scored = ScoredManifest(
        whole=whole, split=split, rows=rows, images=images, logits=logits, used=used, seen=seen, drift=drift
    )
    return predictor, scored


def write_metrics(config: EvaluateConfig, scored: ScoredManifest, report: EvaluationReport) -> None:
    """Write OUT/metrics.json: every number of the report and what was measured."""
    facts = {
        "package": str(config.package),
        "ensemble": [str(folder) for folder in config.ensemble],
        "manifest": str(config.manifest.absolute()),
        "split": scored.split,
        "seen_images": int(scored.seen.sum()),
        "unhashed_images": int(scored.seen.isna().sum()),
    }
    write_atomic(config.out / "metrics.json", to_json(facts | report.to_dict()))


def describe_report(report: EvaluationReport) -> list[str]:
    """Return the messages that summarise a report: AUROC per level and per baseline, and what could not be computed."""
    messages = []
    for level in report.levels:
        metrics = level.metrics
        counts = f"{metrics.units} with {metrics.positives} positive"
        messages.append(f"AUROC per {level.name}: {metrics.intervals['auroc']}, {counts}")
    for baseline in report.audit.baselines if report.audit else ():
        auroc = baseline.metrics.intervals["auroc"]
        messages.append(
            f"{baseline.name}, AUROC per {report.headline.name}: {auroc}, "
            f"most informative column: {baseline.top_feature}"
        )
    return messages + list(report.missing_sections.values())


def evaluation_of(config: EvaluateConfig, predictor: Predictor, scored: ScoredManifest) -> Evaluation:
    """Return the measured rows with their scores and aggregation, which the configuration or else the package sets."""
    ensemble = predictor.ensemble
    own = uses_own_aggregation(config, predictor)
    aggregate: str = ensemble.aggregation if own else config.aggregate
    if own and ensemble.fused:
        aggregate = "mean_logit"  # for scores that fusion did not make, such as those of a baseline
    patient_aggregate: str = config.patient_aggregate
    if patient_aggregate == "package":
        patient_aggregate = ensemble.patient_aggregation
    return Evaluation(
        table=scored.rows.table[scored.used],
        probability=scored.images.loc[scored.used, "probability"].to_numpy(),
        label=label_of(config, predictor),
        aggregate=aggregate,
        patient_aggregate=patient_aggregate,
        threshold=ensemble.threshold,
        replicates=config.replicates,
        seed=config.seed,
        breast_logits=scored.logits[scored.used, ensemble.levels - 1] if own and ensemble.calibrates_breasts else None,
        calibrate=ensemble.probability,
    )


def label_of(config: EvaluateConfig, predictor: Predictor) -> str:
    """Return the rule of the true labels: that of the configuration or else of the package."""
    return config.label or predictor.ensemble.label


def check_measurable(table: pd.DataFrame, predictor: Predictor, config: EvaluateConfig, split: str) -> list[str]:
    """Return messages on what cannot be measured or needs extra time. Raises UsageError if all labels are empty."""
    label = label_of(config, predictor)
    if table[label].isna().all():
        raise UsageError(
            f"{config.manifest}: no row of the {len(table)} in the split {split} has a known label: "
            f"{explain_missing(table, label)}, or choose another split with --split"
        )
    messages = []
    if label != predictor.ensemble.label:
        messages.append(
            f"measured by {label}, but the model was trained on {predictor.ensemble.label}: "
            "its calibration and threshold are for the latter"
        )
    if not (table[label] == 1).any():
        rows = f"row of {config.manifest} ({split})"
        messages.append(f"no {rows} has {target_name(label)}: ranking, sensitivity and pF1 are not defined")
    return messages + recropping_messages(table, predictor.ensemble.package["preprocessing"])


class Pictures(NamedTuple):
    """The pictures of patients in the report."""

    refused: list[RefusedImage]
    errors: list[ErrorCase]


def draw_pictures(
    config: EvaluateConfig, predictor: Predictor, evaluation: Evaluation, scored: ScoredManifest
) -> Pictures:
    """Return the pictures of refused images and of the most confident errors."""
    preprocessing = predictor.ensemble.package["preprocessing"]
    measured_rows = scored.rows.take(np.flatnonzero(scored.used).tolist())
    return Pictures(
        refused_images(scored.rows.table, scored.images, preprocessing, config.workers),
        list(confident_errors(predictor, evaluation, measured_rows)),
    )


def compose_report(
    config: EvaluateConfig,
    predictor: Predictor,
    evaluation: Evaluation,
    scored: ScoredManifest,
    pictures: Pictures,
) -> EvaluationReport:
    """Return the content of the report: what was measured and how."""
    ensemble = predictor.ensemble
    table = scored.rows.table
    images = scored.images
    unique = table[~is_duplicate(images)]
    units = {"image": len(unique), "breast": breast_ids(unique).nunique(), "patient": unique["patient_id"].nunique()}
    levels = evaluation.levels(units)
    plotted = next(level for level in levels if level.name == PLOTTED_LEVEL)
    groups, skipped_attributes = evaluation.subgroups()
    corrected = evaluation.at_prevalence(ensemble.prevalence, config.prevalence) if config.prevalence else None
    observed = plotted.metrics.positives / plotted.metrics.units
    packages = " and ".join(map(str, (config.package, *config.ensemble)))
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return EvaluationReport(
        title=f"{target_title(evaluation.label)} scores of {packages}",
        command=to_command("evaluate", config),
        created=f"{now}, vitmodel {__version__}",
        levels=levels,
        headline=plotted,
        label=evaluation.label,
        method=describe_method(config, predictor, evaluation, observed, corrected is not None)
        | {
            "Label": describe_label(evaluation.label, ensemble.label),
            "Rows": f"split {scored.split}, {len(table)} images",
            "Left out": f"{len(table) - len(unique)} copies of another image of their breast",
            "Images that the model has seen": "; ".join(describe_training_overlap(scored.seen)) or "none",
        },
        model=per_package(predictor, describe_package),
        data=describe_data(config, table),
        drift=scored.drift,
        typicality_sentence=describe_typicality(images, config.atypical),
        refusals=images.loc[images["status"] == "refused", "reason"].value_counts().to_dict(),
        refused=pictures.refused,
        shared_adapter_images=fallbacks(images, describe_unseen_sources(table, ensemble.model.config)),
        history={} if config.ensemble else training_curves(ensemble.package["history"]),
        folds=evaluation.folds(),
        thresholds=evaluation.thresholds(config.sensitivity),
        recalibrated=evaluation.recalibrated(),
        at_prevalence=(config.prevalence, corrected) if config.prevalence and corrected else None,
        subgroups=groups,
        skipped_attributes=skipped_attributes,
        auxiliary=ensemble.auxiliary.metrics(
            evaluation.table, scored.logits[scored.used, ensemble.levels :], Bootstrap(config.replicates, config.seed)
        ),
        audit=evaluation.audit(scored.whole) if config.audit else None,
        errors=pictures.errors,
        heat_map_legend=gradient.unit_for(target_name(ensemble.label)),
        limits=limits_of(evaluation.label),
    )


def confident_errors(predictor: Predictor, evaluation: Evaluation, rows: ScoringRows) -> Iterator[ErrorCase]:
    """Yield the images whose score is farthest from their label, each with its crop and its crop with the heat map."""
    positions = evaluation.errors(MAX_ERRORS)
    errors = rows.take(positions)
    probabilities = evaluation.probability[positions]
    labels = errors.table[evaluation.label]
    columns = zip(errors.table.itertuples(), labels, probabilities, errors.rows, errors.metadata, strict=True)
    for record, label, probability, row, metadata in progress(columns, "heat maps of errors", total=len(positions)):
        age = np.nan if np.isnan(record.age) else f"age {record.age:.0f}"
        density = np.nan if pd.isna(record.density) else f"density {record.density}"
        description = join_known([f"{record.laterality} {record.view}".strip(), age, density])
        crop, overlay = crop_and_overlay(predictor, row, metadata)
        yield ErrorCase(record.image_id, float(probability), int(label), description, crop, overlay)


def crop_and_overlay(predictor: Predictor, row: ManifestRow, metadata: ImageMetadata) -> tuple[np.ndarray, np.ndarray]:
    """Return a crop `(H, W)` and the crop with its heat map on it `(H, W, 3)`, both uint8."""
    loaded = predictor.stream.load(row, metadata)
    assert loaded.cropped.crop is not None, "a scored image has a crop"
    crop = (255 * to_tensor(loaded.cropped.crop)[0].numpy()).astype(np.uint8)
    low, high = gradient.scale
    heat = np.nan_to_num(predictor.explain(loaded, HEATMAP_METHOD), nan=low)
    opacity = np.clip((heat - low) / (high - low), 0, 1).astype(np.float32)
    opacity = cv2.resize(opacity, crop.shape[::-1], interpolation=cv2.INTER_LINEAR) * (crop > 0)
    return crop, blend_heat_map(cv2.cvtColor(crop, cv2.COLOR_GRAY2RGB), opacity)


def refused_images(table: pd.DataFrame, images: pd.DataFrame, preprocessing: str, jobs: int) -> list[RefusedImage]:
    """Return examples of the refused images with their pictures, the rarest reason first.

    Args:
        table: The manifest's rows.
        images: Table of images, with the verdicts of this run.
        preprocessing: Settings with which sources are decoded, as the package stores them.
        jobs: Number of threads; 0 = one per core.
    """
    verdicts = images[["reason", "remark"]][images["status"] == "refused"]
    chosen = sample_by_reason(table.loc[verdicts.index].assign(**verdicts), MAX_REFUSALS)
    pictures = refused_thumbnails(chosen.assign(preprocessing=preprocessing), jobs)
    return [
        RefusedImage(str(row.reason), row.image_id, redact_message(row), picture)
        for row, picture in zip(chosen.itertuples(), pictures, strict=True)
    ]


def update_model_card(config: EvaluateConfig, report: EvaluationReport) -> list[str]:
    """Add the results to the package's model card; return a message if the card cannot be written."""
    card = config.package / CARD_FILE
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    try:
        write_atomic(card, add_evaluation_section(text, report))
        record_file(config.package, CARD_FILE)
    except VitmodelError as error:
        return [f"the model card was not updated: {error}"]
    return []
