"""Stage: model package + images -> a score per image, breast and patient, heat maps, DICOM results. Knows no label and no network."""

if __name__ == "__main__":  # run as a file: the command line runs this stage under its own name, with the checkout on the path
    import sys

    sys.path[0] = __file__.rsplit("/", 2)[0]
    from vitmodel.cli import main

    sys.exit(main(["predict", *sys.argv[1:]]))

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vitmodel import __version__
from vitmodel.config import PredictConfig
from vitmodel.data.inputs import read_inputs
from vitmodel.data.journal import Journal, exclusive, state
from vitmodel.data.manifest import breast_ids
from vitmodel.data.rows import Row, rows_of
from vitmodel.data.source import file_name
from vitmodel.exams import about_images
from vitmodel.model.explain import method_named
from vitmodel.model.packs import grouped
from vitmodel.predictor import Predictor, Scored
from vitmodel.results.evidence import Software
from vitmodel.results.heatmap import HeatMap
from vitmodel.results.image_results import Image, ResultWriter
from vitmodel.results.tables import write_scores
from vitmodel.scores import say_fallbacks, say_recropped
from vitmodel.utils import NOT_A_MEDICAL_DEVICE, VitmodelError, seed_from

SHOWN = 20  # refused images named on the screen

Entry = dict[str, Any]


def predict(config: PredictConfig) -> int:
    """Score every input, one row each whatever happens; 1 where any was refused or has no heat map that was asked for."""
    start = time.perf_counter()
    predictor = Predictor(config)
    with exclusive(config.out):
        unpacked = config.out / ".unpacked"
        table = read_inputs(config.source, config.dataset, unpacked)
        say_recropped(table, predictor.package["preprocessing"])
        entries, done = score(table, predictor, config)
        images = predictor.tabulate(table, [entry["record"] for entry in entries], [np.array(entry["logits"], float) for entry in entries])
        say_fallbacks(images)
        breasts = predictor.score_breasts(images)
        with predictor.timings.of("writing"):
            write_scores(images, breasts, predictor.score_patients(breasts), config.out, config.parquet, config.jsonl)
            if config.dicom:
                report(table, images, breasts, entries, predictor, config)
        shutil.rmtree(unpacked, ignore_errors=True)
    seconds = time.perf_counter() - start
    print(f"{seconds:.1f} s, {1e3 * seconds / max(1, done):.0f} ms per image, of it {predictor.timings.per_image(done)}")
    failures = {str(name): entry["unexplained"] for name, entry in zip(images["image_id"], entries, strict=True) if "unexplained" in entry}
    for name, sentence in list(failures.items())[:SHOWN]:
        print(f"no heat map of image {name}: {sentence}", file=sys.stderr)
    return summarise(images, breasts, config) or int(bool(failures))


def score(table: pd.DataFrame, predictor: Predictor, config: PredictConfig) -> tuple[list[Entry], int]:
    """What became of each row: its record, its logits and, with a heat map, the hottest region; and how many rows are of this run.

    Each is in the journal as soon as it is known, so that a killed run resumes.
    """
    journal_path = config.out / "journal.jsonl"
    if not config.resume:
        journal_path.unlink(missing_ok=True)
    journal = Journal(journal_path)
    rows = rows_of(table)
    settings = f"{predictor.fingerprint()} {config.explain} dicom={config.dicom} {seed_from(config.deidentify)}"
    known = about_images(table, predictor.model.config)
    marks = [f"{state(row.source)} {row.laterality} {settings}" for row in rows]
    if predictor.model.sources or predictor.fused:
        marks = [f"{mark} {about.sources} {about.view}" for mark, about in zip(marks, known, strict=True)]
    keys = [path or image for path, image in zip(table["path"], table["image_id"], strict=True)]  # a refused row may have no path
    todo = []
    for unit in grouped(about.exam for about in known):  # an exam is fused anew if any of its images changed, came or went
        exam = f" {seed_from(*sorted(keys[n] + marks[n] for n in unit)):016x}" if predictor.fused else ""
        for n in unit:
            marks[n] += exam
        if not all(is_done(journal.entries.get(keys[n], {}), marks[n], config.out) for n in unit):
            todo += unit
    todo.sort()
    if len(todo) < len(rows):
        print(f"{len(rows) - len(todo)} of {len(rows)} images are scored already")
    writer = result_writer(predictor, config) if config.explain else None
    try:
        for place, scored in predictor.stream(table.iloc[todo]):
            number = todo[place]
            entry: Entry = {
                "mark": marks[number],
                "record": scored.loaded.cropped.record,
                "logits": [[None if np.isnan(logit) else logit for logit in level] for level in scored.logits.tolist()],
            }
            if writer is not None and config.explain and scored.loaded.pack is not None:
                entry |= explain(table.iloc[number], rows[number], scored, predictor, writer, config.explain)
            journal.append(keys[number], entry)
    finally:
        journal.close()
    return [journal.entries[key] for key in keys], len(todo)


