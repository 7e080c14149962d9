"""Model packages: a folder with everything needed to use a trained model.

A package is written completely or not at all, and reading it never runs code. `model.safetensors` holds the tensors;
`config.json` holds the format version, the architecture and the values that the caller adds (preprocessing, label,
threshold, calibration, data fingerprint, versions); `MODEL_CARD.md` is for people. A package may hold an ensemble,
several models of one architecture: `config.json` then has their number as `members`, and tensors are named 0.NAME,
1.NAME, ... `typicality.safetensors` holds the typicality of each model, again as NUMBER.NAME; packages of earlier
versions, and those of trainings with too few images, lack it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitmodel.errors import UsageError, VitmodelError
from vitmodel.model.architecture import NetworkConfig
from vitmodel.model.network import Network
from vitmodel.model.package_check import (
    CARD_FILE,
    CONFIG_FILE,
    COPY_AGAIN,
    FORMAT_VERSION,
    INTEGRITY_KEY,
    ONNX_SUFFIX,
    PACKAGE_FILES,
    TENSORS_FILE,
    TYPICALITY_FILE,
    PackageCheck,
    build_networks,
    check_digest,
    check_files,
    read_document,
    read_shapes,
    scan_folder,
    seal,
)
from vitmodel.model.packed_batch import pack_images
from vitmodel.model.typicality import Typicality
from vitmodel.utils import atomic_path, write_atomic

RESERVED_KEYS = {"format_version", "architecture", "members", INTEGRITY_KEY}


def save_package(
    folder: Path | str,
    models: Network | Sequence[Network],
    config: dict[str, Any],
    model_card: str,
    typicalities: Sequence[Typicality] = (),
) -> None:
    """Write a package to `folder`, replacing a package that is there.

    Args:
        folder: The folder of the package. Its parents are created.
        models: One model, or the members of an ensemble.
        config: Values that the caller adds to config.json.
        model_card: The text of MODEL_CARD.md.
        typicalities: The typicality of each model; empty if there is none.

    Raises:
        UsageError: `folder` holds anything but a package, or `config` has a reserved key.
        VitmodelError: The package cannot be written. The previous content of `folder` is kept.
    """
    folder = Path(folder).absolute()
    models = [models] if isinstance(models, Network) else models
    if reserved := RESERVED_KEYS & config.keys():
        raise UsageError(f"config: {', '.join(sorted(reserved))} is set by the package itself; remove it")
    if folder.exists() and not _is_package_folder(folder):
        raise UsageError(f"{folder}: exists and is not a model package; choose another folder")
    ensemble = {"members": len(models)} if len(models) > 1 else {}
    document = {"format_version": FORMAT_VERSION, "architecture": models[0].config.to_dict(), **ensemble, **config}
    tensors = _collect_tensors(models)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=folder.parent, prefix=f".{folder.name}-", ignore_cleanup_errors=True
        ) as scratch:
            new = Path(scratch) / "package"
            new.mkdir()
            with atomic_path(new / TENSORS_FILE) as temporary:
                save_file(tensors, temporary)
            if typicalities:
                with atomic_path(new / TYPICALITY_FILE) as temporary:
                    save_file(_number(typicality.tensors() for typicality in typicalities), temporary)
            write_atomic(new / CARD_FILE, model_card)
            seal(new, document)
            _replace(new, folder)
    except (OSError, SafetensorError) as error:
        raise VitmodelError(f"cannot write {folder}: {error}") from error


def _is_package_folder(folder: Path) -> bool:
    """Return whether `folder` contains only files of a package and graphs exported from it."""
    if not folder.is_dir():
        return False
    return {path.name for path in folder.iterdir() if path.suffix != ONNX_SUFFIX} <= set(PACKAGE_FILES)


def _collect_tensors(models: Sequence[Network]) -> dict[str, Tensor]:
    """Return the tensors of all models on the CPU; in an ensemble the names start with the member's number."""
    tensors = {}
    for number, model in enumerate(models):
        prefix = f"{number}." if len(models) > 1 else ""
        for name, tensor in model.tensors().items():
            tensors[f"{prefix}{name}"] = tensor.detach().cpu().contiguous()
    return tensors


