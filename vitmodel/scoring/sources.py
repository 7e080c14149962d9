"""Score sources as `predict` does: resume an interrupted run, and write tables, heat maps and DICOM results."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from vitmodel import __version__
from vitmodel.archives import source_state
from vitmodel.config import PredictConfig
from vitmodel.config.labels import target_name
from vitmodel.data.drift import DISTRIBUTIONS, large_drift_messages, write_distributions
from vitmodel.data.manifest import breast_ids
from vitmodel.errors import ImageRefusedError, VitmodelError
from vitmodel.jobs.journal import JOURNAL, Journal, lock_folder
from vitmodel.model.architecture import NetworkConfig
from vitmodel.model.explain import method_named
from vitmodel.releases.inputs import read_inputs
from vitmodel.results.evidence import Software
from vitmodel.results.heatmap import breast_outline
from vitmodel.results.image_results import ResultWriter, to_region
from vitmodel.results.score_files import write_score_files
from vitmodel.scoring.explanation import NO_GEOMETRY, heat_map, image_of
from vitmodel.scoring.predictor import Predictor
from vitmodel.scoring.stream import ScoredImage, ScoringRows
from vitmodel.scoring.tables import ScoreTables, fallback_messages, recropping_messages
from vitmodel.utils import NOT_A_MEDICAL_DEVICE, derive_seed, describe_failure

Entry = dict[str, Any]
"""The journal's entry of an image: its record, its logits and, with a heat map, the hottest region and the files."""


class PredictRun(NamedTuple):
    """The result of a run of `predict`."""

    tables: ScoreTables
    unexplained: dict[str, str]
    """image_id -> why the image has no heat map although one was requested."""
    scored: int
    """Number of images that this run scored; an earlier run scored the others."""


@dataclass(frozen=True, kw_only=True)
class ScoringTask:
    """What one run of `predict` works on."""

    rows: ScoringRows
    predictor: Predictor
    config: PredictConfig
    say: Callable[[str], object]
    """Called with each message of the run."""

    @cached_property
    def keys(self) -> list[str]:
        """The journal's key of each row: its path or, because a refused row may have none, its image_id."""
        table = self.rows.table
        return [path or image for path, image in zip(table["path"], table["image_id"], strict=True)]


def score_sources(predictor: Predictor, config: PredictConfig, say: Callable[[str], object] = print) -> PredictRun:
    """Score every source and write the tables and, if asked for, heat maps and DICOM results to `config.out`.

    The command line and `vitmodel.Model.predict` share this function.

    Args:
        predictor: The loaded packages.
        config: Sources, output folder and options; its package fields are those that `predictor` was made with.
        say: Called with each message of the run.

    Raises:
        UsageError: A source is invalid, an extra is not installed, or another run holds the output folder.
        VitmodelError: A file cannot be written.
    """
    with lock_folder(config.out):
        rows = predictor.attach(read_inputs(config.source, config.dataset))
        for message in recropping_messages(rows.table, predictor.ensemble.package["preprocessing"]):
            say(message)
        for message in predictor.explain_missing_looks():
            say(message)
        task = ScoringTask(rows=rows, predictor=predictor, config=config, say=say)
        entries, scored = score(task)
        logits = [np.array(entry["logits"], float) for entry in entries]
        tables = predictor.tables(rows.table, [entry["record"] for entry in entries], logits)
        drift = predictor.drift(tables.images)
        for message in fallback_messages(tables.images) + large_drift_messages(drift):
            say(message)
        with predictor.timings.record("writing"):
            write_score_files(*tables, config.out, config.parquet, config.jsonl)
            write_distributions(drift, config.out / DISTRIBUTIONS)
            if {"sr", "gsps", "cad"} & set(config.dicom):
                say(write_reports(task, tables, entries))
    unexplained = {}
    for name, entry in zip(tables.images["image_id"], entries, strict=True):
        if "unexplained" in entry:
            unexplained[str(name)] = entry["unexplained"]
    return PredictRun(tables, unexplained, scored)


def score(task: ScoringTask) -> tuple[list[Entry], int]:
    """Return the journal's entry of each row and the number of rows that this run scored.

    Entries are written to the journal one by one, so that an interrupted run can be resumed.
    """
    config = task.config
    rows = task.rows
    journal_path = config.out / JOURNAL
    if not config.resume:
        journal_path.unlink(missing_ok=True)
    journal = Journal(journal_path)
    fingerprints = row_fingerprints(task)
    todo = rows_to_score(task, journal, fingerprints)
    if len(todo) < len(rows):
        task.say(f"{len(rows) - len(todo)} of {len(rows)} images are scored already")
    writer = result_writer(task.predictor, config) if config.explain else None
    network = task.predictor.ensemble.model.config
    try:
        for position, scored in task.predictor.scores(rows.take(todo)):
            number = todo[position]
            entry: Entry = {
                "mark": fingerprints[number],
                "record": scored.loaded.cropped.record,
                "logits": logits_to_json(scored.logits),
            }
            if inputs := network_inputs(rows.table.iloc[number], network):
                entry["inputs"] = inputs
            if writer is not None and scored.loaded.pack is not None:
                entry |= explain(task, number, scored, writer)
            if {"sr", "gsps"} & set(config.dicom):
                entry |= outline_of(scored)
            journal.append(task.keys[number], entry)
    finally:
        journal.close()
    return [journal.entries[key] for key in task.keys], len(todo)


def network_inputs(row: pd.Series, config: NetworkConfig) -> dict[str, Any]:
    """Return the known values of a manifest's row that the network reads in addition to the pixels.

    A table may state others than the header of the image, and only with the same ones it can be explained later.
    """
    columns = [vocabulary.column for vocabulary in config.sources.columns] if config.sources else []
    values = {name: row.get(name) for name in columns}
    known = {name: value for name, value in values.items() if pd.notna(value) and value != ""}
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in known.items()}


