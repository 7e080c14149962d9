"""Check packages that come from somewhere else, before anything in them is used.

A package on the hub or in a file may hold only the files that vitmodel writes: tensors, JSON, the card and ONNX graphs.
Nothing that could run code, no links, no folders and nothing of impossible size is accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vitmodel.errors import UsageError, VitmodelError
from vitmodel.hub.client import cache_folder, download
from vitmodel.hub.names import HubName, is_package_name
from vitmodel.model.package import CONFIG_FILE, ONNX_SUFFIX, TENSORS_FILE, read_config

MEGABYTE = 1 << 20
LARGEST = {".safetensors": 64_000 * MEGABYTE, ONNX_SUFFIX: 64_000 * MEGABYTE, ".json": 256 * MEGABYTE, ".md": MEGABYTE}
"""Suffix of each kind of file in a package -> the largest size in bytes."""
PICKLED = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz", ".msgpack", ".h5", ".py")
"""Suffixes of files that are code or from which code could be loaded."""
HUB_FILES = ("README.md", ".gitattributes", ".gitignore")
"""Files of a repository that are no part of the package."""


def check_package_files(sizes: Mapping[str, int], where: str) -> None:
    """Raise unless the files are those of a package.

    Args:
        sizes: Name of each file -> size in bytes.
        where: What holds the files, for messages.

    Raises:
        UsageError: A file that a package needs is missing.
        VitmodelError: A file does not belong into a package, lies outside or is too large.
    """
    for name, size in sizes.items():
        suffix = Path(name).suffix.lower()
        if suffix in PICKLED:
            raise VitmodelError(f"{where}: holds {name}, which could run code; remove it, or ask its author")
        if Path(name).name != name or "\\" in name or suffix not in LARGEST:
            raise VitmodelError(f"{where}: {name!r} is no file of a package; remove it, or ask its author")
        if size > LARGEST[suffix]:
            raise VitmodelError(
                f"{where}: {name} has {size / MEGABYTE:.0f} MB, more than the {LARGEST[suffix] / MEGABYTE:.0f} MB that "
                "such a file may have; ask its author for another package"
            )
    for name in (TENSORS_FILE, CONFIG_FILE):
        if name not in sizes:
            raise UsageError(f"{where}: is no model package, because {name} is missing; name another one")


def check_shared_folder(folder: Path, within: Path | None = None) -> None:
    """Raise unless a folder holds the files of a package and nothing else; their content is checked by loading.

    Args:
        folder: The folder.
        within: Folder into which links may lead; None = no links. The cache of the hub consists of links.

    Raises:
        UsageError: A file is missing.
        VitmodelError: A file does not belong into a package or leads out of it, or the format is of another version.
    """
    sizes = {}
    for path in sorted(folder.iterdir()):
        inside = within is not None and path.resolve().is_relative_to(within.resolve())
        if path.name in HUB_FILES:
            continue
        if (path.is_symlink() and not inside) or not path.is_file():
            raise VitmodelError(f"{folder}: {path.name!r} is a link or a folder; remove it, or ask its author")
        sizes[path.name] = path.stat().st_size
    check_package_files(sizes, str(folder))
    read_config(folder)


def choose_package_files(sizes: Mapping[str, int], name: HubName) -> list[str]:
    """Return the files of a repository that belong to its package; raise the errors of `check_package_files`."""
    wanted = {file: size for file, size in sizes.items() if file not in HUB_FILES}
    check_package_files(wanted, str(name))
    return [TENSORS_FILE, CONFIG_FILE, *sorted(set(wanted) - {TENSORS_FILE, CONFIG_FILE})]


def find_package(value: Path | str) -> tuple[Path, HubName | None]:
    """Return the folder of a package, and for one on the hub its name at the commit that was used.

    Packages on the hub are downloaded, unless the cache holds them, and verified.

    Args:
        value: A folder, or `hf:org/name` with or without `@revision`. An existing path takes precedence.

    Raises:
        UsageError: There is no package of this name, or access is not granted.
        VitmodelError: The download failed, or the package is not safe to load.
    """
    if not is_package_name(value):
        return Path(value), None
    name = HubName.parse(str(value))
    snapshot = download(name, lambda sizes: choose_package_files(sizes, name), "package")
    check_shared_folder(snapshot.folder, within=cache_folder())
    return snapshot.folder, name.at(snapshot.commit)
