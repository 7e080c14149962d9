"""Model packages: a folder with all that is needed to use a trained model, written whole or not at all, read without running code.

model.safetensors holds the tensors; config.json the format's version, the architecture and what the caller adds (preprocessing, label,
threshold, calibration, data fingerprint, versions); MODEL_CARD.md is for people. A package may hold several models of one architecture, an
ensemble: then config.json has their number, `members`, and tensors are called 0.NAME, 1.NAME ... Knows nothing of what the caller's values
mean.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vitmodel.errors import UsageError, VitmodelError
from vitmodel.model.architecture import NetworkConfig
from vitmodel.model.network import Network
from vitmodel.utils import atomic_path, to_json, write_atomic

FORMAT_VERSION = 1
TENSORS_FILE, CONFIG_FILE, CARD_FILE = PACKAGE_FILES = ("model.safetensors", "config.json", "MODEL_CARD.md")
ONNX_SUFFIX = ".onnx"  # ends the names of graphs, which are made of a package later on and gone when it is replaced


def save_package(
    folder: Path | str, models: Network | Sequence[Network], config: dict[str, Any], model_card: str
) -> None:
    """Write a package of a model, or of an ensemble, with the caller's `config` and model card, in place of one in `folder`.

    Raises UsageError where `folder` holds anything but a package, VitmodelError where it cannot be written; what was there then stays.
    """
    folder = Path(folder).absolute()
    models = [models] if isinstance(models, Network) else models
    if reserved := {"format_version", "architecture", "members"} & config.keys():
        raise UsageError(f"config: {', '.join(sorted(reserved))} is set by the package itself")
    if folder.exists() and not (
        folder.is_dir() and {path.name for path in folder.iterdir() if path.suffix != ONNX_SUFFIX} <= set(PACKAGE_FILES)
    ):
        raise UsageError(f"{folder}: exists and is no model package; name another folder")
    ensemble = {"members": len(models)} if len(models) > 1 else {}
    document = {"format_version": FORMAT_VERSION, "architecture": models[0].config.to_dict(), **ensemble, **config}
    tensors = {
        f"{number}.{name}" if ensemble else name: tensor.detach().cpu().contiguous()
        for number, model in enumerate(models)
        for name, tensor in model.tensors().items()
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=folder.parent, prefix=f".{folder.name}-", ignore_cleanup_errors=True
        ) as scratch:
            fresh = Path(scratch) / "package"
            fresh.mkdir()
            with atomic_path(fresh / TENSORS_FILE) as temporary:
                save_file(tensors, temporary)
            write_atomic(fresh / CONFIG_FILE, to_json(document))
            write_atomic(fresh / CARD_FILE, model_card)
            _replace(fresh, folder)
    except (OSError, SafetensorError) as error:
        raise VitmodelError(f"cannot write {folder}: {error}") from error


def _previous(folder: Path) -> Path:
    """Where a package waits while another takes its place."""
    return folder.with_name(f".{folder.name}-previous")


def _replace(fresh: Path, folder: Path) -> None:
    """Move `fresh` to `folder`. A folder cannot be replaced in one step, so the old one steps aside, where `load_package` also looks."""
    previous = _previous(folder)
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    try:
        fresh.rename(folder)
    except OSError:
        if previous.exists():
            previous.rename(folder)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def load_package(folder: Path | str) -> tuple[Network, dict[str, Any]]:
    """The model of a package, in evaluation mode, and the config that its writer added.

    Raises UsageError where `folder` is no package or holds an ensemble, VitmodelError naming the file where it is broken or of another
    version.
    """
    models, config = load_models(folder)
    if len(models) > 1:
        raise UsageError(f"{folder}: holds an ensemble of {len(models)} models; name a package of one")
    return models[0], config


def load_models(folder: Path | str) -> tuple[list[Network], dict[str, Any]]:
    """The models of a package, one unless it is an ensemble, and the config that its writer added. Raises as `load_package` does."""
    folder = Path(folder).absolute()
    if not folder.exists() and _previous(folder).exists():  # its replacement was killed between two renames
        folder = _previous(folder)
    for name in (TENSORS_FILE, CONFIG_FILE):
        if not (folder / name).is_file():
            raise UsageError(f"{folder}: no model package, for {name} is missing; name the folder that training wrote")
    try:
        document = json.loads((folder / CONFIG_FILE).read_text())
        version, architecture = document.pop("format_version"), document.pop("architecture")
    except (ValueError, AttributeError, KeyError) as error:
        raise VitmodelError(
            f"{folder / CONFIG_FILE}: broken ({error!r}); copy the package again or train anew"
        ) from error
    if version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        remedy = "a newer vitmodel wrote it, install that" if newer else "use the vitmodel that wrote it, or train anew"
        raise VitmodelError(
            f"{folder / CONFIG_FILE}: format_version {version}, this vitmodel reads {FORMAT_VERSION}; {remedy}"
        )
    try:
        config = NetworkConfig.from_dict(architecture)
        tensors = load_file(folder / TENSORS_FILE)
        members = document.pop("members", 1)
        models = []
        for number in range(members):
            with torch.device("meta"):
                model = Network(config)
            prefix = f"{number}." if members > 1 else ""
            mine = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            model.load_tensors(mine)
            models.append(model.eval())
    except UsageError as error:
        raise VitmodelError(f"{folder / CONFIG_FILE}: {error}; use the vitmodel that wrote it") from error
    except (SafetensorError, RuntimeError) as error:
        first_lines = " ".join(str(error).split("\n\t")[:2])  # torch lists every tensor
        raise VitmodelError(
            f"{folder / TENSORS_FILE}: broken or not of this {CONFIG_FILE} ({first_lines}); copy the package again"
        ) from error
    return models, document
