"""Stage: model package + images -> a score per image, breast and patient, heat maps, DICOM results. Knows no label and no network."""

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from vitmodel import __version__
from vitmodel.config import PredictConfig
from vitmodel.data.manifest import breast_ids
from vitmodel.data.rows import ManifestRow
from vitmodel.errors import ImageRefusedError, VitmodelError
from vitmodel.jobs.journal import JOURNAL, Journal, file_state, lock_folder
from vitmodel.model.explain import method_named
from vitmodel.releases.inputs import read_inputs
from vitmodel.results.evidence import Software
from vitmodel.results.image_results import ResultWriter
from vitmodel.results.score_files import write_score_files
from vitmodel.scoring.explanation import NO_GEOMETRY, heat_map, image_of
from vitmodel.scoring.predictor import Predictor
from vitmodel.scoring.stream import ScoredImage, ScoringRows
from vitmodel.scoring.tables import ScoreTables, fallback_messages, recropping_messages
from vitmodel.utils import NOT_A_MEDICAL_DEVICE, derive_seed

MAX_REFUSALS_SHOWN = 20  # refused images named on the screen

Entry = dict[str, Any]


class PredictRun(NamedTuple):
    """What a run of `predict` gave."""

    tables: ScoreTables
    unexplained: dict[str, str]
    """By image_id, why an image has no heat map although one was asked for."""
    scored: int
    """Number of images that this run scored; an earlier run scored the others."""


def predict(config: PredictConfig) -> int:
    """Score every source and print a summary; return 1 if an image was refused or lacks its heat map."""
    start = time.perf_counter()
    predictor = Predictor(config)
    run = score_sources(predictor, config)
    seconds = time.perf_counter() - start
    per_image = (
        f"{1e3 * seconds / max(1, run.scored):.0f} ms per image, of it {predictor.timings.per_image(run.scored)}"
    )
    print(f"{seconds:.1f} s, {per_image}")
    for name, message in list(run.unexplained.items())[:MAX_REFUSALS_SHOWN]:
        print(f"no heat map of image {name}: {message}", file=sys.stderr)
    return summarise(run.tables.images, run.tables.breasts, config) or int(bool(run.unexplained))


def score_sources(predictor: Predictor, config: PredictConfig, say: Callable[[str], object] = print) -> PredictRun:
    """Score every source and write the tables and, if asked for, heat maps and DICOM results to `config.out`.

    The command line and `vitmodel.Model.predict` share this function.

    Args:
        predictor: The loaded packages.
        config: Sources, output folder and options; its package fields are those that `predictor` was made with.
        say: Called with each message of the run.
    """
    with lock_folder(config.out):
        unpacked = config.out / ".unpacked"
        rows = predictor.attach(read_inputs(config.source, config.dataset, unpacked))
        for message in recropping_messages(rows.table, predictor.ensemble.package["preprocessing"]):
            say(message)
        entries, done = score(rows, predictor, config, say)
        logits = [np.array(entry["logits"], float) for entry in entries]
        tables = predictor.tables(rows.table, [entry["record"] for entry in entries], logits)
        for message in fallback_messages(tables.images):
            say(message)
        with predictor.timings.record("writing"):
            write_score_files(*tables, config.out, config.parquet, config.jsonl)
            if config.dicom:
                say(report(rows, tables, entries, predictor, config))
        shutil.rmtree(unpacked, ignore_errors=True)
    names = tables.images["image_id"]
    unexplained = {
        str(name): entry["unexplained"] for name, entry in zip(names, entries, strict=True) if "unexplained" in entry
    }
    return PredictRun(tables, unexplained, done)


def score(
    rows: ScoringRows, predictor: Predictor, config: PredictConfig, say: Callable[[str], object]
) -> tuple[list[Entry], int]:
    """Return an entry per row and how many rows this run has scored.

    An entry holds the row's record, its logits and, with a heat map, the hottest region. Entries are written to the
    journal one by one, so that an interrupted run can be resumed.
    """
    journal_path = config.out / JOURNAL
    if not config.resume:
        journal_path.unlink(missing_ok=True)
    journal = Journal(journal_path)
    table = rows.table
    keys = [
        path or image for path, image in zip(table["path"], table["image_id"], strict=True)
    ]  # a refused row may have no path
    marks = marks_of(rows, keys, predictor, config)
    todo = []
    for unit in rows.exams():  # an exam is fused anew if any of its images changed, came or went
        if not all(is_done(journal.entries.get(keys[n], {}), marks[n], config.out) for n in unit):
            todo += unit
    todo.sort()
    if len(todo) < len(rows):
        say(f"{len(rows) - len(todo)} of {len(rows)} images are scored already")
    writer = result_writer(predictor, config) if config.explain else None
    try:
        for position, scored in predictor.scores(rows.take(todo)):
            number = todo[position]
            entry: Entry = {
                "mark": marks[number],
                "record": scored.loaded.cropped.record,
                "logits": [[None if np.isnan(logit) else logit for logit in level] for level in scored.logits.tolist()],
            }
            if writer is not None and config.explain and scored.loaded.pack is not None:
                entry |= explain(table.iloc[number], rows.rows[number], scored, predictor, writer, config.explain)
            journal.append(keys[number], entry)
    finally:
        journal.close()
    return [journal.entries[key] for key in keys], len(todo)


