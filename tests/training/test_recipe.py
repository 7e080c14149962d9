"""Every training option has its effect, runs resume exactly, and failures during an epoch are reported."""

from __future__ import annotations

import json
import multiprocessing
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import MakeOnce
from safetensors.torch import load_file
from scipy.special import logit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vitmodel.cli import main
from vitmodel.config import Size, TrainConfig
from vitmodel.data.dataset import read_crop, to_tensor
from vitmodel.data.manifest import read_manifest, write_manifest
from vitmodel.data.samplers import EpochSampler
from vitmodel.errors import UsageError, VitmodelError
from vitmodel.model.architecture import PRESETS
from vitmodel.model.low_rank import add_low_rank_updates, merge_low_rank_updates
from vitmodel.model.package import load_models, load_package, load_typicalities
from vitmodel.model.packed_batch import pack_images
from vitmodel.model.vit import ViT
from vitmodel.training.module import ClassificationModule
from vitmodel.training.trainer import AtomicCheckpoints, resolve_precision, start_or_resume

ROOT = Path(__file__).parents[2]
FOLDED = [
    *("--model", "vit_micro", "--epochs", "2", "--batch-size", "8"),
    *("--workers", "0", "--wandb", "off", "--drop-path", "0"),
]
SHORT = [*FOLDED, "--val", "0.25", "--test", "0.25"]
EVERY_OPTION = [
    *("--ema", "0.9", "--layer-decay", "0.7", "--auxiliary", "[density,age,birads]"),
    *("--accumulate", "2", "--sampling", "positive"),
    *("--loss", "pf1", "--smoothing", "0.1", "--freeze", "1", "--stem", "conv", "--drop-path", "0.2", "--seed", "3"),
]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "package" / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def cli(*arguments: str, program: tuple[str, ...] = ("-m", "vitmodel.cli")) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, as a training on several devices needs, which starts the others."""
    return subprocess.run([sys.executable, *program, *arguments], capture_output=True, text=True, timeout=400, cwd=ROOT)


def cli_on_two_processes(*arguments: str) -> subprocess.CompletedProcess[str]:
    return cli(*arguments, "--device", "cpu", "--devices", "2")


@pytest.fixture(scope="module")
def short(crops: Path, make_once: MakeOnce) -> Path:
    """A finished run of two epochs. Read only."""

    def make(folder: Path) -> None:
        assert main(["train", str(crops / "manifest.csv"), str(folder), *SHORT]) == 0

    return make_once("short_run", make)


def test_a_run_with_every_option_resumes_to_identical_weights(
    crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run stops within the second epoch, with averaged weights, accumulated gradients and a thawed backbone."""
    command = ["train", str(crops / "manifest.csv")]
    assert main([*command, str(tmp_path / "undisturbed"), *SHORT, *EVERY_OPTION]) == 0
    step = ClassificationModule.training_step

    def interrupted(self: ClassificationModule, batch, number: int):
        if self.current_epoch == 1 and number == 1:
            raise RuntimeError("power cut")
        return step(self, batch, number)

    monkeypatch.setattr(ClassificationModule, "training_step", interrupted)
    with pytest.raises(RuntimeError, match="power cut"):
        main([*command, str(tmp_path / "resumed"), *SHORT, *EVERY_OPTION])
    monkeypatch.undo()
    assert main([*command, str(tmp_path / "resumed"), *SHORT, *EVERY_OPTION, "--resume"]) == 0
    assert same(tensors(tmp_path / "resumed"), tensors(tmp_path / "undisturbed"))
    histories = [load_package(tmp_path / name / "package")[1]["history"] for name in ("resumed", "undisturbed")]
    assert histories[0] == histories[1]


def test_a_frozen_backbone_trains_only_the_head(crops: Path, short: Path, tmp_path: Path) -> None:
    arguments = [*SHORT, "--weights", str(short / "package"), "--freeze", "2", "--lr", "0.01"]
    assert main(["train", str(crops / "manifest.csv"), str(tmp_path / "run"), *arguments]) == 0
    before, after = tensors(short), tensors(tmp_path / "run")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"head.weight", "head.bias"}


