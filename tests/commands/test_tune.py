"""A search resumes, prunes bad trials and writes its best recipe; the sweep file's flags are valid."""

from __future__ import annotations

import operator
import os
import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from vitmodel.cli import main, parse
from vitmodel.commands.tune import PruningCallback, suggest
from vitmodel.config import TuneConfig
from vitmodel.training.module import ClassificationModule

optuna = pytest.importorskip("optuna")

SWEEP = Path(__file__).resolve().parents[2] / "examples" / "sweep.yaml"
SHORT = [
    *("--model", "vit_micro", "--epochs", "1", "--batch-size", "16", "--val", "0.25", "--test", "0.25"),
    *("--workers", "0", "--wandb", "off"),
]


def test_a_search_resumes_and_writes_its_best_recipe(crops: Path, tmp_path: Path) -> None:
    run = tmp_path / "study"
    command = ["tune", str(crops / "manifest.csv"), str(run), *SHORT]
    assert main([*command, "--trials", "1"]) == 0
    assert main([*command, "--trials", "2", "--resume"]) == 0
    study = optuna.load_study(study_name="vitmodel", storage=f"sqlite:///{run / 'study.db'}")
    killed = study.ask()  # a killed search leaves a trial in the state RUNNING
    killed.suggest_float("lr", 3e-5, 3e-3, log=True)
    assert main([*command, "--trials", "3", "--resume"]) == 0
    trials = pd.read_csv(run / "trials.csv")
    assert list(trials["state"].value_counts().loc[["COMPLETE", "FAIL"]]) == [3, 1]
    assert trials["params_lr"].nunique() == 3, "the resumed search repeated an earlier trial"
    last = trials[trials["state"] == "COMPLETE"].iloc[-1]
    assert last["params_lr"] == pytest.approx(killed.params["lr"]), (
        "the settings of the killed trial were not tried again"
    )
    assert "| lr |" in (run / "report.md").read_text()
    best = parse("train", ["--config", str(run / "best.yaml")])
    assert best.lr == pytest.approx(trials.loc[trials["value"].idxmax(), "params_lr"])


def test_a_search_runs_with_fusion_and_segments(crops: Path, tmp_path: Path) -> None:
    command = ["tune", str(crops / "manifest.csv"), str(tmp_path / "study"), *SHORT, "--trials", "1"]
    segments = ["--segments", "32", "--segment-overlap", "16", "--segment-context", "32", "--segment-budget", "20"]
    assert main([*command, "--fusion", *segments]) == 0
    best = parse("train", ["--config", str(tmp_path / "study" / "best.yaml")])
    assert best.fusion
    assert best.segments == 32


@pytest.mark.parametrize("weights", [None, Path("dinov2_vits14.safetensors")])
def test_the_search_space_contains_the_default_recipe(weights: Path | None) -> None:
    """This holds from scratch and from weights, whose learning rates differ, and also for the sweep file."""
    trial = optuna.create_study().ask()
    config = TuneConfig(manifest=Path(), run=Path(), weights=weights)
    suggest(trial, config)
    sweep = yaml.safe_load(SWEEP.read_text())["parameters"]
    for name, distribution in trial.distributions.items():
        default = config.augment.elastic if name == "augment.elastic" else getattr(config, name)
        assert distribution._contains(distribution.to_internal_repr(default)), name
        if "values" in sweep[name]:
            assert default in sweep[name]["values"], name
        else:
            assert sweep[name]["min"] <= default <= sweep[name]["max"], name
    assert trial.distributions["lr"].low < config.lr < trial.distributions["lr"].high


@pytest.mark.parametrize(("flag", "count"), [("--devices", "2"), ("--folds", "5")])
def test_a_search_on_several_devices_or_folds_is_refused(
    flag: str, count: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", "manifest.csv", "run", flag, count]) == 2
    assert flag.removeprefix("--") in capsys.readouterr().err


def test_a_trial_below_the_threshold_is_pruned() -> None:
    from lightning.pytorch import Trainer

    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.ThresholdPruner(lower=0.9))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.callback_metrics["val/auroc"] = 0.4
    with pytest.raises(optuna.TrialPruned):
        PruningCallback(study.ask(), "val/auroc").on_validation_end(trainer, None)


def test_a_diverging_trial_is_pruned_and_the_search_continues(
    crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training loss of the first trial is NaN."""
    losses = ClassificationModule._losses
    modules: list[ClassificationModule] = []

    def nan_in_first_module(self: ClassificationModule, stage: str, *more) -> torch.Tensor:
        if self not in modules:
            modules.append(self)
        diverges = self is modules[0] and stage == "train"
        return losses(self, stage, *more) * (torch.nan if diverges else 1)

    monkeypatch.setattr(ClassificationModule, "_losses", nan_in_first_module)
    run = tmp_path / "study"
    assert main(["tune", str(crops / "manifest.csv"), str(run), *SHORT, "--nonfinite", "1", "--trials", "2"]) == 0
    assert list(pd.read_csv(run / "trials.csv")["state"]) == ["PRUNED", "COMPLETE"]


def test_the_command_of_the_sweep_file_parses_as_a_training(tmp_path: Path) -> None:
    """Run the command as the agent would, with a script in place of vitmodel that prints its arguments."""
    sweep = yaml.safe_load(SWEEP.read_text())
    values = {}
    for name, options in sweep["parameters"].items():
        values[name] = options["values"][0] if "values" in options else options["max"]
    command: list[str] = []
    for part in sweep["command"]:
        command += [f"--{name}={value}" for name, value in values.items()] if part == "${args}" else [part]
    stand_in = tmp_path / "vitmodel"
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "WANDB_RUN_ID": "abc"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    verb, *arguments = done.stdout.splitlines()
    assert verb == "train"
    settings = parse("train", arguments)
    assert str(settings.run) == "runs/abc"
    for name, value in values.items():
        assert operator.attrgetter(name)(settings) == value
    assert sweep["metric"]["name"] == "val/auroc"


@pytest.mark.parametrize("size", ["140k", "600k"])
def test_a_full_disk_ends_with_a_message_and_the_search_resumes(
    size: str, crops: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first size is too small for the study's data base, the second one for a checkpoint."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(tmp_path)]
    mounted = subprocess.run(mount, capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        command = ["tune", str(crops / "manifest.csv"), str(tmp_path / "study"), *SHORT, "--trials", "1"]
        assert main(command) == 1
        assert re.search(r"vitmodel tune: cannot write .*[Nn]o space left.*", capsys.readouterr().err)
        subprocess.run(["mount", "-o", "remount,size=64m", str(tmp_path)], check=True)
        assert main([*command, "--resume"]) == 0
        assert (tmp_path / "study" / "best.yaml").exists()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