def logits_to_json(logits: np.ndarray) -> list[list[float | None]]:
    """Return logits `(L, M)` of L levels and M models as lists; NaN becomes None, because JSON has no NaN."""
    return [[None if np.isnan(logit) else logit for logit in level] for level in logits.tolist()]


def rows_to_score(task: ScoringTask, journal: Journal, fingerprints: Sequence[str]) -> list[int]:
    """Return the positions of the rows without a valid result in the journal.

    A fused exam is scored again as a whole if any of its images changed, was added or was removed.
    """
    todo: list[int] = []
    for exam in task.rows.exams():
        entries = [journal.entries.get(task.keys[number], {}) for number in exam]
        marks = [fingerprints[number] for number in exam]
        done = (is_done(entry, mark, task.config.out) for entry, mark in zip(entries, marks, strict=True))
        if not all(done):
            todo += exam
    return sorted(todo)


def row_fingerprints(task: ScoringTask) -> list[str]:
    """Return for each row a text of everything that determines its result: file, metadata, packages and options."""
    ensemble = task.predictor.ensemble
    config = task.config
    dicom = ",".join(config.dicom)
    settings = f"{ensemble.fingerprint()} {config.explain} dicom={dicom} {derive_seed(config.deidentify)}"
    if not ensemble.explain_missing_typicality():
        settings += f" atypical={config.atypical} keep={config.keep_atypical}"
    marks = [
        f"{source_state(row.source_file)} {row.laterality} {settings} {row.picture_range}".rstrip()
        for row in task.rows.rows
    ]
    if ensemble.model.sources or ensemble.fused:
        for number, metadata in enumerate(task.rows.metadata):
            marks[number] += f" {metadata.sources} {metadata.view}"
    if ensemble.fused:
        for exam in task.rows.exams():
            images = sorted(task.keys[number] + marks[number] for number in exam)
            suffix = f" {derive_seed(*images):016x}"
            for number in exam:
                marks[number] += suffix
    return marks


def is_done(entry: Entry, fingerprint: str, out: Path) -> bool:
    """Return whether a journal's entry has this fingerprint and all files that it lists still exist."""
    return entry.get("mark") == fingerprint and all((out / name).exists() for name in entry.get("files", []))


def outline_of(scored: ScoredImage) -> Entry:
    """Return the outline of the breast in the source image, where its position is known."""
    cropped = scored.loaded.cropped
    if scored.loaded.pack is None or cropped.crop is None or cropped.geometry is None:
        return {}
    outline = breast_outline(cropped.crop > 0, cropped.geometry)
    return {} if outline is None else {"outline": to_region(outline)}


def explain(task: ScoringTask, number: int, scored: ScoredImage, writer: ResultWriter) -> Entry:
    """Write the heat map of row `number` and return its hottest region and files, or why there is no heat map."""
    if scored.loaded.cropped.geometry is None:
        return {"unexplained": NO_GEOMETRY}
    assert task.config.explain
    method = method_named(task.config.explain)
    unit = method.unit_for(target_name(task.predictor.ensemble.label))
    rows = task.rows
    try:
        heat = heat_map(scored.loaded, task.predictor, task.config.explain)
        with task.predictor.timings.record("writing"):
            image = image_of(rows.table.iloc[number], rows.rows[number], scored, task.predictor)
            region, files = writer.write_explanation(image, heat, unit, *method.scale)
    except ImageRefusedError as error:
        return {"unexplained": str(error)}
    except VitmodelError:
        raise
    except Exception as error:  # noqa: BLE001 (a failure must cost this image's heat map, not the run)
        return {"unexplained": describe_failure(error)}
    return {"region": region, "files": files}


def write_reports(task: ScoringTask, tables: ScoreTables, entries: list[Entry]) -> str:
    """Write the structured reports; return a message with their number and that of the images without one."""
    findings = tables.images[["laterality", "view", "probability"]].assign(
        path=[str(row.source_file) for row in task.rows.rows],
        breast_id=breast_ids(tables.images),
        outline=[entry.get("outline") for entry in entries],
        region=[entry.get("region") for entry in entries],
    )
    breasts = tables.breasts.assign(breast_id=breast_ids(tables.breasts))
    studies, without = result_writer(task.predictor, task.config).report(findings, breasts)
    message = f"reports of {studies} studies in {task.config.out / 'dicom'}"
    if without:
        message += (
            f"; {without} scored images are in none, because they have no usable DICOM header, share a study or "
            "their report failed"
        )
    return message


def result_writer(predictor: Predictor, config: PredictConfig) -> ResultWriter:
    """Return the writer of this run's results, which name the model and the version."""
    ensemble = predictor.ensemble
    architecture = ensemble.model.config.vit
    software = Software(
        version=__version__,
        model=f"ViT {architecture.depth} x {architecture.dim}, patch {architecture.patch}",
        serial=hashlib.sha256(ensemble.fingerprint().encode()).hexdigest()[:16],
        label=ensemble.label,
        parameters=(
            f"label: {ensemble.label}",
            f"packages: {len(ensemble.packages)}, flip averaging: {'yes' if ensemble.flip else 'no'}",
            f"breast: {ensemble.aggregation} of its images; threshold {ensemble.threshold:.4f}",
            f"heat map: {config.explain}",
            NOT_A_MEDICAL_DEVICE,
        ),
    )
    return ResultWriter(
        config.out, software, ensemble.preprocessing, ensemble.threshold, config.dicom, config.deidentify
    )