def test_low_rank_updates_change_the_matrices_of_the_blocks_by_their_rank(
    crops: Path, short: Path, tmp_path: Path
) -> None:
    arguments = [*SHORT, "--weights", str(short / "package"), "--lora", "2", "--freeze", "0", "--lr", "0.01"]
    command = ["train", str(crops / "manifest.csv")]
    assert main([*command, str(tmp_path / "run"), *arguments]) == 0
    before, after = tensors(short), tensors(tmp_path / "run")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    matrices = {name for name in before if name.startswith("blocks.") and before[name].ndim == 2}
    heads = {name for name in before if name.startswith(("head.", "fc_norm."))}
    assert moved == matrices | heads
    for name in matrices:
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) == 2
    averaged = [*arguments, "--ema", "0.5"]
    assert main([*command, str(tmp_path / "averaged"), *averaged]) == 0
    assert not same(tensors(tmp_path / "averaged"), after)


def test_low_rank_updates_start_from_the_given_network_and_merge_to_the_same_one() -> None:
    vit = ViT(replace(PRESETS["vit_micro"], image_size=Size(64, 32))).eval()
    images = torch.rand(2, 1, 64, 32)
    before = vit(images)
    add_low_rank_updates(vit, rank=4)
    torch.testing.assert_close(vit(images), before)
    for name, parameter in vit.named_parameters():
        if name.endswith(".up"):
            torch.nn.init.normal_(parameter, std=0.02)
    updated = vit(images)
    assert not torch.allclose(updated, before)
    merge_low_rank_updates(vit)
    torch.testing.assert_close(vit(images), updated)
    with pytest.raises(UsageError, match="rank 500"):
        add_low_rank_updates(vit, rank=500)


def test_a_linear_probe_equals_a_backbone_frozen_in_every_epoch(crops: Path, short: Path, tmp_path: Path) -> None:
    common = [*SHORT, "--weights", str(short / "package"), "--lr", "0.01", "--layer-decay", "1"]
    for name, freeze in (("probe", "backbone"), ("frozen", "2")):
        run = tmp_path / name
        assert main(["train", str(crops / "manifest.csv"), str(run), *common, "--freeze", freeze]) == 0
    assert same(tensors(tmp_path / "probe"), tensors(tmp_path / "frozen"))
    assert "freeze: backbone" in (tmp_path / "probe" / "train.yaml").read_text()


def test_averaged_weights_are_validated_and_packaged(crops: Path, short: Path, tmp_path: Path) -> None:
    """With a decay of almost 1 the average hardly changes after the first step, nor does the validation loss."""
    assert main(["train", str(crops / "manifest.csv"), str(tmp_path / "run"), *SHORT, "--ema", "0.999999"]) == 0
    history = load_package(tmp_path / "run" / "package")[1]["history"]
    losses = [value for _, value in history["val/loss"]]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert not same(tensors(tmp_path / "run"), tensors(short))


