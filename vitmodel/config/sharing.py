"""Options of the verbs for names and shared packages: weights, recipes, push, pack and unpack."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vitmodel.config.base import Config, require


@dataclass(frozen=True, kw_only=True)
class WeightsConfig(Config):
    """List the short names of published weights for --weights, and say which are cached on this machine."""

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {"input and output": ("download",)}

    download: tuple[str, ...] = ()
    """Names to download into the cache instead, for a later training without a network."""


@dataclass(frozen=True, kw_only=True)
class RecipesConfig(Config):
    """List the recipes for --config, with what each of them reached, on what data, and what it cost."""


@dataclass(frozen=True, kw_only=True)
class PushConfig(Config):
    """Upload a model package to the hub, so that others can use it by name.

    A new repository is private. The model card gets the metadata of the hub, with the metrics of the last evaluation.
    """

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "input and output": ("package", "name", "public", "licence", "message")
    }

    package: Path
    """Model package: a folder with model.safetensors and config.json, such as RUN/package."""
    name: str
    """Repository: hf:organisation/name, made if it does not exist."""
    public: bool = False
    """Make a new repository readable for everyone, and allow an existing one that is."""
    licence: str = "unknown"
    """Licence of the model as the hub names it, such as apache-2.0 or cc-by-nc-4.0."""
    message: str = "Upload a model package"
    """Description of the change in the repository's history."""

    def _check(self) -> None:
        super()._check()
        require(
            bool(re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.licence)),
            "licence",
            "is no identifier of a licence, such as mit",
        )
        require(bool(self.message.strip()), "message", "must not be empty")


@dataclass(frozen=True, kw_only=True)
class PackConfig(Config):
    """Write a model package as one file, for mail or a USB stick.

    The same package always gives the same bytes.
    """

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {"input and output": ("package", "out")}

    package: Path
    """Model package: a folder, such as RUN/package, or hf:org/name."""
    out: Path
    """File to write, such as model.vitmodel.zip. It must not exist."""


@dataclass(frozen=True, kw_only=True)
class UnpackConfig(Config):
    """Write the model package in a file of `vitmodel pack` to a folder, after checking it."""

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {"input and output": ("file", "out")}

    file: Path
    """File that `vitmodel pack` wrote."""
    out: Path
    """Folder of the package. It must not exist."""
