"""The command `view`: show the results of `predict` or `evaluate` in a browser."""

from __future__ import annotations

import socket
import sys
from typing import TYPE_CHECKING

from vitmodel import __version__
from vitmodel.config import PredictorConfig, ViewConfig
from vitmodel.data.tables import write_csv
from vitmodel.errors import UsageError
from vitmodel.utils import NOT_A_MEDICAL_DEVICE, import_extra
from vitmodel.viewer.evaluated import EvaluatedScores, make_evaluation_router, read_evaluation
from vitmodel.viewer.exams import Exam
from vitmodel.viewer.heat_maps import HeatMapStore
from vitmodel.viewer.model_facts import ModelFacts
from vitmodel.viewer.pages import make_router, make_static_router
from vitmodel.viewer.reading_tables import label_table, study_table
from vitmodel.viewer.readings import READINGS, ReadingStore, check_name
from vitmodel.viewer.room import Model, ReadingMode, ReadingRoom, Results
from vitmodel.viewer.scores_folder import METRICS, read_scores_folder
from vitmodel.viewer.worklist import Worklist
from vitmodel.web.security import AccessPolicy, Guard

if TYPE_CHECKING:
    from fastapi import FastAPI


def view(config: ViewConfig) -> None:
    """Show the results until interrupted, or write the readings as CSV.

    Raises:
        UsageError: The folder has no results, the extra `serve` is not installed, or the port is in use.
    """
    if config.exports:
        export(config)
        return
    uvicorn = import_extra("uvicorn", "serve", "view")
    app = create_app(config)
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listening = socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise UsageError(
            f"port: cannot listen on {config.host}:{config.port}: {error.strerror}; choose another port with --port"
        ) from error
    print(
        f"open http://localhost:{listening.getsockname()[1]}; press Ctrl-C to stop\n{NOT_A_MEDICAL_DEVICE}", flush=True
    )
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


def create_app(config: ViewConfig) -> FastAPI:
    """Return the web application that shows the results.

    Raises:
        UsageError: A folder has no results or shares no exam with the compared one, or the extra `serve` is missing.
        VitmodelError: A package cannot be loaded.
    """
    import_extra("fastapi", "serve", "view")
    from fastapi import FastAPI

    exams = read_scores_folder(config.scores)
    evaluation = _read_evaluation(config, exams)
    store = _store(config)
    others = _read_others(config, exams)
    results = Results(
        title=config.scores.name,
        scored=(config.scores / "breast_scores.csv").stat().st_mtime,
        others=others,
        other_title=config.compare.name if config.compare else "",
        truth=evaluation.truth if evaluation else {},
    )
    mode = ReadingMode(store, check_name(config.reader) if config.reader else "", config.blind)
    model = _load_model(config)
    read = ((reading.exam, reading.reader) for reading in store.all())
    source = Worklist(exams, {exam.ids: exam for exam in others}, read)
    room = ReadingRoom(source, results, mode, lambda: model)
    app = FastAPI(title="vitmodel", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, policy=AccessPolicy())
    app.include_router(make_router(lambda _: room))
    app.include_router(make_static_router())
    if evaluation:
        app.include_router(make_evaluation_router(room, evaluation))
    return app


def export(config: ViewConfig) -> None:
    """Write the readings as CSV.

    Raises:
        UsageError: There is no reading of an exam in the folder.
    """
    exams = read_scores_folder(config.scores)
    store = _store(config)
    readings = store.all(config.reader)
    tables = []
    if config.export:
        tables.append((config.export, label_table(exams, readings)))
    if config.export_study:
        evaluation = _read_evaluation(config, exams)
        tables.append((config.export_study, study_table(exams, readings, evaluation.truth if evaluation else {})))
    if any(table.empty for _, table in tables):
        raise UsageError(f"{store.path}: has no reading of an exam in {config.scores}; store one in the browser first")
    for path, table in tables:
        write_csv(table, path)
        print(f"{len(table)} rows in {path}")


def _store(config: ViewConfig) -> ReadingStore:
    return ReadingStore(config.readings or config.scores / READINGS)


def _read_evaluation(config: ViewConfig, exams: list[Exam]) -> EvaluatedScores | None:
    """Return the labelled breasts of an evaluation; None if the folder is of `predict`, or its manifest is gone."""
    if not (config.scores / METRICS).exists():
        return None
    try:
        return read_evaluation(config.scores, exams)
    except UsageError as error:
        print(f"there is no evaluation page: {error}", file=sys.stderr)
        return None


def _read_others(config: ViewConfig, exams: list[Exam]) -> list[Exam]:
    """Return the exams of the compared folder."""
    if config.compare is None:
        return []
    others = read_scores_folder(config.compare)
    if not {exam.ids for exam in exams} & {exam.ids for exam in others}:
        raise UsageError(f"compare: {config.compare} has no exam of {config.scores}; predict the same images with both")
    return others


def _load_model(config: ViewConfig) -> Model:
    if not config.package:
        return Model()
    from vitmodel.scoring.predictor import Predictor

    first, *others = config.package
    # An image that was scored is explained, also if `predict` kept what it refuses by default.
    predictor = Predictor(PredictorConfig(package=first, ensemble=tuple(others), atypical=0, implausible="warn"))
    return Model(ModelFacts.of(predictor.ensemble, first.parent.name), HeatMapStore(predictor))
