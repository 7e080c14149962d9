"""The command `tune`: search for the best recipe with a resumable study, and report which settings mattered.

Trials are compared on validation patients; test patients are not used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd

from vitmodel.config import Preprocessing, TrainConfig, TuneConfig, to_yaml
from vitmodel.config.choices import LOSSES
from vitmodel.data.fingerprint import fingerprint
from vitmodel.data.labels import without_label
from vitmodel.data.manifest import write_manifest
from vitmodel.errors import DivergedError, VitmodelError
from vitmodel.jobs.journal import lock_folder
from vitmodel.training.crops import check_sizes, common_preprocessing, labelled_crops
from vitmodel.training.fit import MONITOR_METRICS, train_and_validate
from vitmodel.training.initial_network import make_network_config, settle_network
from vitmodel.training.trainer import STARTED, start_or_resume
from vitmodel.utils import atomic_path, derive_seed, import_extra, is_full_disk, write_atomic

WARM_UP_TRIALS = 5
"""Number of first trials that are never stopped early, because later ones are compared with them."""


def tune(config: TuneConfig) -> None:
    """Write RUN/study.db (SQLite), trials.csv, report.md, and best.yaml for `vitmodel train --config`.

    Raises:
        UsageError: The extra `tune` is not installed, the manifest cannot be used, or RUN holds another search.
        VitmodelError: The disk is full.
    """
    optuna = import_optuna()
    frame = labelled_crops(config)
    preprocessing = common_preprocessing(frame, config.manifest)
    config, _ = settle_network(config, preprocessing)
    check_sizes(frame, config)
    data = fingerprint(frame, config.label)["sha256"]
    with lock_folder(config.run, STARTED), sentence_for_full_disk(config.run):
        start_or_resume(
            "tune", replace(config, trials=1), config.run, data
        )  # not the number of trials: a resumed search may ask for more
        write_manifest(without_label(frame, config.label), config.run / "manifest.csv")
        study = optuna.create_study(
            storage=f"sqlite:///{(config.run / 'study.db').absolute()}",
            study_name="vitmodel",
            direction="maximize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=WARM_UP_TRIALS),
        )
        requeue(study)
        while (done := len(finished_trials(study))) < config.trials:
            # one seed per trial; with one seed for all, a resumed search would repeat its first trials
            study.sampler = optuna.samplers.TPESampler(seed=derive_seed("trial", config.seed, done) % 2**32)
            study.optimize(lambda trial: objective(trial, config, frame, preprocessing, data), n_trials=1)
            write_report(study, config)
        write_report(study, config)


@contextlib.contextmanager
def sentence_for_full_disk(run: Path) -> Iterator[None]:
    """Replace the errors that SQLite, SQLAlchemy, optuna and the loggers raise on a full disk by one sentence.

    Raises:
        VitmodelError: The disk is full.
    """
    try:
        yield
    except VitmodelError:
        raise
    except Exception as error:
        if not is_full_disk(error):
            raise
        raise VitmodelError(
            f"cannot write to {run}: no space left on device; free some space, then continue with --resume"
        ) from error


def import_optuna() -> Any:
    """Return optuna with its log limited to warnings. Raises UsageError if it is not installed."""
    optuna = import_extra("optuna", "tune", "tune")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def requeue(study: Any) -> None:
    """Mark trials that were running when the search was killed as failed, and queue their settings first."""
    optuna = import_optuna()
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(trial.params)


def finished_trials(study: Any) -> list[Any]:
    """Return the trials that were completed or pruned."""
    states = import_optuna().trial.TrialState
    return study.get_trials(states=[states.COMPLETE, states.PRUNED])


def suggest(trial: Any, config: TuneConfig) -> TrainConfig:
    """Return the recipe of a trial: settings searched around those of `config`, and all others as in `config`."""
    shared = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    changes = {
        "lr": trial.suggest_float("lr", config.lr / 10, config.lr * 10, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 0.01, 0.3, log=True),
        "layer_decay": trial.suggest_categorical("layer_decay", [0.65, 0.75, 1.0]),
        "drop_path": trial.suggest_float("drop_path", 0.0, 0.3),
        "smoothing": trial.suggest_float("smoothing", 0.0, 0.2),
        "loss": trial.suggest_categorical("loss", list(LOSSES)),
        "ema": trial.suggest_categorical("ema", [0.0, 0.99, 0.999]),
    }
    recipe = TrainConfig(**shared | changes)
    return replace(recipe, augment=replace(recipe.augment, elastic=trial.suggest_float("augment.elastic", 0.0, 0.1)))


def objective(trial: Any, config: TuneConfig, frame: pd.DataFrame, preprocessing: Preprocessing, data: str) -> float:
    """Train with the settings of a trial and return the best value of the monitored metric.

    Raises:
        optuna.TrialPruned: The training diverged or was stopped early.
    """
    recipe = suggest(trial, config)
    run = config.run / "trials" / f"{trial.number:04d}"
    start_or_resume("train", replace(recipe, run=run), run, data)
    rows = {name: frame[frame["split"] == name] for name in ("train", "val")}
    network = make_network_config(recipe, preprocessing, [rows["train"]])
    pruning = PruningCallback(trial, MONITOR_METRICS[config.monitor])
    try:
        fitted = train_and_validate(recipe, run, rows["train"], rows["val"], network, None, [pruning])
    except DivergedError as error:
        print(f"trial {trial.number}: {error}")
        raise import_optuna().TrialPruned from error
    assert fitted is not None, "a search runs in one process"
    return max(value for _, value in fitted.history[pruning.metric])


class PruningCallback(L.Callback):
    """Report a metric to the study after each validation, and end the trial if the study prunes it."""

    def __init__(self, trial: Any, metric: str) -> None:
        self.trial = trial
        self.metric = metric

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        value = trainer.callback_metrics.get(self.metric)
        if value is not None and np.isfinite(float(value)):
            self.trial.report(float(value), trainer.current_epoch)
            if self.trial.should_prune():
                raise import_optuna().TrialPruned


def write_report(study: Any, config: TuneConfig) -> None:
    """Write trials.csv, report.md and best.yaml.

    report.md lists the best settings and the importance of each: the share of the variance that it explains.
    """
    optuna = import_optuna()
    with atomic_path(config.run / "trials.csv") as temporary:
        study.trials_dataframe(attrs=("number", "value", "state", "params", "duration")).to_csv(temporary, index=False)
    complete = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    if not complete:
        return
    try:
        importances = optuna.importance.get_param_importances(study)
    except (RuntimeError, ValueError):  # too few trials, or all with the same value
        importances = {}
    finished = finished_trials(study)
    best = study.best_trial
    rows = []
    for name, value in best.params.items():
        text = f"{value:.3g}" if isinstance(value, float) else value
        rows.append(f"| {name} | {text} | {importances.get(name, float('nan')):.3f} |")
    table = "\n".join(rows)
    report = f"""# Search of {len(finished)} trials, {len(complete)} of them completed

Best validation {config.monitor}: {best.value:.4f} (trial {best.number}). This value is optimistic, because
the trial was chosen by it. Measure the recipe on other patients.

| setting | best | importance |
|---|---|---|
{table}
"""
    write_atomic(config.run / "report.md", report)
    recipe = replace(suggest(optuna.trial.FixedTrial(best.params), config), run=config.run / "best")
    write_atomic(config.run / "best.yaml", to_yaml("train", recipe, config.run / "best.yaml"))
    print(f"trial {finished[-1].number}: best {config.monitor} of {len(finished)} trials is {best.value:.4f}")
