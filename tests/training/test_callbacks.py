"""All loggers receive the same names and settings, and contact sheets show every crop."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vitmodel.cli import main
from vitmodel.model.package import load_package
from vitmodel.reports.panel import contact_grid


def test_both_loggers_get_the_same_names_and_settings(
    crops: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    validation_pictures: Callable[[], AbstractContextManager[None]],
) -> None:
    logged: set[str] = set()
    settings: dict[str, Any] = {}
    log = wandb.Run.log

    def spy(self, data, *arguments, **options):
        logged.update(data)
        settings.update(self.config)
        return log(self, data, *arguments, **options)

    monkeypatch.setattr(wandb.Run, "log", spy)
    flags = ["--model", "vit_micro", "--epochs", "2", "--batch-size", "16"]
    flags += ["--val", "0.25", "--test", "0.25", "--workers", "0"]
    flags += ["--wandb", "offline", "--layer-decay", "0.8", "--auxiliary", "[age]"]
    with validation_pictures():
        assert main(["train", str(crops / "manifest.csv"), str(tmp_path / "run"), *flags]) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"]) | set(events.Tags()["images"])
    assert logged - {"trainer/global_step"} == tags
    expected = {
        "train/gradient_norm",
        "train/images_per_second",
        "train/memory_gb",
        "train/auxiliary/age",
        "lr-AdamW/stem",
        "lr-AdamW/head",
    }
    expected |= {"val/roc", "val/precision_recall", "val/confusion_matrix", "learning_rate"}
    assert expected <= tags
    assert any(tag.startswith("val/worst_false_") for tag in tags)
    assert all(event.value > 0 for event in events.Scalars("train/gradient_norm"))
    assert settings == yaml.safe_load((tmp_path / "run" / "tensorboard" / "hparams.yaml").read_text())
    assert settings["augment"]["rotate"] == 10
    assert settings["system"] == json.loads((tmp_path / "run" / "system.json").read_text())
    assert settings["system"]["data_sha256"] == load_package(tmp_path / "run" / "package")[1]["data"]["sha256"]


def test_a_contact_sheet_shows_each_crop_completely_and_separately() -> None:
    crops = [np.full((20, 10), value, np.uint8) for value in (50, 100, 150)] + [np.full((20, 10), 51400, np.uint16)]
    picture = contact_grid(crops, columns=2, height=40)
    assert [np.count_nonzero(picture == value) for value in (50, 100, 150, 200)] == [40 * 20] * 4
    captioned = contact_grid(crops, ["a", "b", "c", "d"], columns=2, height=40)
    assert captioned.shape[0] > picture.shape[0]
