"""Training: a resumed run equals an uninterrupted one, splits are by patient, loggers agree, bad input is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from vitmodel.cli import main
from vitmodel.commands.train import train
from vitmodel.config import TrainConfig
from vitmodel.data.dataset import CropDataset, to_tensor
from vitmodel.data.manifest import read_manifest, write_manifest
from vitmodel.data.samplers import EpochSampler, SampleRequest
from vitmodel.model.package import load_package
from vitmodel.model.weight_source import WeightsSource
from vitmodel.model.weights import ACTIONS, WeightAction, WeightReport
from vitmodel.training.module import EPOCH_METRICS
from vitmodel.training.packaging import _describe_weights, model_card, record_weights
from vitmodel.utils import sha256_file


def test_a_killed_and_resumed_run_ends_with_the_same_weights(
    crops: Path, run: Path, tmp_path: Path, flags: list[str], kill_and_resume: Callable[[list[str], Path], None]
) -> None:
    folder = tmp_path / "run"
    command = ["train", str(crops / "manifest.csv"), str(folder), *flags]
    kill_and_resume(command, folder)
    resumed = load_file(folder / "package" / "model.safetensors")
    uninterrupted = load_file(run / "package" / "model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in uninterrupted.items())
    packages = [load_package(each / "package")[1] for each in (folder, run)]
    for key in ("history", "calibration", "decision", "fitted_to"):  # fitted to the logits of all epochs
        assert packages[0][key] == packages[1][key], key


def test_the_run_folder_holds_logs_curves_package_and_model_card(run: Path) -> None:
    assert list((run / "tensorboard").glob("events.*"))
    assert list((run / "wandb").glob("offline-run-*"))
    assert (run / "train.yaml").read_text().startswith("# vitmodel train --config ")
    package = load_package(run / "package")[1]
    metrics = ["loss", *EPOCH_METRICS, "tp", "fp", "fn", "tn"]
    expected = {f"{stage}/{name}" for stage, name in itertools.product(("train", "val"), metrics)}
    assert set(package["history"]) == expected | {"learning_rate"}
    assert all([epoch for epoch, _ in points] == [0, 1, 2] for points in package["history"].values())
    assert package["decision"]["threshold"] > 0
    assert "not a medical device" in (run / "package" / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize(
    ("folds", "expected"),
    [
        (0, "A Vision Transformer that gives one logit per cropped mammogram."),
        (
            5,
            "An ensemble of 5 Vision Transformers, one per fold, "
            "that gives the mean of their logits per cropped mammogram.",
        ),
    ],
)
def test_the_model_card_describes_one_model_and_an_ensemble(folds: int, expected: str) -> None:
    config = TrainConfig(manifest=Path("m.csv"), run=Path("run"), folds=folds)
    splits = {"train": {"patients": 3, "images": 12, "positive_images": 2}}
    contents = {
        "data": {"splits": splits},
        "calibration": {"method": "platt"},
        "fitted_to": {"kind": "out_of_fold" if folds else "only_epoch"},
        "decision": {"threshold": 0.25},
        "training": "epochs: 1\n",
    }
    card = model_card(config, contents, "best val/auroc 0.9000")
    assert expected in card.splitlines()
    assert "not a medical device" in card
    assert "| train | 3 | 12 | 2 |" in card
    assert ("the ensemble itself was not measured" in card) == bool(folds)


def test_no_patient_is_in_two_splits(run: Path) -> None:
    manifest = read_manifest(run / "manifest.csv")
    assert set(manifest["split"]) == {"train", "val", "test"}
    assert (manifest.groupby("patient_id")["split"].nunique() == 1).all()


def test_the_package_contains_no_patient_or_image_id(run: Path) -> None:
    text = (run / "package" / "config.json").read_text() + (run / "package" / "MODEL_CARD.md").read_text()
    for name in read_manifest(run / "manifest.csv")[["patient_id", "image_id"]].to_numpy().ravel():
        assert f'"{name}"' not in text


def test_training_starts_from_a_package(
    crops: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    arguments = [str(tmp_path / "next"), *flags, "--epochs", "1", "--weights", str(run / "package")]
    assert main(["train", str(crops / "manifest.csv"), *arguments]) == 0
    assert "loaded" in capsys.readouterr().out
    package = load_package(tmp_path / "next" / "package")[1]
    tensors = load_file(run / "package" / "model.safetensors")
    card = (tmp_path / "next" / "package" / "MODEL_CARD.md").read_text()
    assert package["weights"]["sha256"] == sha256_file(run / "package" / "model.safetensors")
    assert package["weights"]["tensors"] == dict.fromkeys(ACTIONS, 0) | {"loaded": len(tensors)}
    assert f"Tensors: {len(tensors)} loaded." in card


def test_the_card_names_the_tensors_that_were_dropped_or_start_fresh() -> None:
    actions = [("loaded", "blocks.0.norm1.weight", ""), ("dropped", "fc (9, 2)", ""), ("fresh", "head.weight", "new")]
    report = WeightReport(Path("vit.safetensors"), tuple(WeightAction(*action) for action in actions))
    weights = record_weights(WeightsSource("vit.safetensors", None, "ab12"), report)
    card = _describe_weights(json.loads(json.dumps(weights)))
    assert "vit.safetensors, SHA-256 ab12" in card
    assert "Tensors: 1 loaded, 1 dropped, 1 fresh." in card
    assert "| dropped | `fc (9, 2)` |  |" in card
    assert "| fresh | `head.weight` | new |" in card
    assert "blocks" not in card


def test_a_used_folder_is_refused_without_resume_and_with_other_settings(
    run: Path, crops: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    command = ["train", str(crops / "manifest.csv"), str(run), *flags[:-1], "offline"]
    assert main(command) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*command, "--resume", "--lr", "0.1"]) == 2
    assert "lr: 0.1" in capsys.readouterr().err


def test_a_run_does_not_resume_with_other_labels(
    crops: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    manifest = tmp_path / "manifest.csv"
    command = ["train", str(manifest), str(tmp_path / "run"), *flags, "--epochs", "1"]
    table = read_manifest(crops / "manifest.csv")
    write_manifest(table.sample(frac=1, random_state=0), manifest)
    assert main(command) == 0
    write_manifest(table, manifest)  # the order of rows has no effect
    assert main([*command, "--resume"]) == 0
    negative = table[(table["cancer"] == 0) & (table["status"] != "refused")].index[0]
    table.loc[negative, "cancer"] = 1.0
    write_manifest(table, manifest)
    assert main([*command, "--resume"]) == 2
    assert "labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda table: table.assign(cancer=0.0), "patients"),
        (lambda table: table.assign(cancer=float("nan")), "cancer"),
        (lambda table: table.assign(preprocessing=float("nan")), "vitmodel etl"),
        (
            lambda table: table.assign(preprocessing=table["preprocessing"].where(table["view"] == "CC", "another")),
            "different settings",
        ),
    ],
)
def test_a_manifest_without_usable_labels_or_crops_is_refused(
    change, named: str, crops: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    table = read_manifest(crops / "manifest.csv")
    write_manifest(change(table), tmp_path / "manifest.csv")
    assert main(["train", str(tmp_path / "manifest.csv"), str(tmp_path / "run"), *flags]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "run" / "package").exists()


def test_a_missing_crop_is_named(
    crops: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    table = read_manifest(crops / "manifest.csv")
    usable = table["path"] != ""
    table.loc[usable, "path"] = table.loc[usable, "path"].str.replace("images", "gone")
    write_manifest(table, tmp_path / "manifest.csv")
    assert main(["train", str(tmp_path / "manifest.csv"), str(tmp_path / "run"), *flags]) == 1
    assert "gone" in capsys.readouterr().err


def test_balanced_sampling_draws_both_classes_equally_often() -> None:
    labels = [1.0] * 3 + [0.0] * 37
    sampler = EpochSampler(labels, 1, "balanced")
    draws = [draw.row for draw in sampler]
    next_epoch = [draw.row for draw in sampler]
    assert len(draws) == 40
    assert sum(labels[row] for row in draws) == 20
    assert max(draws.count(row) for row in range(3)) - min(draws.count(row) for row in range(3)) <= 1
    assert draws != next_epoch == [draw.row for draw in EpochSampler(labels, 1, "balanced", epoch=1)]


def test_natural_sampling_draws_every_image_once() -> None:
    assert sorted(draw.row for draw in EpochSampler([0.0, 1.0] * 10, 0, "natural")) == list(range(20))


def test_a_sample_depends_only_on_its_row_and_seed(crops: Path) -> None:
    config = TrainConfig(manifest=Path(), run=Path())
    usable = read_manifest(crops / "manifest.csv").query("status != 'refused'")
    dataset = CropDataset(usable["path"].tolist(), usable["cancer"].tolist(), config.augment)
    first = dataset[SampleRequest(3, 7)]
    other = dataset[SampleRequest(3, 8)]
    again = dataset[SampleRequest(3, 7)]
    assert torch.equal(first.image, again.image)
    assert not torch.equal(first.image, other.image)
    assert first.image.shape == (1, 64, 32)


def test_a_random_crop_is_never_empty(tmp_path: Path) -> None:
    whole = np.zeros((64, 64), np.uint8)
    whole[20:44, :12] = 200
    cv2.imwrite(str(tmp_path / "whole.png"), whole)
    augment = replace(TrainConfig(manifest=Path(), run=Path()).augment, area=0.05)
    dataset = CropDataset([str(tmp_path / "whole.png")], [0.0], augment)
    samples = [dataset[SampleRequest(0, seed)].image for seed in range(40)]
    assert all(image.any() for image in samples)
    assert any(torch.equal(image, to_tensor(whole)) for image in samples), "no random crop was empty in the first place"


def test_the_saved_configuration_trains_the_same_model_again(run: Path, crops: Path, tmp_path: Path) -> None:
    train(replace(load_config(run), run=tmp_path / "again", wandb="off"))
    first, again = (load_file(folder / "package" / "model.safetensors") for folder in (run, tmp_path / "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)


def load_config(run: Path) -> TrainConfig:
    from vitmodel.cli import parse

    return parse("train", ["--config", str(run / "train.yaml")])


def test_the_curves_reach_tensorboard_under_the_same_names(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    history = load_package(run / "package")[1]["history"]
    assert set(history) <= set(events.Tags()["scalars"])
    assert "val/confusion_matrix" in events.Tags()["images"]
    losses = [value for _, value in history["val/loss"]]
    assert [event.value for event in events.Scalars("val/loss")] == pytest.approx(losses)


def test_the_run_keeps_the_labels_of_the_manifest(run: Path, crops: Path) -> None:
    labels = read_manifest(run / "manifest.csv").set_index("image_id")["cancer"]
    expected = read_manifest(crops / "manifest.csv").set_index("image_id")["cancer"]
    pd.testing.assert_series_equal(labels, expected.loc[labels.index])