def marks_of(rows: ScoringRows, keys: Sequence[str], predictor: Predictor, config: PredictConfig) -> list[str]:
    """Return for each row a text of all that determines its result: file, metadata, packages and options."""
    ensemble = predictor.ensemble
    settings = f"{ensemble.fingerprint()} {config.explain} dicom={config.dicom} {derive_seed(config.deidentify)}"
    marks = [f"{file_state(row.source_file)} {row.laterality} {settings}" for row in rows.rows]
    if ensemble.model.sources or ensemble.fused:
        marks = [
            f"{mark} {metadata.sources} {metadata.view}" for mark, metadata in zip(marks, rows.metadata, strict=True)
        ]
    if ensemble.fused:
        for unit in rows.exams():
            exam = f" {derive_seed(*sorted(keys[n] + marks[n] for n in unit)):016x}"
            for n in unit:
                marks[n] += exam
    return marks


def is_done(entry: Entry, mark: str, out: Path) -> bool:
    """Whether a journal's entry is of this very image and question, and what was drawn of it is still there."""
    return entry.get("mark") == mark and all((out / name).exists() for name in entry.get("files", []))


def explain(
    place: pd.Series, row: ManifestRow, scored: ScoredImage, predictor: Predictor, writer: ResultWriter, method: str
) -> Entry:
    """Write the heat map of an image and return its hottest region for the structured report."""
    if scored.loaded.cropped.geometry is None:
        return {"unexplained": NO_GEOMETRY}
    heat = heat_map(scored.loaded, predictor, method)
    with predictor.timings.record("writing"):
        try:
            chosen = method_named(method)
            region, files = writer.write_explanation(
                image_of(place, row, scored, predictor), heat, chosen.unit, *chosen.scale
            )
            return {"region": region, "files": files}
        except ImageRefusedError as error:
            return {"unexplained": str(error)}
        except VitmodelError:
            raise
        except Exception as error:  # noqa: BLE001 (a header that no result can be made of costs the result, not the run)
            return {"unexplained": f"{type(error).__name__}: {error}"}


def report(
    rows: ScoringRows, tables: ScoreTables, entries: list[Entry], predictor: Predictor, config: PredictConfig
) -> str:
    """Write the structured reports; return a message that counts them and the images that could have none."""
    findings = tables.images[["laterality", "probability"]].assign(
        path=[str(row.source_file) for row in rows.rows],
        prediction_id=breast_ids(tables.images),
        region=[entry.get("region") for entry in entries],
    )
    studies, without = result_writer(predictor, config).report(findings, tables.breasts)
    return f"{studies} structured reports in {config.out / 'dicom'}" + (
        f"; {without} scored images can have none" if without else ""
    )


def result_writer(predictor: Predictor, config: PredictConfig) -> ResultWriter:
    """Return the writer of this run's results, which name the model and the version."""
    ensemble = predictor.ensemble
    architecture = ensemble.model.config.vit
    software = Software(
        version=__version__,
        model=f"ViT {architecture.depth} x {architecture.dim}, patch {architecture.patch}",
        serial=ensemble.fingerprint()[:16],
        parameters=(
            f"packages: {len(ensemble.packages)}, flip averaging: {'yes' if ensemble.flip else 'no'}",
            f"breast: {ensemble.aggregation} of its images; threshold {ensemble.threshold:.4f}",
            f"heat map: {config.explain}",
            NOT_A_MEDICAL_DEVICE,
        ),
    )
    return ResultWriter(
        config.out, software, ensemble.preprocessing, ensemble.threshold, config.dicom, config.deidentify
    )


def summarise(images: pd.DataFrame, breasts: pd.DataFrame, config: PredictConfig) -> int:
    """Say what was refused or is in doubt and what Kaggle would not take; the exit status."""
    refused = images[images["status"] == "refused"]
    for row in refused.head(MAX_REFUSALS_SHOWN).itertuples():
        print(f"refused: image {row.image_id}: {row.reason}: {row.remark}", file=sys.stderr)
    if len(refused) > MAX_REFUSALS_SHOWN:
        print(f"refused: {len(refused) - MAX_REFUSALS_SHOWN} more images, see scores.csv", file=sys.stderr)
    doubts = breasts.loc[breasts["status"] == "warned", "reason"].str.split(";").explode().value_counts()
    if len(doubts):
        counts = ", ".join(f"{code} {count}" for code, count in doubts.items())
        print(f"breasts whose score is in doubt, by reason: {counts}; see breast_scores.csv")
    empty = int(breasts["probability"].isna().sum())
    if empty:
        print(
            f"{empty} breasts without a usable image have an empty cell in submission.csv, which Kaggle does not take",
            file=sys.stderr,
        )
    print(
        f"{len(images)} images, {len(refused)} refused, {len(breasts) - empty} breasts scored in {config.out / 'breast_scores.csv'}"
    )
    if len(refused) == len(images):
        print("no input could be scored", file=sys.stderr)
    print(NOT_A_MEDICAL_DEVICE)
    return 1 if len(refused) else 0
