"""Workers that score: each holds a loaded model and takes one job after the other."""

from __future__ import annotations

import logging
import threading
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from pydicom import dcmread
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from vitmodel import __version__
from vitmodel.config import NodeConfig, PredictConfig, PredictorConfig
from vitmodel.errors import DiskFullError, VitmodelError
from vitmodel.node.database import worst_status
from vitmodel.node.fingerprint import package_fingerprint
from vitmodel.node.jobs import POLL_SECONDS, Queue
from vitmodel.node.leases import kept_lease
from vitmodel.node.models import Instance, Job, Result
from vitmodel.scoring.predictor import Predictor
from vitmodel.scoring.sources import score_sources
from vitmodel.scoring.tables import INTERVAL, ScoreTables
from vitmodel.utils import is_full_disk, progress_bars, to_json
from vitmodel.viewer.heat_maps import HeatMapStore
from vitmodel.viewer.model_facts import ModelFacts
from vitmodel.viewer.room import Model

logger = logging.getLogger(__name__)

DATABASE_SECONDS = 5.0
"""Wait before a database that failed is used again; a new process would have to load its model again."""


def predictor_config(config: NodeConfig) -> dict[str, Any]:
    """Return the options of a `Predictor` as the node has them."""
    return {field.name: getattr(config, field.name) for field in fields(PredictorConfig)}


def load_model(config: NodeConfig) -> Model:
    """Return the model for the reading room; without a usable package, it has neither facts nor heat maps."""
    try:
        predictor = Predictor(PredictorConfig(**predictor_config(config)))
    except VitmodelError as error:
        logger.error("the reading room has no heat maps: %s", type(error).__name__)
        return Model()
    return Model(ModelFacts.of(predictor.ensemble, config.package.parent.name), HeatMapStore(predictor))


def share_cores(processes: int) -> None:
    """Let this process use its share of the cores: threads of several processes would wait for each other's."""
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))


class Scorer:
    """A worker that scores.

    Args:
        config: The node's configuration.
        queue: The queue.
        owner: Name of this worker.

    Raises:
        VitmodelError: A package cannot be loaded.
    """

    def __init__(self, config: NodeConfig, queue: Queue, owner: str) -> None:
        self.config = config
        self.queue = queue
        self.owner = owner
        self.predictor = Predictor(PredictorConfig(**predictor_config(config)))
        self.fingerprint = package_fingerprint(config)

    def work(self, stop: threading.Event) -> None:
        """Score jobs until `stop` is set. A database that cannot be written, or is away, is tried again."""
        while not stop.is_set():
            try:
                self.queue.sign_on(self.owner, "score", True)
                if not self.score_next():
                    stop.wait(POLL_SECONDS)
            except (DiskFullError, SQLAlchemyError) as error:
                logger.error("the queue cannot be used: %s", type(error).__name__)
                stop.wait(DATABASE_SECONDS)

    def score_next(self) -> bool:
        """Score the next job; return whether there was one."""
        job = self.queue.claim("score", self.owner)
        if job is None:
            return False
        with kept_lease(self.queue, job, self.owner):
            try:
                self._score(job)
            except VitmodelError as error:
                logger.error("job %d failed: %s", job.id, type(error).__name__)
                self._fail(job, error, str(error))
            except Exception as error:  # noqa: BLE001 (the message could hold values of a header)
                logger.error("job %d failed: %s", job.id, type(error).__name__)
                self._fail(job, error, type(error).__name__)
        return True

    def _fail(self, job: Job, error: Exception, message: str) -> None:
        """End a failed attempt; that the disk is full is no fault of the job."""
        if is_full_disk(error):
            self.queue.fail(job.id, self.owner, "disk: no space is left for results", "disk_full", counts=False)
        else:
            self.queue.fail(job.id, self.owner, message, type(error).__name__)

    def _score(self, job: Job) -> None:
        """Score a job's images as `predict` does, and store what came out."""
        with self.queue.database.read() as session:
            query = select(Instance.path).where(Instance.sop_uid.in_(job.images.split())).order_by(Instance.sop_uid)
            sources = tuple(str(self.config.folder / path) for path in session.scalars(query))
        out = self.config.folder / "jobs" / str(job.id)
        settings = PredictConfig(
            **predictor_config(self.config),
            source=sources,
            out=out,
            resume=True,
            explain=self.config.explain,
            dicom=self.config.dicom,
        )
        with progress_bars(False):
            run = score_sources(self.predictor, settings, logger.debug)
        scored = run.tables.breasts["probability"].notna()
        best = float(run.tables.breasts["probability"].max()) if scored.any() else None
        results = self._results(job, out) if scored.any() else []
        next_stage = "send" if self.config.destination else "kept"
        self.queue.finish(
            job.id,
            self.owner,
            next_stage if scored.any() else "unscored",
            results,
            fingerprint=self.fingerprint,
            software=__version__,
            threshold=float(self.predictor.ensemble.threshold),
            probability=best,
            suspicious=None if best is None else bool((run.tables.breasts["decision"] == 1).any()),
            **summarize_tables(run.tables),
            scored_at=self.queue.clock(),
        )

    def _results(self, job: Job, out: Path) -> list[Result]:
        """Return a row for each DICOM result in the job's folder."""
        rows = []
        for path in sorted((out / "dicom").glob("*.dcm")):
            header = dcmread(path, stop_before_pixels=True, specific_tags=["SOPClassUID", "SOPInstanceUID"])
            rows.append(
                Result(
                    job_id=job.id,
                    sop_uid=str(header.SOPInstanceUID),
                    sop_class=str(header.SOPClassUID),
                    path=str(path.relative_to(self.config.folder)),
                    state="pending",
                    updated_at=self.queue.clock(),
                )
            )
        return rows


def summarize_tables(tables: ScoreTables) -> dict[str, str]:
    """Return the columns of a job that the worklist shows and filters: scores as JSON, status and machines."""
    images = tables.images[["image_id", "laterality", "view", "probability", "status", "reason", "machine_id"]]
    columns = ["laterality", "probability", "decision", "n_images", "views", "status", "reason", *INTERVAL]
    breasts = tables.breasts[[name for name in columns if name in tables.breasts]]  # older packages have no interval
    scores = {"images": images.to_dict("records"), "breasts": breasts.to_dict("records")}
    machines = ";".join(name for name in images["machine_id"].dropna().unique() if name)
    return {"scores": to_json(scores), "status": worst_status(scores), "machines": machines}
