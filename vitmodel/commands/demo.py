"""The command `demo`: run all steps on synthetic mammograms, each by the command that a user would type."""

from __future__ import annotations

import json
import shutil

from vitmodel.config import DemoConfig
from vitmodel.errors import UsageError
from vitmodel.jobs.steps import run_step
from vitmodel.utils import NOT_A_MEDICAL_DEVICE

STEPS = """
synth    {out}/release --patients 160 --size 512x416 --difficulty 0.1 --positives 0.5
etl      {out}/release {out}/crops --size 128x64
train    {out}/crops/manifest.csv {out}/run --model vit_tiny --epochs 40 --tokens 480 --stem conv --lr 5e-4 \
         --drop-path 0 --patience 0 --val 0.2 --test 0.25
evaluate {out}/run/package {out}/run/manifest.csv {out}/report
predict  {out}/run/package {out}/release/test.csv {out}/scores
"""
"""Arguments of `vitmodel`, one command per line."""


def demo(config: DemoConfig) -> None:
    """Run STEPS and print the paths of the results.

    Raises:
        UsageError: The output folder holds files that are not of an earlier demo.
        VitmodelError: A step failed; names its command.
    """
    if config.out.exists():
        if any(config.out.iterdir()) and not (config.out / "release").is_dir():
            raise UsageError(
                f"{config.out} holds files that are not of an earlier demo; choose another folder with --out"
            )
        shutil.rmtree(config.out)
    for line in STEPS.strip().splitlines():
        run_step(*(word.format(out=config.out) for word in line.split()))
    metrics = json.loads((config.out / "report" / "metrics.json").read_text())
    auroc = metrics["breast"]["intervals"]["auroc"]
    interval = f"95 % interval {auroc['low']:.3f} to {auroc['high']:.3f}"
    print(f"\nreport:  {config.out / 'report' / 'report.html'}")
    print(f"scores:  {config.out / 'scores' / 'breast_scores.csv'}")
    print(f"held-out AUROC per breast: {auroc['value']:.3f} ({interval}), synthetic data")
    print(NOT_A_MEDICAL_DEVICE)
