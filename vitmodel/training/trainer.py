"""Set-up of Lightning's trainer: devices, precision, checkpoints, loggers and run folders."""

from __future__ import annotations

import hashlib
import json
import logging
import netrc
import os
import platform
import shutil
import uuid
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import wandb
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from lightning.pytorch.utilities import rank_zero
from torch.distributed.fsdp import MixedPrecision

from vitmodel import __version__
from vitmodel.config import TrainingConfig, plain, to_yaml
from vitmodel.errors import UsageError, VitmodelError
from vitmodel.model.device import resolve_device
from vitmodel.model.fusion import ExamFusion
from vitmodel.model.network import AuxiliaryHeads
from vitmodel.model.packed_attention import compile_blocks
from vitmodel.model.vit import Block, Head
from vitmodel.training.batching import Batch, BatchLoader
from vitmodel.training.callbacks import NonFiniteStepMonitor, ThroughputLogger, TrainingProgressBar
from vitmodel.training.module import TrainingModule
from vitmodel.utils import atomic_path, to_json, write_atomic

logger = logging.getLogger(__name__)
logging.getLogger("lightning.pytorch").setLevel(
    logging.WARNING
)  # else each trainer lists the accelerators that it lacks

PACKAGE = Path(__file__).resolve().parents[1]
"""The source folder of vitmodel, whose hash is logged with each run."""
LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"
STARTED = f"**/{LAST_CHECKPOINT.parent}"
"""Glob pattern of the folder that a training creates at its first step. Runs refused earlier leave nothing behind."""
WANDB_TIMEOUT = "10"
"""Seconds in which Weights & Biases must answer at the start of an online run, unless WANDB_INIT_TIMEOUT is set."""
FSDP_WRAP_CLASSES = {Block, Head, AuxiliaryHeads, ExamFusion}
"""Modules that FSDP gathers as a unit: blocks, and the parts that are trained even with a frozen backbone."""


def is_rank_zero() -> bool:
    """Return whether this is the only process or the first of several, the one that writes files.

    The rank is read from the environment that the launcher of the processes set.
    """
    return getattr(rank_zero.rank_zero_only, "rank", 0) == 0


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoint files that replace the previous one only when they are complete.

    `fit` reads them with `weights_only=True`, so that loading never runs code.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        with atomic_path(path) as temporary:
            try:
                torch.save(checkpoint, temporary)
            except RuntimeError as error:  # torch raises it if the disk is full
                free = shutil.disk_usage(Path(path).parent).free / 1e6
                raise VitmodelError(
                    f"cannot write {path} ({error}; {free:.0f} MB are free there); earlier checkpoints are intact: "
                    f"free some disk space, then continue with --resume"
                ) from error


