"""Pretraining writes a package that training accepts and prediction refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vitmodel.cli import main
from vitmodel.config import Size
from vitmodel.data.manifest import read_manifest
from vitmodel.data.samplers import SampleRequest
from vitmodel.metrics.metrics import RankedUnits
from vitmodel.metrics.scored_units import ScoredUnits
from vitmodel.model.package import load_package
from vitmodel.phantoms.dataset import PhantomDataset, crop_phantom, sample_phantom

ROOT = Path(__file__).parents[2]
SHORT = ["--model", "vit_micro", "--epochs", "2", "--batch-size", "8", "--workers", "0", "--wandb", "off"]


@pytest.mark.parametrize("task", ["painting", "finding"])
def test_a_pretrained_package_starts_a_training_but_gives_no_scores(
    task: str, crops: Path, tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "pretrained"
    extra = ["--size", "64x32", "--phantoms", "16"]
    if task == "painting":
        extra = ["--manifest", str(crops / "manifest.csv")]
    assert main(["pretrain", str(run), *SHORT, *extra]) == 0
    history = load_package(run / "package")[1]["history"]
    assert [epoch for epoch, _ in history["train/loss"]] == [0, 1]
    assert ("val/auroc" in history) == (task == "finding")
    assert main(["info", str(run / "package")]) == 0
    command = ["train", str(crops / "manifest.csv"), str(tmp_path / "run"), *flags, "--epochs", "1"]
    assert main([*command, "--model", "vit_micro", "--weights", str(run / "package")]) == 0
    printed = capsys.readouterr().out
    assert "loaded" in printed
    assert "dropped  head.bias" in printed
    assert "fresh    head.bias" in printed, "the bias must start at the prior of the labels, not at the other task's"
    assert main(["predict", str(run / "package"), str(crops / "manifest.csv"), str(tmp_path / "scores")]) == 2
    assert "--weights" in capsys.readouterr().err


def test_masked_autoencoding_does_not_read_held_out_patients(crops: Path, tmp_path: Path) -> None:
    """Without the files of held-out crops, the weights are the same."""
    from vitmodel.data.manifest import usable_rows, write_manifest
    from vitmodel.data.splits import assign_splits

    table = assign_splits(usable_rows(read_manifest(crops / "manifest.csv")), {"train": 0.5, "test": 0.5})
    write_manifest(table, tmp_path / "whole.csv")
    held_out = table["split"] == "test"
    write_manifest(table.assign(path=table["path"].where(~held_out, table["path"] + ".gone")), tmp_path / "gone.csv")
    for name in ("whole", "gone"):
        arguments = [str(tmp_path / name), *SHORT, "--epochs", "1", "--manifest", str(tmp_path / f"{name}.csv")]
        assert main(["pretrain", *arguments]) == 0
    first, second = (load_file(tmp_path / name / "package" / "model.safetensors") for name in ("whole", "gone"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.nightly
def test_masked_autoencoding_with_two_processes_reaches_the_loss_of_one(crops: Path, tmp_path: Path) -> None:
    """The unused head gets no gradient in any process. The losses differ slightly: other patches are masked."""
    manifest = ["--manifest", str(crops / "manifest.csv")]
    command = ["pretrain", str(tmp_path / "two"), *SHORT, *manifest, "--device", "cpu", "--devices", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "vitmodel.cli", *command], capture_output=True, text=True, timeout=400, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert main(["pretrain", str(tmp_path / "one"), *SHORT, *manifest]) == 0
    one, two = (load_package(tmp_path / run / "package")[1]["history"]["train/loss"] for run in ("one", "two"))
    assert np.array(one) == pytest.approx(np.array(two), abs=0.05)


@pytest.mark.nightly
def test_brightness_of_phantoms_does_not_predict_their_label() -> None:
    """The AUROC of simple statistics of the pixels is within 4 standard errors of chance."""
    size = Size(64, 32)
    count = 120
    crops = [crop_phantom(sample_phantom(seed, bool(seed % 2), 0.5, Size(96, 64)), size) for seed in range(count)]
    labels = np.arange(count) % 2
    for statistic in (lambda x: np.percentile(x, 99), np.mean, np.std):
        values = np.array([statistic(crop[crop > 0] / 255.0) for crop in crops])
        auroc = RankedUnits(ScoredUnits(labels, values, np.arange(count)), 0.5).metric_values()["auroc"]
        assert abs(auroc - 0.5) < 4 * np.sqrt(1 / (12 * count / 2))


def test_phantoms_differ_and_are_reproducible() -> None:
    images = PhantomDataset(4, Size(64, 32), 0.5, None)
    first = images[SampleRequest(0, 1)]
    second = images[SampleRequest(0, 2)]
    again = images[SampleRequest(0, 1)]
    assert torch.equal(first.image, again.image)
    assert not torch.equal(first.image, second.image)
    assert first.label == second.label
    other_row = images[SampleRequest(2, 0)]
    assert not torch.equal(images[SampleRequest(0, 0)].image, other_row.image), "rows with one seed are equal"
    assert (first.image == 0).any()
    assert first.image.shape == (1, 64, 32)
