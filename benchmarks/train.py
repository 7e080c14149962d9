"""Measure the speed of training: loader against step, time to the first step, and growth of cost and memory.

python benchmarks/train.py WORK [--rows 54706] [--model vit_tiny] [--json FILE]

The crops are phantoms of one size. A large table consists of hard links to a few of them, so that each row has its own
file.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import lightning as L
import pandas as pd
import torch

from vitmodel.config import Preprocessing, Size, TrainConfig
from vitmodel.data.manifest import as_manifest, read_manifest, write_manifest
from vitmodel.data.samplers import EpochSampler
from vitmodel.phantoms.dataset import crop_phantom, sample_phantom
from vitmodel.training.batching import BatchLoader
from vitmodel.training.crops import check_sizes, common_preprocessing, labelled_crops
from vitmodel.training.fit import make_crop_dataset, train_and_validate
from vitmodel.training.initial_network import build_model, make_network_config
from vitmodel.training.module import ClassificationModule
from vitmodel.training.trainer import start_or_resume
from vitmodel.utils import to_json, write_atomic

ORIGINALS = 64
STEPS = 30  # number of steps in a measurement


class MeasuredError(Exception):
    """Raised to end a training whose measurement is complete."""


class Stopwatch(L.Callback):
    """Callback that records the time at the end of each step and the memory at the end of each epoch.

    Args:
        steps: Number of steps after which the training ends; None = do not end it.
    """

    def __init__(self, steps: int | None) -> None:
        self.start = time.perf_counter()
        self.steps = steps
        self.seconds: list[float] = []
        self.megabytes: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        if self.steps and len(self.seconds) >= self.steps:
            raise MeasuredError

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.megabytes.append(pages * resource.getpagesize() / 1e6)


def make_manifest(folder: Path, rows: int, size: Size) -> Path:
    """Write a manifest of `rows` crops, half of them with a cancer and four per patient, and return its path."""
    originals = folder / "originals"
    originals.mkdir(parents=True, exist_ok=True)
    for number in range(ORIGINALS):
        path = originals / f"{number}.png"
        if not path.exists():
            view = sample_phantom(number, bool(number % 2), 0.3, Size(round(size.height * 1.5), size.height))
            write_atomic(path, cv2.imencode(".png", crop_phantom(view, size))[1].tobytes())
    manifest = folder / f"{rows}.csv"
    images = folder / f"images_{rows}"
    images.mkdir(exist_ok=True)
    for number in range(rows):
        if not (link := images / f"{number}.png").exists():
            os.link(originals / f"{number % ORIGINALS}.png", link)
    table = pd.DataFrame({"image_id": [str(number) for number in range(rows)]})
    table = table.assign(
        patient_id=[f"p{number // 4}" for number in range(rows)],
        laterality=["LLRR"[number % 4] for number in range(rows)],
        view=["CC", "MLO"] * (rows // 2) + ["CC"] * (rows % 2),
        path=[str(images / f"{number}.png") for number in range(rows)],
        cancer=[float(number // 4 % 2) for number in range(rows)],
        status="ok",
        preprocessing=Preprocessing(size=size).to_json(),
    )
    write_manifest(as_manifest(table, "benchmark"), manifest)
    return manifest


def timed_training(config: TrainConfig, steps: int | None) -> Stopwatch:
    """Train for `steps` steps and return their times, which include the preparation of the training."""
    stopwatch = Stopwatch(steps)
    frame = labelled_crops(config)
    preprocessing = common_preprocessing(frame, config.manifest)
    check_sizes(frame, config)
    start_or_resume("train", config, config.run)
    rows = {name: frame[frame["split"] == name] for name in ("train", "val")}
    with contextlib.suppress(MeasuredError):
        network = make_network_config(config, preprocessing, [rows["train"]])
        train_and_validate(config, config.run, rows["train"], rows["val"], network, None, [stopwatch])
    return stopwatch


def loader_and_step(config: TrainConfig) -> tuple[float, float]:
    """Return the images per second of the loader alone, and of the training step alone on the same batch."""
    frame = labelled_crops(config)
    rows = frame[frame["split"] == "train"]
    dataset = make_crop_dataset(rows, config, augment=True)
    batches = iter(BatchLoader(dataset, EpochSampler(rows[config.label].tolist(), 0, "balanced"), config))
    batch = next(batches)
    start = time.perf_counter()
    loaded = sum(len(loaded_batch.pack) for loaded_batch in itertools.islice(batches, STEPS))
    loader = loaded / (time.perf_counter() - start)
    network = make_network_config(config, common_preprocessing(frame, config.manifest), [rows])
    module = ClassificationModule(build_model(config, network, rows)[0], config, len(rows), {})
    device = "cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu"
    module.to(device)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    pack = batch.pack.to(device)
    labels = batch.label.to(device)
    for step in range(STEPS + 1):
        if step == 1:
            start = time.perf_counter()
        loss = module.loss(module(pack).float(), labels).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
    return loader, STEPS * len(pack) / (time.perf_counter() - start)


def first_step(arguments: list[str]) -> float:
    """Return the seconds from the start of a new Python process to the end of the first step."""
    start = time.perf_counter()
    subprocess.run([sys.executable, __file__, *arguments, "--first-step"], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--rows", type=int, default=54_706, help="length of the large table")
    parser.add_argument("--few", type=int, default=1000, help="length of the small table")
    parser.add_argument("--size", type=Size.parse, default=Size(256, 128))
    parser.add_argument("--model", default="vit_tiny")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--first-step", action="store_true", help="only train one step on the large table")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    large = options.work / f"{options.rows}.csv"
    number = itertools.count()

    def config(manifest: Path, **changes: Any) -> TrainConfig:
        run = options.work / f"run_{os.getpid()}_{next(number)}"
        fixed = {"model": options.model, "workers": options.workers, "wandb": "off", "patience": 0, "precision": "fp32"}
        return TrainConfig(manifest=manifest, run=run, **fixed | changes)

    if options.first_step:
        timed_training(config(large), steps=1)
        return
    few = make_manifest(options.work, options.few, options.size)
    make_manifest(options.work, options.rows, options.size)
    assert len(read_manifest(large)) == options.rows
    loader, step = loader_and_step(config(few))
    arguments = [str(options.work), "--rows", str(options.rows)]
    arguments += ["--model", options.model, "--workers", str(options.workers)]
    result: dict[str, Any] = {
        "loader_images_per_s": loader,
        "step_images_per_s": step,
        "loader_over_step": loader / step,
        "first_step_s": first_step(arguments),
    }
    for name, manifest in (("few", few), ("all", large)):
        seconds = timed_training(config(manifest), steps=STEPS).seconds
        result[f"step_s_{name}"] = (seconds[-1] - seconds[4]) / (len(seconds) - 5)
    result["cost_ratio"] = result["step_s_all"] / result["step_s_few"]
    small = make_manifest(options.work, 96, options.size)
    result["megabytes_by_epoch"] = timed_training(config(small, epochs=6, model="vit_micro"), None).megabytes
    rows = {
        "loader alone, images/s": f"{loader:.0f}",
        "step alone, images/s": f"{step:.1f}",
        "loader / step (target: at least 3)": f"{loader / step:.1f}",
        f"first step of {options.rows:,} rows, s (target: at most 10)": f"{result['first_step_s']:.1f}",
        f"seconds per step, {options.rows:,} / {options.few:,} rows": f"{result['cost_ratio']:.2f}",
        "memory after each epoch, MB": ", ".join(f"{value:.0f}" for value in result["megabytes_by_epoch"]),
    }
    print("| measurement | value |\n|---|---|")
    print("\n".join(f"| {name} | {value} |" for name, value in rows.items()))
    if options.json:
        write_atomic(options.json, to_json(result))


if __name__ == "__main__":
    main()
