"""Find the file of initial weights: a path, an alias or a repository on the hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vitmodel.errors import UsageError
from vitmodel.hub.client import download
from vitmodel.hub.names import HubName, check_weights_name, weights_name
from vitmodel.model.weight_files import FOLDER_FILES, SHARD_INDEX
from vitmodel.utils import sha256_file

COMPANIONS = ("config.json", "preprocessor_config.json")
"""Files that state the input normalisation and the constant of the layer norms."""
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
PREFERRED = (
    r"model\.safetensors",
    re.escape(SHARD_INDEX),
    r"[^/]+\.safetensors",
    r"pytorch_model\.bin",
    r"[^/]+\.npz",
    r"[^/]+\.(pth|pt|bin|ckpt)",
    r"model\.onnx",
    r"onnx/model\.onnx",
    r"[^/]+\.onnx",
)
"""Patterns of weight files from the most to the least wanted one."""
PLAIN_NAME = re.compile(r"[\w./+-]+")
"""Names without characters that a pattern of files would interpret."""


@dataclass(frozen=True)
class WeightsSource:
    """Where initial weights come from, as the model package records it."""

    name: str
    """What `--weights` was given: a path, or a repository on the hub."""
    revision: str | None
    """Commit of the repository; None for a path."""
    sha256: str
    """SHA-256 of the file; for several files, of their digests in the order of their names."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for config.json."""
        return asdict(self)

    def __str__(self) -> str:
        return describe_source(self.to_dict())


def describe_source(values: Mapping[str, Any]) -> str:
    """Return one line on the source of weights, for the model card and reports; `values` is the entry of a package."""
    revision = f", revision {values['revision']}" if values.get("revision") else ""
    return f"{values['name']}{revision}, SHA-256 {values['sha256']}"


def find_weights(value: Path | str, option: str = "weights") -> tuple[Path, HubName | None]:
    """Return the weight file that `value` means, and for a repository its name at the commit that was used.

    A path takes precedence over a name. Files of a repository are downloaded, unless the cache holds them.

    Args:
        value: A file, a folder laid out as on the hub, an alias, `org/name` or `hf:org/name`, with or without
            `@revision`.
        option: The option that names the weights, for the error message.

    Raises:
        UsageError: There is nothing of this name.
        VitmodelError: The download failed.
    """
    name = weights_name(value)
    if name is None:
        check_weights_name(value, option)
        path = Path(value)
        if path.is_dir():
            path = next((path / file for file in FOLDER_FILES if (path / file).is_file()), path / FOLDER_FILES[0])
        return path, None
    snapshot = download(name, lambda sizes: choose_weight_files(sizes, name), "weights")
    return snapshot.folder / snapshot.files[0], name.at(snapshot.commit)


def weights_source(path: Path, name: HubName | None) -> WeightsSource:
    """Return the record of what `find_weights` found."""
    return WeightsSource(
        name=f"hf:{name.repository}" if name else str(path),
        revision=name.revision if name else None,
        sha256=_digest(path),
    )


def _digest(path: Path) -> str:
    """Return the SHA-256 of a weight file, or of all shards that an index lists."""
    if path.name != SHARD_INDEX:
        return sha256_file(path)
    shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    digests = "".join(sha256_file(path.with_name(shard)) for shard in shards)
    return hashlib.sha256(digests.encode()).hexdigest()


def choose_weight_files(sizes: Mapping[str, int], name: HubName) -> list[str]:
    """Return the files of a repository that hold its weights: first the one to read, then those that it needs.

    Raises:
        UsageError: The repository has no file that can be read, or several of equal rank.
    """
    files = [file for file in sorted(sizes) if PLAIN_NAME.fullmatch(file)]
    for pattern in PREFERRED:
        found = [file for file in files if re.fullmatch(pattern, file) and not SHARD.fullmatch(file)]
        if len(found) > 1:
            raise UsageError(
                f"{name}: holds several files of weights, {', '.join(found)}; download one of them with "
                f"`hf download {name.repository} {found[0]} --local-dir .` and name the file"
            )
        if found:
            shards = [file for file in files if SHARD.fullmatch(file) and found[0] == SHARD_INDEX]
            external = [file for file in files if file in (f"{found[0]}.data", f"{found[0]}_data")]
            return [*found, *shards, *external, *(file for file in COMPANIONS if file in files)]
    shown = ", ".join(files[:5]) or "nothing"
    raise UsageError(
        f"{name}: holds no weights that can be read without running code (it holds {shown}); choose a repository "
        "with model.safetensors, or convert its weights to safetensors"
    )
