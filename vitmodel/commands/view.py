"""The command `view`: show the results of `predict` in a browser."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from vitmodel import __version__
from vitmodel.config import PredictorConfig, ViewConfig
from vitmodel.errors import UsageError
from vitmodel.utils import NOT_A_MEDICAL_DEVICE, import_extra
from vitmodel.viewer.heat_maps import HeatMapStore
from vitmodel.viewer.pages import ModelFacts, ReadingRoom, make_router
from vitmodel.viewer.scores_folder import read_scores_folder
from vitmodel.web.security import AccessPolicy, Guard

if TYPE_CHECKING:
    from fastapi import FastAPI


def view(config: ViewConfig) -> None:
    """Show the results until interrupted.

    Raises:
        UsageError: The folder has no results, the extra `serve` is not installed, or the port is in use.
    """
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
        UsageError: The folder has no results, or the extra `serve` is not installed.
        VitmodelError: A package cannot be loaded.
    """
    import_extra("fastapi", "serve", "view")
    from fastapi import FastAPI

    exams = read_scores_folder(config.scores)
    model, heat_maps = ModelFacts(), None
    if config.package:
        from vitmodel.scoring.predictor import Predictor

        first, *others = config.package
        predictor = Predictor(PredictorConfig(package=first, ensemble=tuple(others)))
        ensemble = predictor.ensemble
        model = ModelFacts(first.parent.name, ensemble.fingerprint()[:8], ensemble.threshold, ensemble.label)
        heat_maps = HeatMapStore(predictor)
    app = FastAPI(title="vitmodel", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, policy=AccessPolicy())
    app.include_router(make_router(ReadingRoom(exams, config.scores.name, model, heat_maps)))
    return app
