"""Stage: manifest -> a search over recipes with a study that can go on, and a report of what mattered. Knows no test patient."""

from dataclasses import fields, replace
from typing import Any

import lightning as L
import numpy as np
import pandas as pd

from vitmodel.config import Preprocessing, TrainConfig, TuneConfig, to_yaml
from vitmodel.config.choices import LOSSES
from vitmodel.data.fingerprint import fingerprint
from vitmodel.data.manifest import write_manifest
from vitmodel.errors import DivergedError, UsageError
from vitmodel.jobs.journal import lock_folder
from vitmodel.training.fit import (
    LABEL,
    MONITOR_METRICS,
    check_sizes,
    common_preprocessing,
    labelled_crops,
    make_network_config,
    train_and_validate,
)
from vitmodel.training.trainer import STARTED, start_or_resume
from vitmodel.utils import atomic_path, derive_seed, write_atomic

WARM_UP_TRIALS = 5  # trainings that are never stopped early, for the later ones to be compared with


def tune(config: TuneConfig) -> None:
    """Write RUN/study.db (SQLite), trials.csv, report.md and best.yaml, which `vitmodel train --config` takes. Raises UsageError."""
    optuna = import_optuna()
    frame = labelled_crops(config)
    preprocessing = common_preprocessing(frame, config.manifest)
    check_sizes(frame, config)
    data = fingerprint(frame, LABEL)["sha256"]
    with lock_folder(config.run, STARTED):
        start_or_resume("tune", replace(config, trials=1), config.run, data)  # more trials may be asked for later
        write_manifest(frame, config.run / "manifest.csv")
        study = optuna.create_study(
            storage=f"sqlite:///{(config.run / 'study.db').absolute()}", study_name="vitmodel", direction="maximize", load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=WARM_UP_TRIALS),
        )  # fmt: skip
        requeue(study)
        while (done := len(finished_trials(study))) < config.trials:
            # a seed for each trial, or a search that goes on would draw its first trials again
            study.sampler = optuna.samplers.TPESampler(seed=derive_seed("trial", config.seed, done) % 2**32)
            study.optimize(lambda trial: objective(trial, config, frame, preprocessing, data), n_trials=1)
            write_report(study, config)
        write_report(study, config)


def import_optuna() -> Any:
    """optuna, quiet. Raises UsageError where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise UsageError("tuning needs optuna: pip install 'vitmodel[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def requeue(study: Any) -> None:
    """Trials that a kill left running are given up, and their settings tried again first."""
    optuna = import_optuna()
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(trial.params)


def finished_trials(study: Any) -> list[Any]:
    """The trials that ended by themselves or were stopped for being bad."""
    states = import_optuna().trial.TrialState
    return study.get_trials(states=[states.COMPLETE, states.PRUNED])


def suggest(trial: Any, config: TuneConfig) -> TrainConfig:
    """The recipe of a trial: what is searched, around the recipe's own values, and what all share."""
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
    """The best validation figure of one training; one that diverges is a bad trial."""
    recipe = suggest(trial, config)
    run = config.run / "trials" / f"{trial.number:04d}"
    start_or_resume("train", replace(recipe, run=run), run, data)
    rows = {name: frame[frame["split"] == name] for name in ("train", "val")}
    network = make_network_config(recipe, preprocessing, [rows["train"]])
    watcher = PruningCallback(trial, MONITOR_METRICS[config.monitor])
    try:
        fitted = train_and_validate(recipe, run, rows["train"], rows["val"], network, None, [watcher])
    except DivergedError as error:
        print(f"trial {trial.number}: {error}")
        raise import_optuna().TrialPruned from error
    assert fitted is not None
    return max(value for _, value in fitted.history[watcher.figure])


class PruningCallback(L.Callback):
    """Tells the study how a trial goes, and ends it where the study thinks it hopeless."""

    def __init__(self, trial: Any, figure: str) -> None:
        self.trial = trial
        self.figure = figure

    def on_validation_end(self, trainer: L.Trainer, learner: L.LightningModule) -> None:
        value = trainer.callback_metrics.get(self.figure)
        if value is not None and np.isfinite(float(value)):
            self.trial.report(float(value), trainer.current_epoch)
            if self.trial.should_prune():
                raise import_optuna().TrialPruned


def write_report(study: Any, config: TuneConfig) -> None:
    """trials.csv, report.md with the best settings and the share of the variance that each setting explains, and best.yaml."""
    optuna = import_optuna()
    with atomic_path(config.run / "trials.csv") as temporary:
        study.trials_dataframe(attrs=("number", "value", "state", "params", "duration")).to_csv(temporary, index=False)
    complete = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    if not complete:
        return
    try:
        importances = optuna.importance.get_param_importances(study)
    except (RuntimeError, ValueError):  # too few trials, or all alike
        importances = {}
    best = study.best_trial
    values = {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in best.params.items()}
    rows = "\n".join(
        f"| {name} | {value} | {importances.get(name, float('nan')):.3f} |" for name, value in values.items()
    )
    text = f"""# Search of {len(finished_trials(study))} trials, {len(complete)} of them to the end

Best validation {config.monitor}: {best.value:.4f} (trial {best.number}). It was chosen among all, so it flatters; what it is worth shows on
other patients only.

| setting | best | importance |
|---|---|---|
{rows}
"""
    write_atomic(config.run / "report.md", text)
    recipe = replace(suggest(optuna.trial.FixedTrial(best.params), config), run=config.run / "best")
    write_atomic(config.run / "best.yaml", to_yaml("train", recipe, config.run / "best.yaml"))
    print(
        f"trial {finished_trials(study)[-1].number}: best {config.monitor} {best.value:.4f} of {len(finished_trials(study))} trials"
    )
