"""A run that is refused before its first step leaves no folder behind, so that the corrected command can run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from vitmodel.cli import main
from vitmodel.commands import leave_out
from vitmodel.config import LeaveOutConfig, Size
from vitmodel.data.manifest import read_manifest, write_manifest
from vitmodel.errors import UsageError, VitmodelError
from vitmodel.jobs.journal import lock_folder
from vitmodel.model.architecture import PRESETS
from vitmodel.model.vit import ViT

SMALL = ["--model", "vit_micro", "--epochs", "1", "--workers", "0", "--batch-size", "16", "--wandb", "off"]
SPLIT = ["--val", "0.25", "--test", "0.25"]


def sources_column_that_does_not_exist(folder: Path) -> list[str]:
    return ["--sources", "scanner"]


def crops_larger_than_the_token_budget(folder: Path) -> list[str]:
    return ["--tokens", "4"]


def exams_larger_than_the_token_budget(folder: Path) -> list[str]:
    return ["--tokens", "20", "--fusion"]


def weights_of_another_size(folder: Path) -> list[str]:
    save_file(ViT(replace(PRESETS["vit_tiny"], image_size=Size(64, 32))).state_dict(), folder / "tiny.safetensors")
    return ["--weights", str(folder / "tiny.safetensors")]


def weights_of_something_else(folder: Path) -> list[str]:
    save_file({"conv.weight": torch.zeros(3, 3)}, folder / "other.safetensors")
    return ["--weights", str(folder / "other.safetensors")]


def unreadable_weights(folder: Path) -> list[str]:
    (folder / "broken.safetensors").write_bytes(b"no weights")
    return ["--weights", str(folder / "broken.safetensors")]


def missing_weights(folder: Path) -> list[str]:
    return ["--weights", str(folder / "missing.safetensors")]


def splits_file_without_patients(folder: Path) -> list[str]:
    (folder / "splits.csv").write_text("name,part\na,train\n")
    return ["--splits", str(folder / "splits.csv")]


REFUSALS: list[Callable[[Path], list[str]]] = [
    sources_column_that_does_not_exist,
    crops_larger_than_the_token_budget,
    exams_larger_than_the_token_budget,
    weights_of_another_size,
    weights_of_something_else,
    unreadable_weights,
    missing_weights,
    splits_file_without_patients,
]


@pytest.fixture
def lost_crops(crops: Path, tmp_path: Path) -> Path:
    """Return a manifest whose crops do not exist, which is noticed when a crop is first read."""
    table = read_manifest(crops / "manifest.csv")
    paths = table["path"].where(table["path"] == "", table["path"] + ".gone")
    write_manifest(table.assign(path=paths), tmp_path / "lost.csv")
    return tmp_path / "lost.csv"


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.__name__)
def test_a_refused_training_leaves_no_run_folder(
    refusal: Callable[[Path], list[str]], crops: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "run"
    assert main(["train", str(crops / "manifest.csv"), str(run), *SMALL, *SPLIT, *refusal(tmp_path)]) in (1, 2)
    assert not run.parent.exists()


def test_a_training_with_an_unknown_auxiliary_column_leaves_no_run_folder(crops: Path, tmp_path: Path) -> None:
    write_manifest(read_manifest(crops / "manifest.csv").assign(density=float("nan")), tmp_path / "manifest.csv")
    command = ["train", str(tmp_path / "manifest.csv"), str(tmp_path / "run"), *SMALL, *SPLIT]
    assert main([*command, "--auxiliary=[density]"]) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("partition", [SPLIT, ["--folds", "2"]], ids=["splits", "folds"])
def test_the_corrected_command_runs_after_a_refusal(partition: list[str], crops: Path, tmp_path: Path) -> None:
    command = ["train", str(crops / "manifest.csv"), str(tmp_path / "run"), *SMALL, *partition]
    assert main([*command, *unreadable_weights(tmp_path)]) == 1
    assert main(command) == 0
    assert (tmp_path / "run" / "package" / "config.json").exists()


def test_a_refused_training_keeps_the_files_of_others(crops: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    assert main(["train", str(crops / "manifest.csv"), str(run), *SMALL, *SPLIT, *unreadable_weights(tmp_path)]) == 1
    assert [path.name for path in run.iterdir()] == ["notes.txt"]


def test_a_refused_resumption_keeps_the_run(run: Path, crops: Path, flags: list[str]) -> None:
    before = sorted(run.rglob("*"))
    assert main(["train", str(crops / "manifest.csv"), str(run), *flags, "--resume", "--lr", "0.5"]) == 2
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("verb", ["train", "pretrain", "tune"])
def test_a_training_whose_first_crops_cannot_be_read_leaves_no_run_folder(
    verb: str, lost_crops: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    place = [str(run), "--manifest", str(lost_crops)] if verb == "pretrain" else [str(lost_crops), str(run), *SPLIT]
    assert main([verb, *place, *SMALL]) == 1
    assert not run.exists()


def test_a_refused_search_leaves_no_run_folder(crops: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    command = ["tune", str(crops / "manifest.csv"), str(tmp_path / "run"), *SMALL, *SPLIT]
    assert main([*command, *weights_of_another_size(tmp_path)]) == 2
    assert not (tmp_path / "run").exists()


def test_a_refused_prediction_leaves_no_output_folder(run: Path, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("no,known,columns\n1,2,3\n")
    assert main(["predict", str(run / "package"), str(tmp_path / "table.csv"), str(tmp_path / "scores")]) == 2
    assert not (tmp_path / "scores").exists()


def test_a_refused_etl_leaves_no_output_folder(tmp_path: Path) -> None:
    assert main(["etl", str(tmp_path / "absent"), str(tmp_path / "crops")]) == 2
    assert not (tmp_path / "crops").exists()


def test_a_refused_training_of_leave_out_leaves_no_folder(
    crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise VitmodelError("refused")

    monkeypatch.setattr(leave_out, "run_step", refuse)
    table = pd.DataFrame(read_manifest(crops / "manifest.csv"))
    config = LeaveOutConfig(manifest=crops / "manifest.csv", out=tmp_path / "out")
    value = table[config.by].dropna().iloc[0]
    with pytest.raises(VitmodelError, match="refused"):
        leave_out.run(table, value, config.out / "value", config)
    assert not config.out.exists()


@pytest.mark.parametrize("missing", ["recipes", "ours", "weights", "our-weights"])
def test_versions_names_a_missing_file_before_it_reads_an_image(
    missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("backbone.yaml", "v2.yaml", "v3.yaml", "ours.yaml", "weights"):
        (tmp_path / name).touch()
    files = {
        "recipes": tmp_path,
        "ours": tmp_path / "ours.yaml",
        "weights": tmp_path / "weights",
        "our-weights": tmp_path / "weights",
    }
    files[missing] = tmp_path / "absent"
    out = tmp_path / "out"
    assert main(["versions", str(tmp_path), str(out), *(f"--{flag}={path}" for flag, path in files.items())]) == 2
    assert f"{missing.replace('-', '_')}: " in capsys.readouterr().err
    assert not out.exists()


def test_results_are_kept_after_a_later_failure(tmp_path: Path) -> None:
    with contextlib.suppress(UsageError), lock_folder(tmp_path / "out"):
        (tmp_path / "out" / "journal.jsonl").write_text('{"key": "an image"}\n')
        raise UsageError("after the first result")
    assert (tmp_path / "out" / "journal.jsonl").exists()


def test_an_unexpected_error_keeps_the_folder_for_inspection(tmp_path: Path) -> None:
    with contextlib.suppress(ZeroDivisionError), lock_folder(tmp_path / "out"):
        (tmp_path / "out" / "trace.txt").touch()
        raise ZeroDivisionError
    assert (tmp_path / "out" / "trace.txt").exists()


def test_a_folder_that_another_run_holds_is_not_changed(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "out"):
        (tmp_path / "out" / "first.txt").touch()
        with pytest.raises(UsageError, match="another run"), lock_folder(tmp_path / "out"):
            pass
        assert (tmp_path / "out" / "first.txt").exists()