class StartMarker(Callback):
    """Create the folder of checkpoints after the first step. From then on a run that fails keeps its folder."""

    def __init__(self, run: Path) -> None:
        self.folder = run / LAST_CHECKPOINT.parent

    def on_train_batch_end(
        self, trainer: L.Trainer, learner: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if trainer.is_global_zero:
            self.folder.mkdir(exist_ok=True)


def start_or_resume(verb: str, config: TrainingConfig, run: Path, data: str = "") -> Path | None:
    """Claim the folder `run` for this configuration and return the checkpoint to resume from, or None.

    Of several processes the first one claims the folder for all.

    Args:
        verb: Name of the recipe file, such as `train` for train.yaml.
        config: The settings of the training.
        run: The run folder.
        data: SHA-256 of the images, labels and splits.

    Raises:
        UsageError: The folder holds a run, and `resume` is off, or that run has other settings or other data.
    """
    recipe = run / f"{verb}.yaml"
    checkpoint = run / LAST_CHECKPOINT
    system = system_info() | {"precision": resolve_precision(config), "data_sha256": data}
    if is_rank_zero():
        settings = to_yaml(verb, replace(config, resume=False), recipe)
        if recipe.exists():
            if not config.resume:
                raise UsageError(f"{run} already holds a run; continue it with --resume or choose another folder")
            _check_resumable(run, recipe, settings, system)
        write_atomic(run / "system.json", to_json(system))
        write_atomic(recipe, settings)
        if not (run / "run_id").exists():
            run_id = os.environ.get("WANDB_RUN_ID", uuid.uuid4().hex)  # sweeps set the id of their runs
            write_atomic(run / "run_id", run_id + "\n")
    return checkpoint if checkpoint.exists() else None


def _check_resumable(run: Path, recipe: Path, settings: str, system: dict[str, Any]) -> None:
    """Raise UsageError if the run has other settings or data; warn if its precision or code has changed."""
    lines = zip(recipe.read_text().splitlines(), settings.splitlines(), strict=False)
    changed = [new for old, new in lines if old != new]
    if changed:
        raise UsageError(
            f"{recipe}: the run was started with other settings than {', '.join(changed)}; "
            f"resume it with the same settings"
        )
    previous = system | json.loads((run / "system.json").read_text())
    if previous["data_sha256"] != system["data_sha256"]:
        raise UsageError(
            f"{run}: the images, labels or splits have changed since the run was started; choose another folder"
        )
    for name in ("precision", "code_sha256"):
        if previous[name] != system[name]:  # such as precision `auto` on another machine
            logger.warning(
                "%s: %s was %s and is now %s; the resumed run may differ in the last bits",
                run,
                name,
                previous[name],
                system[name],
            )


def next_epoch(checkpoint: Path | None) -> int:
    """Return the epoch that follows a checkpoint, 0 without a checkpoint."""
    return torch.load(checkpoint, weights_only=True)["epoch"] + 1 if checkpoint else 0


def system_info() -> dict[str, Any]:
    """Return the machine, the versions of vitmodel and its dependencies, and a hash of vitmodel's source code."""
    cuda = torch.cuda.is_available()
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(PACKAGE.rglob("*.py"))))
    packages = ("torch", "lightning", "numpy", "opencv-python-headless", "pydicom")
    return {
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())] if cuda else [],
        "code_sha256": code.hexdigest(),
        "versions": {"vitmodel": __version__} | {name: version(name) for name in packages},
    }