def is_done(entry: Entry, mark: str, out: Path) -> bool:
    """Whether a journal's entry is of this very image and question, and what was drawn of it is still there."""
    return entry.get("mark") == mark and all((out / name).exists() for name in entry.get("files", []))


def explain(place: pd.Series, row: Row, scored: Scored, predictor: Predictor, writer: ResultWriter, method: str) -> Entry:
    """Draw what the score rests on; the region that goes into the report."""
    cropped = scored.loaded.cropped
    known: dict[str, Any] = cropped.record
    assert cropped.crop is not None
    if cropped.geometry is None:
        return {"unexplained": "the manifest does not say where the crop lies in its source"}
    heat = HeatMap(
        values=predictor.explain(scored.loaded, method),
        tissue=cropped.crop > 0,
        geometry=cropped.geometry,
        patch=predictor.model.config.vit.patch,
        source=(int(known["source_height"]), int(known["source_width"])),
    )
    image = Image(
        name=file_name(place.image_id),
        path=row.source,
        side=place.laterality,
        view=place.view,
        probability=predictor.probability(scored.logits[:1])[0],
        inverted="inverted" in (known["reason"] or ""),
    )
    with predictor.timings.of("writing"):
        try:
            chosen = method_named(method)
            region, files = writer.explain(image, heat, chosen.unit, *chosen.scale)
            return {"region": region, "files": files}
        except VitmodelError:
            raise
        except Exception as error:  # noqa: BLE001 (a header that no result can be made of costs the result, not the run)
            return {"unexplained": f"{type(error).__name__}: {error}"}


def report(
    table: pd.DataFrame, images: pd.DataFrame, breasts: pd.DataFrame, entries: list[Entry], predictor: Predictor, config: PredictConfig
) -> None:
    """The structured reports, and how many images could have none."""
    rows = images[["laterality", "probability"]].assign(
        path=[str(row.source) for row in rows_of(table)],
        prediction_id=breast_ids(images),
        region=[entry.get("region") for entry in entries],
    )
    studies, without = result_writer(predictor, config).report(rows, breasts)
    print(f"{studies} structured reports in {config.out / 'dicom'}" + (f"; {without} scored images can have none" if without else ""))


def result_writer(predictor: Predictor, config: PredictConfig) -> ResultWriter:
    """The writer of this run's results, which name model and version."""
    architecture = predictor.model.config.vit
    software = Software(
        version=__version__,
        model=f"ViT {architecture.depth} x {architecture.dim}, patch {architecture.patch}",
        serial=predictor.fingerprint()[:16],
        parameters=(
            f"packages: {len(predictor.members)}, flip averaging: {'yes' if predictor.flip else 'no'}",
            f"breast: {predictor.aggregation} of its images; threshold {predictor.threshold:.4f}",
            f"heat map: {config.explain}",
            NOT_A_MEDICAL_DEVICE,
        ),
    )
    return ResultWriter(config.out, software, predictor.preprocessing, predictor.threshold, config.dicom, config.deidentify)


def summarise(images: pd.DataFrame, breasts: pd.DataFrame, config: PredictConfig) -> int:
    """Say what was refused or is in doubt and what Kaggle would not take; the exit status."""
    refused = images[images["status"] == "refused"]
    for row in refused.head(SHOWN).itertuples():
        print(f"refused: image {row.image_id}: {row.reason}: {row.remark}", file=sys.stderr)
    if len(refused) > SHOWN:
        print(f"refused: {len(refused) - SHOWN} more images, see scores.csv", file=sys.stderr)
    doubts = breasts.loc[breasts["status"] == "warned", "reason"].str.split(";").explode().value_counts()
    if len(doubts):
        counts = ", ".join(f"{code} {count}" for code, count in doubts.items())
        print(f"breasts whose score is in doubt, by reason: {counts}; see breast_scores.csv")
    empty = int(breasts["probability"].isna().sum())
    if empty:
        print(f"{empty} breasts without a usable image have an empty cell in submission.csv, which Kaggle does not take", file=sys.stderr)
    print(f"{len(images)} images, {len(refused)} refused, {len(breasts) - empty} breasts scored in {config.out / 'breast_scores.csv'}")
    if len(refused) == len(images):
        print("no input could be scored", file=sys.stderr)
    print(NOT_A_MEDICAL_DEVICE)
    return 1 if len(refused) else 0
