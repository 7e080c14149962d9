"""Options of the verbs for names and shared packages: weights, recipes, push, pack and unpack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from vitmodel.config.base import Config


@dataclass(frozen=True, kw_only=True)
class WeightsConfig(Config):
    """List the short names of published weights for --weights, and say which are cached on this machine."""

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {"input and output": ("download",)}

    download: tuple[str, ...] = ()
    """Names to download into the cache instead, for a later training without a network."""
