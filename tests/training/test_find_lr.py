"""The sweep of the learning rate covers its range, ends when the loss diverges, and suggests only what it can see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_recipe import SHORT

from vitmodel.cli import main
from vitmodel.training.find_lr import HIGHEST, LOWEST, STEPS, LearningRateSweep, rate_factor


def sweep(losses: np.ndarray) -> LearningRateSweep:
    return LearningRateSweep(1e-3 * np.array([rate_factor(step) for step in range(len(losses))]), losses)


def test_the_rates_rise_by_one_factor_from_the_lowest_to_the_highest() -> None:
    factors = np.array([rate_factor(step) for step in range(STEPS)])
    assert factors[[0, -1]] == pytest.approx([LOWEST, HIGHEST])
    assert np.ptp(np.diff(np.log(factors))) < 1e-9


def test_the_suggestion_is_below_the_rate_at_which_the_loss_rises() -> None:
    fall, rise = np.linspace(0.7, 0.2, 60), np.linspace(0.2, 2.0, 20)
    result = sweep(np.concatenate([np.full(20, 0.7), fall, rise]))
    turn = result.rates[80]
    assert result.suggestion is not None
    assert turn / 30 < result.suggestion < turn / 5


def test_noise_around_a_constant_loss_gives_no_suggestion() -> None:
    rng = np.random.default_rng(0)
    suggestions = [sweep(rng.normal(0.69, 0.05, STEPS)).suggestion for _ in range(50)]
    assert sum(suggestion is not None for suggestion in suggestions) <= 5


def test_a_sweep_leaves_the_run_folder_free_for_a_training(
    crops: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(crops / "manifest.csv"), str(tmp_path / "run"), *SHORT, "--clip", "0"]
    assert main([*command, "--find-lr", "--lr", "1e-3"]) == 0
    assert "suggestion" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "run" / "find_lr.csv")
    assert table["lr"].to_numpy() == pytest.approx(1e-3 * np.array([rate_factor(step) for step in range(len(table))]))
    assert (tmp_path / "run" / "find_lr.png").stat().st_size > 5000
    assert not (tmp_path / "run" / "package").exists()
    assert main(command) == 0
    assert (tmp_path / "run" / "package").exists()