def test_accumulated_gradients_equal_those_of_a_larger_batch(crops: Path, short: Path, tmp_path: Path) -> None:
    """This also holds at the end of an epoch, where only one of two steps is left."""
    images = (read_manifest(short / "manifest.csv")["split"] == "train").sum()
    batch = next(size for size in range(4, 9) if 0 < images % (2 * size) <= size)
    plain = ["--sampling", "natural", "--optimizer", "sgd", "--lr", "0.1", "--clip", "0"]
    for name, size, steps in (("whole", 2 * batch, 1), ("parts", batch, 2)):
        arguments = [*SHORT, *plain, "--batch-size", str(size), "--accumulate", str(steps)]
        assert main(["train", str(crops / "manifest.csv"), str(tmp_path / name), *arguments]) == 0
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert all(torch.allclose(whole[name], parts[name], rtol=0, atol=1e-6) for name in whole)
    logged = [EventAccumulator(str(tmp_path / name / "tensorboard")).Reload() for name in ("whole", "parts")]
    norms = [[event.value for event in events.Scalars("train/gradient_norm")] for events in logged]
    assert len(norms[0]) > 2
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_a_batch_with_a_nonfinite_loss_is_skipped_and_named(
    crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original_losses = ClassificationModule._losses
    spoiled: set[tuple[str, ...]] = set()

    def nonfinite_losses(self: ClassificationModule, stage: str, batch, output, extra: torch.Tensor) -> torch.Tensor:
        values = original_losses(self, stage, batch, output, extra)
        if stage == "train" and self.current_epoch == 0 and len(spoiled) < 2:
            spoiled.add(batch.pack.names)
            return values * torch.nan
        return values

    monkeypatch.setattr(ClassificationModule, "_losses", nonfinite_losses)
    command = ["train", str(crops / "manifest.csv"), str(tmp_path / "run"), *SHORT]
    assert main([*command, "--nonfinite", "3"]) == 0
    logged = {tuple(step["image_ids"]) for step in json.loads((tmp_path / "run" / "nonfinite.json").read_text())}
    assert logged == {tuple(Path(name).stem for name in names) for names in spoiled}
    assert set().union(*logged) <= set(read_manifest(crops / "manifest.csv")["image_id"])
    assert all(tensor.isfinite().all() for tensor in tensors(tmp_path / "run").values())
    spoiled.clear()
    shutil.rmtree(tmp_path / "run")
    assert main([*command, "--nonfinite", "2"]) == 1
    assert "nonfinite.json" in capsys.readouterr().err


@pytest.mark.nightly
def test_two_processes_skip_a_step_together_and_name_the_images_of_both(crops: Path, tmp_path: Path) -> None:
    done = cli_on_two_processes(
        "train", str(crops / "manifest.csv"), str(tmp_path / "run"), *SHORT, "--lr", "1e30", "--nonfinite", "2"
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    steps = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert len(steps) == 2
    assert all(len(set(step["image_ids"])) > 4 for step in steps)  # of 8 images, 4 in each process


def test_a_nonfinite_gradient_changes_no_weight(crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is finite, its gradient is not: the step is skipped, and the weights and their average stay finite."""
    original_losses = ClassificationModule._losses

    def steep_losses(self: ClassificationModule, stage: str, batch, output, extra: torch.Tensor) -> torch.Tensor:
        values = original_losses(self, stage, batch, output, extra)
        if stage == "train" and self.current_epoch == 0 and not self.nonfinite_steps:
            return values + torch.sqrt(values.detach() * 0 + values * 0)  # value 0, gradient infinity * 0
        return values

    monkeypatch.setattr(ClassificationModule, "_losses", steep_losses)
    assert main(["train", str(crops / "manifest.csv"), str(tmp_path / "run"), *SHORT, "--ema", "0.9"]) == 0
    assert len(json.loads((tmp_path / "run" / "nonfinite.json").read_text())) == 1
    assert all(tensor.isfinite().all() for tensor in tensors(tmp_path / "run").values())


def write_manifest_with_unreadable_crops(crops: Path, folder: Path) -> list[str]:
    """Write a manifest in which two crops have no pixels; return the paths of these two."""
    table = read_manifest(crops / "manifest.csv").query("status != 'refused'")
    spoiled = table[table["cancer"] == 0].iloc[[0, 5]]
    copies = {}
    for row in spoiled.itertuples():
        copy = folder / Path(row.path).name
        copy.write_bytes(Path(row.path).read_bytes()[:60])  # the size can be read, the pixels cannot
        copies[row.path] = str(copy)
    write_manifest(table.assign(path=table["path"].replace(copies)), folder / "manifest.csv")
    return list(copies.values())


def test_unreadable_crops_are_logged_and_too_many_stop_the_run(
    crops: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    copies = write_manifest_with_unreadable_crops(crops, tmp_path)
    command = ["train", str(tmp_path / "manifest.csv"), str(tmp_path / "run"), *SHORT]
    command += ["--sampling", "natural", "--test", "0", "--epochs", "1"]
    assert main(command) == 0
    assert all(copy in caplog.text for copy in copies)
    assert (
        "2 of at most" in caplog.text or caplog.text.count("1 of at most") == 2
    )  # one per loader, or both in one loader
    shutil.rmtree(tmp_path / "run")
    assert main([*command, "--unreadable", "0"]) == 1
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.nightly
def test_an_unreadable_crop_in_one_process_stops_both(crops: Path, tmp_path: Path) -> None:
    write_manifest_with_unreadable_crops(crops, tmp_path)
    command = ["train", str(tmp_path / "manifest.csv"), str(tmp_path / "run"), *SHORT]
    command += ["--sampling", "natural", "--test", "0"]
    done = cli_on_two_processes(*command, "--unreadable", "0")
    assert done.returncode == 1
    assert "--unreadable" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_cross_validation_scores_each_patient_with_a_model_that_was_not_trained_on_her(
    crops: Path, tmp_path: Path
) -> None:
    """With flip averaging, model and package average the logits of each image and its vertical flip."""
    run = tmp_path / "run"
    command = ["train", str(crops / "manifest.csv"), str(run), *FOLDED, "--folds", "2", "--epochs", "1"]
    command += ["--workers", "1", "--flip-average", "--auxiliary", "[view]"]
    assert main(command) == 0
    # The loader processes of a fold end with the fold.
    assert not [child for child in multiprocessing.active_children() if child.daemon]
    out_of_fold = pd.read_csv(run / "out_of_fold.csv", dtype={"patient_id": str, "image_id": str})
    folds = pd.read_csv(run / "splits.csv", dtype={"patient_id": str}).set_index("patient_id")["fold"]
    assert (out_of_fold.groupby("patient_id")["fold"].nunique() == 1).all()
    assert (out_of_fold["fold"] == out_of_fold["patient_id"].map(folds)).all()
    assert out_of_fold.groupby("fold")["cancer"].nunique().eq(2).all()
    members, package = load_models(run / "package")
    assert len(members) == 2
    assert package["calibration"]
    assert main(["predict", str(run / "package"), str(run / "manifest.csv"), str(tmp_path / "scores")]) == 0
    scores = pd.read_csv(tmp_path / "scores" / "scores.csv", dtype={"image_id": str}).set_index("image_id")["score"]
    manifest = read_manifest(run / "manifest.csv").set_index("image_id")
    views = manifest.loc[out_of_fold["image_id"], "view"]
    assert package["auxiliary"]["view"]["units"] == views.isin(["CC", "MLO"]).sum()
    for number in range(len(members)):
        image_id = out_of_fold[out_of_fold["fold"] == number].iloc[0]["image_id"]
        crop = to_tensor(read_crop(manifest.loc[image_id, "path"]))
        images = pack_images([crop, crop.flip(-2)], 16)
        with torch.inference_mode():
            logits = [member(images).images.mean().item() for member in members]
        out_of_fold_score = out_of_fold.set_index("image_id")["score"][image_id]
        assert logit(out_of_fold_score) == pytest.approx(logits[number], abs=1e-4)
        assert logit(scores[image_id]) == pytest.approx(np.mean(logits), abs=1e-4)
    assert len(load_typicalities(run / "package")) == 2
    reference = json.loads((run / "package" / "config.json").read_text())["reference"]
    assert sum(reference["laterality"]["counts"]) == len(out_of_fold), "each image counts once, out of its fold"
    assert sum(reference["typicality"]["counts"]) == out_of_fold["score"].notna().sum()
    assert main([*command, "--resume"]) == 0  # finished folds are not trained again


def test_edited_folds_are_used_and_checked(crops: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = read_manifest(crops / "manifest.csv").query("status != 'refused'")
    with_cancer = set(table[table["cancer"] == 1]["patient_id"])
    folds = pd.DataFrame({"patient_id": table["patient_id"].unique()})
    folds.assign(fold=folds["patient_id"].isin(with_cancer).astype(int)).to_csv(tmp_path / "folds.csv", index=False)
    command = ["train", str(crops / "manifest.csv"), str(tmp_path / "run"), *FOLDED]
    command += ["--folds", "2", "--splits", str(tmp_path / "folds.csv")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "folds.csv" in error
    assert "fold 0" in error


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--auxiliary", "[age]", "--loss", "pf1"], marks=pytest.mark.nightly),
        pytest.param(
            ["--fusion", "--sources", "machine_id", "--source-dropout", "0", "--source-images", "4"],
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_two_processes_reproduce_the_curves_of_one(crops: Path, tmp_path: Path, options: list[str]) -> None:
    """With DDP over gloo and the same global batch of images or exams, the loss curves agree to rounding."""
    # In bf16, rounding alone would change the curves by more.
    arguments = [*SHORT, *options, "--patience", "0", "--precision", "fp32"]
    assert main(["train", str(crops / "manifest.csv"), str(tmp_path / "one"), *arguments, "--device", "cpu"]) == 0
    done = cli_on_two_processes("train", str(crops / "manifest.csv"), str(tmp_path / "two"), *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_package(tmp_path / run / "package")[1]["history"] for run in ("one", "two"))
    for name in ("train/loss", "val/loss", "train/tp", "val/auroc", "learning_rate"):
        assert np.array(one[name]) == pytest.approx(np.array(two[name]), abs=2e-4), name


FSDP_ON_A_CPU = """
import sys
import torch
import torch.distributed.fsdp as fsdp
from lightning.pytorch.strategies import FSDPStrategy
import vitmodel.training.trainer
from vitmodel.cli import main

FullStateDictConfig = fsdp.FullStateDictConfig
resolve_strategy = vitmodel.training.trainer.resolve_strategy

class CPUFullyShardedDataParallel(fsdp.FullyShardedDataParallel):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options | {"device_id": torch.device("cpu")})

class CPUFSDPStrategy(FSDPStrategy):  # Lightning's trainer refuses FSDPStrategy itself on a CPU
    pass

def resolve_cpu_strategy(config):
    strategy = resolve_strategy(config)
    strategy.__class__ = CPUFSDPStrategy
    return strategy

fsdp.FullyShardedDataParallel = CPUFullyShardedDataParallel
# Offloading to the CPU would free the tensors, which are on the CPU already.
fsdp.FullStateDictConfig = lambda offload_to_cpu, rank0_only: FullStateDictConfig(rank0_only=rank0_only)
torch.Tensor.cpu = torch.Tensor.clone  # a copy, as from a GPU: FSDP overwrites the memory
vitmodel.training.trainer.resolve_strategy = resolve_cpu_strategy
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.nightly
@pytest.mark.skipif(torch.cuda.is_available(), reason="simulates a GPU")
def test_sharded_training_reproduces_one_process(crops: Path, tmp_path: Path) -> None:
    """Two processes hold half of the weights each, with weight decay and a backbone that is frozen in epoch one."""
    (tmp_path / "fsdp_on_a_cpu.py").write_text(FSDP_ON_A_CPU)
    arguments = [*SHORT, "--freeze", "1", "--auxiliary", "[age]", "--weight-decay", "1", "--precision", "fp32"]
    assert main(["train", str(crops / "manifest.csv"), str(tmp_path / "one"), *arguments]) == 0
    command = ["train", str(crops / "manifest.csv"), str(tmp_path / "two"), *arguments]
    command += ["--devices", "2", "--strategy", "fsdp"]
    done = cli(*command, program=(str(tmp_path / "fsdp_on_a_cpu.py"),))
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_package(tmp_path / run / "package")[1]["history"] for run in ("one", "two"))
    for name in ("train/loss", "val/loss", "val/auroc"):
        assert np.array(one[name]) == pytest.approx(np.array(two[name]), abs=2e-5), name
    first, second = (
        torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in ("one", "two")
    )
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], rtol=0, atol=1e-5) for name in first)


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    """A limit on the file size simulates a full disk."""
    path = tmp_path / "last.ckpt"
    AtomicCheckpoints().save_checkpoint({"epoch": 1}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(VitmodelError, match=r"last\.ckpt.*--resume"):
            AtomicCheckpoints().save_checkpoint({"weights": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("precision", "expected"), [("auto", "32-true"), ("bf16", "bf16-mixed"), ("fp32", "32-true")])
def test_a_cpu_trains_in_32_bits_by_default(precision: Any, expected: str) -> None:
    config = TrainConfig(manifest=Path(), run=Path(), device="cpu", precision=precision)
    assert resolve_precision(config) == expected


def test_resuming_with_another_precision_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = TrainConfig(manifest=Path(), run=tmp_path, device="cpu", resume=True)
    system = tmp_path / "system.json"
    start_or_resume("train", config, tmp_path)
    start_or_resume("train", config, tmp_path)
    assert not caplog.text
    system.write_text(json.dumps(json.loads(system.read_text()) | {"precision": "16-mixed"}))
    start_or_resume("train", config, tmp_path)
    assert "precision was 16-mixed" in caplog.text


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_precision_trains_and_clips_gradients(precision: str, crops: Path, tmp_path: Path) -> None:
    """Gradients clipped to almost 0 leave the weights as they are at any learning rate; unclipped gradients do not."""
    weights = []
    for name, *options in (
        ("low", "--clip", "1e-9"),
        ("high", "--clip", "1e-9", "--lr", "1"),
        ("free", "--clip", "0", "--lr", "1e-2"),
    ):
        plain = ["--optimizer", "sgd", "--weight-decay", "0", "--warmup", "0", "--checkpointing", "true"]
        plain += ["--precision", precision, "--epochs", "1"]
        assert main(["train", str(crops / "manifest.csv"), str(tmp_path / name), *SHORT, *plain, *options]) == 0
        weights.append(torch.cat([tensor.flatten() for tensor in tensors(tmp_path / name).values()]))
    low, high, free = weights
    assert (low - high).abs().max() < 1e-6 < 1e-4 < (low - free).abs().max()
    system = json.loads((tmp_path / "low" / "system.json").read_text())
    assert system["precision"] == {"fp32": "32-true", "bf16": "bf16-mixed"}[precision]


@pytest.mark.parametrize("positives", [1, 3, 12])
def test_positive_sampling_puts_a_positive_into_each_batch(positives: int) -> None:
    labels = [1.0] * positives + [0.0] * (160 - positives)
    sampler = EpochSampler(labels, 0, "positive", batch=16)
    for _ in range(3):
        rows = [request.row for request in sampler]
        assert len(rows) == 160
        assert all(any(labels[row] for row in rows[start : start + 16]) for start in range(0, 160, 16))
        assert len(set(rows)) >= 160 - 10, "at most one image per batch may differ from natural sampling"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "fp16", "--device", "cpu"], "fp16"),
        (["--devices", "3"], "batch_size"),
        (["--auxiliary", "[biopsy]"], "biopsy"),
        (["--wandb", "online"], "WANDB_API_KEY"),
        (["--strategy", "fsdp", "--device", "cpu"], "fsdp"),
        (["--weights", "WRONG"], "WRONG"),
    ],
)
def test_invalid_options_are_refused(
    arguments: list[str],
    message: str,
    crops: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    table = read_manifest(crops / "manifest.csv")
    write_manifest(table.assign(biopsy=np.nan), tmp_path / "manifest.csv")
    assert main(["train", str(tmp_path / "manifest.csv"), str(tmp_path / "run"), *SHORT, *arguments]) == 2
    assert message in capsys.readouterr().err