def _number(members: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of all members, each named NUMBER.NAME."""
    return {f"{number}.{name}": tensor for number, member in enumerate(members) for name, tensor in member.items()}


def load_typicalities(folder: Path | str) -> list[Typicality]:
    """Return the typicality of each model of a package; empty if the package has none.

    Raises:
        UsageError: `folder` is not a package.
        VitmodelError: The file is damaged. The message names it.
    """
    folder = read_config(folder)[0]
    path = folder / TYPICALITY_FILE
    if not path.is_file():
        return []
    members: dict[int, dict[str, Tensor]] = {}
    try:
        for key, tensor in load_file(path).items():
            number, name = key.split(".")
            members.setdefault(int(number), {})[name] = tensor
        return [Typicality.from_tensors(members[number]) for number in range(len(members))]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise VitmodelError(f"{path}: broken or of another version ({error}); copy the package again") from error


def _previous_folder(folder: Path) -> Path:
    """Return where the old package is kept while a new one takes its place."""
    return folder.with_name(f".{folder.name}-previous")


def _replace(new: Path, folder: Path) -> None:
    """Move the folder `new` to `folder`.

    A folder cannot be replaced in one step, so the old one is first renamed to a path that `load_models` also checks.
    """
    previous = _previous_folder(folder)
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    try:
        new.rename(folder)
    except OSError:
        if previous.exists():
            previous.rename(folder)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def load_package(folder: Path | str) -> tuple[Network, dict[str, Any]]:
    """Return the only model of a package, in evaluation mode, and the values that its writer added to config.json.

    Raises:
        UsageError: `folder` is not a package, or holds an ensemble.
        VitmodelError: A file of the package is damaged or of another version. The message names the file.
    """
    models, config = load_models(folder)
    if len(models) > 1:
        raise UsageError(f"{folder}: contains an ensemble of {len(models)} models; name a package of one model")
    return models[0], config


def load_models(folder: Path | str) -> tuple[list[Network], dict[str, Any]]:
    """Return all models of a package, in evaluation mode, and the values that its writer added to config.json.

    Raises:
        UsageError: `folder` is not a package.
        VitmodelError: A file of the package is damaged, changed or of another version. The message names the file.
    """
    folder = find_package(folder)
    document = read_document(folder)
    check_files(folder, document)
    models = _load_networks(folder, document)
    for key in RESERVED_KEYS:
        document.pop(key, None)
    return models, document


def verify_package(folder: Path | str) -> PackageCheck:
    """Check everything in a package: all that loading checks, and the SHA-256 of every listed file.

    Raises:
        UsageError: `folder` is not a package.
        VitmodelError: Something is wrong; the message names the file or the value.
    """
    folder = find_package(folder)
    document = read_document(folder)
    found = scan_folder(folder)
    integrity = document.get(INTEGRITY_KEY, {"digest": "", "files": {}})
    listed = {name: str(digest) for name, digest in integrity["files"].items()}
    for name in listed:
        check_digest(folder, document, name)
    models = _load_networks(folder, document)
    tensors = [tensor for model in models for tensor in model.tensors().values()]
    return PackageCheck(
        folder=folder,
        digest=str(integrity["digest"]),
        files=listed,
        unlisted=tuple(name for name in found if name not in {*listed, CONFIG_FILE}) if listed else (),
        tensors=len(tensors),
        parameters=sum(tensor.numel() for tensor in tensors),
    )


def read_config(folder: Path | str) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Return where the files of a package are, its architecture, and the other values in its config.json.

    Raises:
        UsageError: `folder` is not a package.
        VitmodelError: config.json is damaged or of another version.
    """
    folder = find_package(folder)
    document = read_document(folder)
    architecture = document.pop("architecture")
    return folder, architecture, document


def find_package(folder: Path | str) -> Path:
    """Return where the files of a package are.

    Raises:
        UsageError: `folder` is not a package.
    """
    folder = Path(folder).absolute()
    if not folder.exists() and _previous_folder(folder).exists():  # a replacement was killed between two renames
        folder = _previous_folder(folder)
    for name in (TENSORS_FILE, CONFIG_FILE):
        if not (folder / name).is_file():
            raise UsageError(
                f"{folder}: not a model package, because {name} is missing; name the folder that training wrote"
            )
    return folder


def _load_networks(folder: Path, document: dict[str, Any]) -> list[Network]:
    """Return the models of a package, in evaluation mode. Raise VitmodelError if they cannot compute anything."""
    path = folder / TENSORS_FILE
    shapes = read_shapes(path)
    members = document.get("members", 1)
    try:
        models = build_networks(NetworkConfig.from_dict(document["architecture"]), members, shapes)
    except UsageError as error:
        raise VitmodelError(f"{folder / CONFIG_FILE}: {error}; {COPY_AGAIN}") from error
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise VitmodelError(f"{path}: {name} holds NaN or infinite values; {COPY_AGAIN} or repeat the training")
    for number, model in enumerate(models):
        prefix = f"{number}." if members > 1 else ""
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        model.load_tensors(own)
        model.eval()
        if not _gives_finite_outputs(model):
            raise VitmodelError(f"{path}: the network's output is not finite on its check image; repeat the training")
    return models


@torch.no_grad()
def _gives_finite_outputs(model: Network) -> bool:
    """Return whether all outputs are finite on the check image: a ramp of grey, two patches high and wide."""
    vit = model.config.vit
    side = 2 * vit.patch
    image = torch.linspace(0.01, 1, side * side).reshape(1, side, side).expand(vit.channels, -1, -1)
    pack = pack_images([image], vit.patch)
    features = model.features(pack)
    outputs = [model.image_and_breast_logits(features, pack.metadata), model.auxiliary_outputs(features)]
    return all(bool(torch.isfinite(output).all()) for output in outputs)