def resolve_precision(config: TrainingConfig) -> Literal["32-true", "bf16-mixed", "16-mixed"]:
    """Return Lightning's name of the requested precision, by default the best one for the device.

    The default on a CPU is 32 bits, because bfloat16 saves little time on small crops (dev/LOG.md).

    Raises:
        UsageError: The device is not available, or fp16 was requested on a CPU, for which there is no gradient scaler.
    """
    device = resolve_device(config.device)
    precision = config.precision
    if precision == "auto":
        precision = _best_precision(device)
    if precision == "fp16" and device == "cpu":
        raise UsageError("precision: fp16 needs a GPU; on a CPU use fp32 or bf16")
    return {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[precision]  # type: ignore[return-value]


def _best_precision(device: str) -> Literal["fp32", "bf16", "fp16"]:
    if device == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


class ShardedPrecision(FSDPPrecision):
    """Precision of sharded models: autocast over 32-bit weights, as for unsharded models.

    Lightning would cast weights and batches, labels included, to 16 bits, and for this rebuild packs, which are frozen
    dataclasses.
    """

    @property
    def mixed_precision_config(self) -> MixedPrecision:
        return MixedPrecision()

    def convert_input(self, data: Any) -> Any:
        return data


def resolve_strategy(config: TrainingConfig) -> Strategy | str:
    """Return Lightning's strategy for the configured number of processes."""
    if config.devices * config.nodes == 1:
        return "auto"
    if config.strategy == "fsdp":
        return FSDPStrategy(auto_wrap_policy=FSDP_WRAP_CLASSES)
    return "ddp_find_unused_parameters_true" if config.idles else "ddp"


def build_trainer(config: TrainingConfig, run: Path, callbacks: list[Callback]) -> L.Trainer:
    """Return a trainer with loggers, checkpoints and monitors.

    Args:
        config: Settings of the training.
        run: The run folder.
        callbacks: Additional callbacks, called before the monitors.

    Raises:
        UsageError: The device, precision or logger is not available.
    """
    loggers = build_loggers(config, run)
    monitors = [
        StartMarker(run),
        NonFiniteStepMonitor(run / "nonfinite.json", config.nonfinite),
        ThroughputLogger(),
        *([LearningRateMonitor("step")] if loggers else []),
        TrainingProgressBar(),
    ]
    return L.Trainer(
        accelerator=resolve_device(config.device),
        devices=config.devices,
        num_nodes=config.nodes,
        strategy=resolve_strategy(config),
        precision=None if config.strategy == "fsdp" else resolve_precision(config),
        max_epochs=config.epochs,
        accumulate_grad_batches=config.accumulate,
        logger=loggers,
        callbacks=[*callbacks, *monitors],
        plugins=[AtomicCheckpoints()] if config.strategy == "ddp" else [ShardedPrecision(resolve_precision(config))],
        gradient_clip_val=config.clip or None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def fit(
    trainer: L.Trainer,
    learner: TrainingModule,
    train: BatchLoader,
    val: BatchLoader | Sequence[BatchLoader] | None,
    checkpoint: Path | None,
) -> None:
    """Train `learner`, starting from `checkpoint` if there is one."""
    if learner.config.compile:
        compile_blocks(learner)
    with warnings.catch_warnings():
        # Lightning's advice on hardware and worker counts is redundant, because flags set both.
        warnings.filterwarnings("ignore", module="lightning")
        try:
            trainer.fit(learner, train, val, ckpt_path=checkpoint, weights_only=True)
        except VitmodelError:
            finish_wandb(trainer, exit_code=1)
            raise
    finish_wandb(trainer)


def finish_wandb(trainer: L.Trainer, exit_code: int = 0) -> None:
    """End the run of Weights & Biases, so that the next training in this process (another fold) gets its own."""
    for run_logger in trainer.loggers:
        if isinstance(run_logger, WandbLogger):
            run_logger.experiment.finish(exit_code=exit_code)


def build_loggers(config: TrainingConfig, run: Path) -> list[Logger]:
    """Return the loggers: TensorBoard always, Weights & Biases unless it is off.

    Both receive the same metric names, the settings and RUN/system.json.

    Raises:
        UsageError: Weights & Biases is to be used online without an API key.
    """
    loggers: list[Logger] = [TensorBoardLogger(run, name="", version="tensorboard", default_hp_metric=False)]
    if config.wandb == "online" and not has_wandb_key():
        raise UsageError("wandb: no API key is set; set WANDB_API_KEY, run `wandb login`, or use --wandb offline")
    if config.wandb != "off":
        offline = config.wandb == "offline" or (config.wandb == "auto" and not has_wandb_key())
        identifier = (run / "run_id").read_text().strip() if is_rank_zero() else None
        loggers.append(_wandb_logger(run, identifier, offline))
    if is_rank_zero():
        settings = plain(config) | {"system": json.loads((run / "system.json").read_text())}
        for run_logger in loggers:
            run_logger.log_hyperparams(settings)
    return loggers


def _wandb_logger(run: Path, identifier: str | None, offline: bool) -> WandbLogger:
    """Return a started logger of Weights & Biases; an offline one, with a warning, if the server does not answer."""
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_INIT_TIMEOUT", WANDB_TIMEOUT)
    settings = {"project": "vitmodel", "name": run.name, "id": identifier, "save_dir": run}
    run_logger = WandbLogger(**settings, offline=offline)  # type: ignore[arg-type]
    try:
        _ = run_logger.experiment
    except wandb.errors.Error as error:
        reason = str(error).partition("\n")[0]
        logger.warning("Weights & Biases cannot be reached (%s): the run is logged offline; see `wandb sync`", reason)
        wandb.teardown()  # its service still holds the run's id
        run_logger = WandbLogger(**settings, offline=True)  # type: ignore[arg-type]
    return run_logger


def has_wandb_key() -> bool:
    """Return whether an API key is set in the environment or was stored by `wandb login`."""
    try:
        stored = netrc.netrc().authenticators("api.wandb.ai")
    except (OSError, netrc.NetrcParseError):
        stored = None
    return bool(os.environ.get("WANDB_API_KEY") or stored)
