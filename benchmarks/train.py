"""Speed of training: is the loader ever the bottleneck, how soon the first step comes, and whether cost and memory stay flat.

python benchmarks/train.py WORK [--rows 54706] [--model vit_tiny] [--json FILE]

The crops are phantoms of one size; a large table is hard links to a few of them, so that each row has a file of its own.
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
from vitmodel.training.fit import (
    LABEL,
    build_model,
    check_sizes,
    common_preprocessing,
    labelled_crops,
    make_crop_dataset,
    make_network_config,
    train_and_validate,
)
from vitmodel.training.module import ClassificationModule
from vitmodel.training.trainer import start_or_resume
from vitmodel.utils import to_json, write_atomic

ORIGINALS = 64
STEPS = 30  # of a measurement


class EnoughError(Exception):
    """A measurement has seen what it needs."""


class Stopwatch(L.Callback):
    """Seconds from `began` to each step's end, and the memory held at each epoch's; ends the training after `steps`."""

    def __init__(self, steps: int | None) -> None:
        self.began, self.steps = time.perf_counter(), steps
        self.seconds: list[float] = []
        self.megabytes: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)
        if self.steps and len(self.seconds) >= self.steps:
            raise EnoughError

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.megabytes.append(pages * resource.getpagesize() / 1e6)


def make_manifest(folder: Path, rows: int, size: Size) -> Path:
    """A manifest of `rows` crops, half of them with a cancer, four to a patient."""
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


def watch(config: TrainConfig, steps: int | None) -> Stopwatch:
    """Train for some steps, all that the stage does before included."""
    watch = Stopwatch(steps)
    frame = labelled_crops(config)
    preprocessing = common_preprocessing(frame, config.manifest)
    check_sizes(frame, config)
    start_or_resume("train", config, config.run)
    rows = {name: frame[frame["split"] == name] for name in ("train", "val")}
    with contextlib.suppress(EnoughError):
        network = make_network_config(config, preprocessing, [rows["train"]])
        train_and_validate(config, config.run, rows["train"], rows["val"], network, None, [watch])
    return watch


def loader_and_step(config: TrainConfig) -> tuple[float, float]:
    """Images per second of the loader alone, and of the step alone on one batch again and again."""
    frame = labelled_crops(config)
    rows = frame[frame["split"] == "train"]
    batches = BatchLoader(
        make_crop_dataset(rows, config, augment=True), EpochSampler(rows[LABEL].tolist(), 0, "balanced"), config
    )
    each = iter(batches)
    batch = next(each)
    began = time.perf_counter()
    loaded = sum(len(found.pack) for found in itertools.islice(each, STEPS))
    loader = loaded / (time.perf_counter() - began)
    learner = ClassificationModule(
        build_model(config, make_network_config(config, common_preprocessing(frame, config.manifest), [rows]), rows),
        config,
        len(rows),
        {},
    )
    device = "cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu"
    learner.to(device)
    optimizer = torch.optim.AdamW(learner.parameters(), fused=True)
    pack, labels = batch.pack.to(device), batch.label.to(device)
    for step in range(STEPS + 1):
        if step == 1:
            began = time.perf_counter()
        loss = learner.loss(learner(pack).float(), labels).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
    return loader, STEPS * len(pack) / (time.perf_counter() - began)


def first_step(arguments: list[str]) -> float:
    """Seconds from the start of a fresh Python to the end of the first step."""
    began = time.perf_counter()
    subprocess.run([sys.executable, __file__, *arguments, "--first-step"], check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--rows", type=int, default=54_706)
    parser.add_argument("--few", type=int, default=1000)
    parser.add_argument("--size", type=Size.parse, default=Size(256, 128))
    parser.add_argument("--model", default="vit_tiny")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--first-step", action="store_true", help="only train one step on ROWS rows")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    large = options.work / f"{options.rows}.csv"
    number = itertools.count()

    def config(manifest: Path, **changes: Any) -> TrainConfig:
        run = options.work / f"run_{os.getpid()}_{next(number)}"
        fixed = {"model": options.model, "workers": options.workers, "wandb": "off", "patience": 0, "precision": "fp32"}
        return TrainConfig(manifest=manifest, run=run, **fixed | changes)

    if options.first_step:
        watch(config(large), steps=1)
        return
    few = make_manifest(options.work, options.few, options.size)
    make_manifest(options.work, options.rows, options.size)
    assert len(read_manifest(large)) == options.rows
    loader, step = loader_and_step(config(few))
    ahead = [
        str(options.work),
        "--rows",
        str(options.rows),
        "--model",
        options.model,
        "--workers",
        str(options.workers),
    ]
    result: dict[str, Any] = {
        "loader_images_per_s": loader,
        "step_images_per_s": step,
        "loader_over_step": loader / step,
        "first_step_s": first_step(ahead),
    }
    for name, manifest in (("few", few), ("all", large)):
        seconds = watch(config(manifest), steps=STEPS).seconds
        result[f"step_s_{name}"] = (seconds[-1] - seconds[4]) / (len(seconds) - 5)
    result["cost_ratio"] = result["step_s_all"] / result["step_s_few"]
    result["megabytes_by_epoch"] = watch(
        config(make_manifest(options.work, 96, options.size), epochs=6, model="vit_micro"), None
    ).megabytes
    rows = {
        "loader alone, images/s": f"{loader:.0f}",
        "step alone, images/s": f"{step:.1f}",
        "loader / step (wanted: 3)": f"{loader / step:.1f}",
        f"first step of {options.rows:,} rows, s (wanted: 10)": f"{result['first_step_s']:.1f}",
        f"seconds per step, {options.rows:,} / {options.few:,} rows": f"{result['cost_ratio']:.2f}",
        "memory after each epoch, MB": ", ".join(f"{value:.0f}" for value in result["megabytes_by_epoch"]),
    }
    print("| what | value |\n|---|---|")
    print("\n".join(f"| {name} | {value} |" for name, value in rows.items()))
    if options.json:
        write_atomic(options.json, to_json(result))


if __name__ == "__main__":
    main()
